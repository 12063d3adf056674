"""Losses as sums of weighted terms, and those that every method shares."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from promptmix.prompts.roles import Loss, Router

if TYPE_CHECKING:
    from promptmix.prompts.step import Step


@dataclass(frozen=True)
class Term:
    """One weighted term of a loss.

    Attributes:
        loss: what is computed.
        weight: factor on it.
        part: its name in log lines and in checkpoints.
        weighted: whether log lines show it times its weight.
    """

    loss: Loss
    weight: float
    part: str
    weighted: bool = False


@dataclass(frozen=True)
class LossSum:
    """A sum of weighted terms, in the order they are written."""

    terms: tuple[Term, ...]

    def __rmul__(self, weight: float) -> LossSum:
        return LossSum(tuple(replace(term, weight=weight * term.weight) for term in self.terms))

    def __add__(self, other: Loss | LossSum | None) -> LossSum:
        if other is None:
            return self
        return LossSum(self.terms + (other.named(other.part) if isinstance(other, Loss) else other).terms)


class CrossEntropy(Loss):
    """Cross-entropy of the class scores, mean over the batch."""

    part = "ce"
    needs_all_experts = False

    def forward(self, step: Step) -> Tensor:
        """Return the loss (scalar)."""
        return F.cross_entropy(step.logits, step.labels)


class RouterLoss(Loss):
    """The router's own loss, as a term of the sum.

    Args:
        router: None adds nothing.
    """

    part = "router"
    needs_all_experts = False

    def __init__(self, router: Router | None) -> None:
        super().__init__()
        self._router = (router,)  # not a submodule: the learner holds the router already

    def forward(self, step: Step) -> Tensor | None:
        """Return the router's loss (scalar), or None where it has none."""
        (router,) = self._router
        return None if router is None else router.loss(step)
