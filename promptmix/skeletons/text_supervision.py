"""A text supervision for promptmix."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from promptmix import register
from promptmix.config.declare import Setting
from promptmix.prompts.roles import PromptBank, Task, TextSupervision
from promptmix.prompts.step import Step


@register
class MyPart(TextSupervision):
    """Mean squared distance between soft features and each expert's hard ones.

    Args:
        task: the frozen model and the data set's words.
        bank: the experts.
    """

    hard: Tensor

    def __init__(
        self, task: Task, bank: PromptBank, factor: Annotated[float, Setting("multiplies the distance", low=0)] = 1.0
    ) -> None:
        super().__init__()
        self.factor = factor
        self.register_buffer("hard", bank.references(task.classnames), persistent=False)  # no checkpoint holds class names

    def forward(self, step: Step) -> Tensor:
        """Return the loss (scalar) of text features (E, C, D)."""
        return self.factor * (step.text - self.hard).square().sum(dim=-1).mean()
