"""The heads of the library itself: how image and text features become class scores."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from promptmix.config.declare import Setting
from promptmix.errors import ConfigError
from promptmix.prompts.learner import WeightedScores as WeightedScores
from promptmix.prompts.learner import weigh as weigh
from promptmix.prompts.roles import Head, PromptBank, Task
from promptmix.prompts.step import Step
from promptmix.registry import register


@register
class Cosine(Head):
    """``s * <f_b, t_c>`` for one prompt.

    Args:
        bank: of one expert.

    Raises:
        ConfigError: the bank has several experts, which need ``WeightedScores``.
    """

    def __init__(
        self, task: Task, bank: PromptBank, scale: Annotated[float, Setting("s; 0 = the model's temperature", low=0)] = 0.0
    ) -> None:
        super().__init__()
        self.scale = scale
        if bank.num_experts != 1 or bank.per_image:
            raise ConfigError(f"HEAD.NAME Cosine scores one prompt, but there are {bank.num_experts}; choose WeightedScores")

    def forward(self, step: Step) -> Tensor:
        """Return class scores (B, C)."""
        return step.task.clip.with_bias(step.scores(scale=self.scale))
