"""A prompt bank for promptmix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from promptmix import hookimpl
from promptmix.config.declare import Setting
from promptmix.prompts.roles import PromptBank, Task
from promptmix.registry import Registry


class MyPart(PromptBank):
    """One learned vector in front of each class name.

    Args:
        task: the frozen model and the data set's words.
        std: standard deviation of the start.
    """

    def __init__(self, task: Task, std: Annotated[float, Setting("standard deviation of the start", above=0)] = 0.02) -> None:
        super().__init__()
        self.task = task
        self.ctx = nn.Parameter(std * torch.randn(1, 1, task.clip.text.width))

    @property
    def num_experts(self) -> int:
        """Number of prompts E."""
        return 1

    def forward(self, names: Sequence[str], image_features: Tensor | None = None, *, full_stop: bool | None = None) -> Tensor:
        """Return normalised text features (E, C, D)."""
        tower = self.task.clip.text
        return F.normalize(tower(tower.compose(self.ctx, tower.tokenizer.class_tokens(names))), dim=-1)

    def references(self, names: Sequence[str]) -> Tensor:
        """Return normalised hard-prompt features (E, C, D)."""
        return self.task.clip.hard_features(self.task.templates[:1], names)


@hookimpl
def register_prompt_banks(registry: Registry) -> None:
    registry.register(MyPart)
