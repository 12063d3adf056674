"""Losses that every method shares."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from promptmix.prompts.roles import Loss, Router
from promptmix.prompts.step import Step


class CrossEntropy(Loss):
    """Cross-entropy of class scores, mean over the batch.

    Args:
        scores: a method of a head that gives scores (B, C) of its own, or K sets (K, B, C); None = ``step.logits``.
        part: its name in log lines.
    """

    def __init__(self, scores: Callable[[Step], Tensor] | None = None, part: str = "ce") -> None:
        super().__init__()
        self.scores, self.part = scores, part
        self.needs_all_experts = self.needs_all_images = scores is not None

    def forward(self, step: Step) -> Tensor:
        """Return the loss (scalar)."""
        scores = step.logits if self.scores is None else step.once(self.scores)
        if scores.dim() == 2:
            return F.cross_entropy(scores, step.labels)
        return F.cross_entropy(scores.flatten(0, 1), step.labels.repeat(len(scores)))


class RouterLoss(Loss):
    """The router's own loss, as a term of the sum.

    Args:
        router: None adds nothing.
    """

    part = "router"
    needs_all_experts = needs_all_images = False

    def __init__(self, router: Router | None) -> None:
        super().__init__()
        self._loss = None if router is None else router.loss  # a method, so that the router is no part of this one

    def forward(self, step: Step) -> Tensor | None:
        """Return the router's loss (scalar), or None where it has none."""
        return None if self._loss is None else self._loss(step)
