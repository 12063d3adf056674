"""Losses that every method shares."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from promptmix.prompts.roles import Loss, Router
from promptmix.prompts.step import Step


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
