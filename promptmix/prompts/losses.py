"""Losses that every method shares."""

from __future__ import annotations

from torch import Tensor

from promptmix.prompts.learner import CrossEntropy as CrossEntropy
from promptmix.prompts.roles import Loss, Router
from promptmix.prompts.step import Step


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
