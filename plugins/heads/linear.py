"""A linear probe as a head: weights of its own for each class, on the image features alone."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from promptmix import register
from promptmix.config.declare import Setting
from promptmix.prompts.roles import Head, PromptBank, Task
from promptmix.prompts.step import Step


@register
class LinearHead(Head):
    """``s <f, w_c>`` with rows w_c that are not normalised.

    Args:
        bank: of one expert; its text features may be the start.
    """

    class_specific = True

    def __init__(
        self,
        task: Task,
        bank: PromptBank,
        start: Annotated[str, Setting("random: uniform in +-1/sqrt(D)", choices=("zeroshot", "random"))] = "zeroshot",
        zeroshot_share: Annotated[float, Setting("share of the zero-shot weights in evaluation (WiSE-FT)", low=0, high=1)] = 0.0,
        scale: Annotated[float, Setting("s; 0 = the model's temperature", low=0)] = 0.0,
    ) -> None:
        super().__init__()
        self.scale, self.share = scale or float(task.clip.scale), zeroshot_share
        self.zeroshot: Tensor
        with torch.no_grad():
            zeroshot = bank(task.classnames)[0].detach().float().clone()
        self.register_buffer("zeroshot", zeroshot, persistent=False)
        bound = zeroshot.shape[1] ** -0.5
        drawn = torch.empty_like(zeroshot).uniform_(-bound, bound)
        self.weight = nn.Parameter(zeroshot.clone() if start == "zeroshot" else drawn)

    def forward(self, step: Step) -> Tensor:
        return self.scores(step.image)

    def scores(self, features: Tensor) -> Tensor:
        """Return class scores (B, C) of normalised features (B, D)."""
        weight: Tensor = self.weight
        if self.share and not self.training:
            weight = torch.lerp(weight, self.zeroshot, self.share)
        return self.scale * F.linear(features, weight.to(features.dtype))
