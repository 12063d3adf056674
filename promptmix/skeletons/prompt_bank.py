"""A prompt bank for promptmix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor, nn

from promptmix import register
from promptmix.config.declare import Setting
from promptmix.prompts.roles import PromptBank, Task


@register
class MyPart(PromptBank):
    """One learned vector in front of each class name.

    Args:
        task: the frozen model and the data set's words.
    """

    def __init__(self, task: Task, std: Annotated[float, Setting("standard deviation of the start", above=0)] = 0.02) -> None:
        super().__init__(task)
        self.ctx = nn.Parameter(std * torch.randn(1, 1, task.clip.text.width))

    def encode(self, names: Sequence[str], *, full_stop: bool | None = None) -> Tensor:
        """Return text features (1, C, D) of C class names, as they come from the tower."""
        tower = self.task.clip.text
        features: Tensor = tower(tower.compose(self.ctx, tower.tokenizer.class_tokens(names), self.stop(full_stop)))
        return features
