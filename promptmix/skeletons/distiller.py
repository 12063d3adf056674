"""A distiller for promptmix."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from promptmix import register
from promptmix.config.declare import Setting
from promptmix.prompts.roles import Distiller, PromptBank, Task
from promptmix.prompts.step import Step


@register
class MyPart(Distiller):
    """Mean squared difference between the student's scores and those of the data set's first template.

    Args:
        task: the frozen model and the data set's words.
        bank: the student's prompts.
    """

    teacher: Tensor

    def __init__(
        self, task: Task, bank: PromptBank, factor: Annotated[float, Setting("multiplies the difference", low=0)] = 0.01
    ) -> None:
        super().__init__()
        self.task, self.factor = task, factor
        self.register_buffer("teacher", task.clip.ensemble(task.templates[:1], task.classnames), persistent=False)

    def forward(self, step: Step) -> Tensor:
        """Return the loss (scalar) of the student's scores (B, C)."""
        taught = self.task.clip.scale * step.frozen_image @ self.teacher.T
        return self.factor * (step.logits - taught).square().mean()
