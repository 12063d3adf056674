"""A router for promptmix."""

from __future__ import annotations

from typing import Annotated

from torch import nn

from promptmix import register
from promptmix.config.declare import Setting
from promptmix.prompts.roles import PromptBank, Router, Routing, Task
from promptmix.prompts.step import Step


@register
class MyPart(Router):
    """A linear map to one score per expert; every image goes to all of them.

    Args:
        task: the frozen model and the data set's words.
        bank: the experts.
    """

    def __init__(
        self, task: Task, bank: PromptBank, temperature: Annotated[float, Setting("divides the scores", above=0)] = 1.0
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.gate = nn.Linear(task.clip.embed_dim, bank.num_experts)

    def forward(self, step: Step) -> Routing:
        """Route a batch by its image features (B, D)."""
        scores = self.gate(step.query) / self.temperature
        return Routing.top_k(scores, scores.shape[-1])
