"""A head for promptmix."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor, nn

from promptmix import register
from promptmix.config.declare import Setting
from promptmix.prompts.roles import Head, PromptBank, Task
from promptmix.prompts.step import Step


@register
class MyPart(Head):
    """Cosines with a learned scale: the mean over the experts, or the best expert.

    Args:
        task: the frozen model and the data set's words.
        bank: the experts.
    """

    def __init__(
        self, task: Task, bank: PromptBank, best: Annotated[bool, Setting("the best expert instead of the mean")] = False
    ) -> None:
        super().__init__()
        self.best = best
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self, step: Step) -> Tensor:
        """Return class scores (B, C) of image features (B, D) and text features (E, C, D)."""
        cosines = torch.einsum("bd,ecd->bec", step.query, step.text.to(step.query.dtype))
        scores = cosines.amax(dim=1) if self.best else cosines.mean(dim=1)
        return step.task.clip.scale * self.log_scale.exp() * scores
