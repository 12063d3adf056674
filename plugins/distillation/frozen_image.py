"""Distillation by features: prompted image features are held near those of the frozen tower, by L1 (PromptSRC) or by cosine."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from promptmix import register
from promptmix.prompts.roles import Distiller, PromptBank, Task
from promptmix.prompts.step import Step


@register
class FrozenImageL1(Distiller):
    """Mean absolute difference of prompted and frozen image features (PromptSRC, arXiv 2307.06948).

    Where experts have image features of their own, of all.
    """

    def __init__(self, task: Task, bank: PromptBank) -> None:
        super().__init__()

    def forward(self, step: Step) -> Tensor:
        return F.l1_loss(step.image, _frozen(step))


@register
class FrozenImageCosine(Distiller):
    """1 - mean cosine of prompted and frozen image features; where experts have image features of their own, of all."""

    def __init__(self, task: Task, bank: PromptBank) -> None:
        super().__init__()

    def forward(self, step: Step) -> Tensor:
        return 1 - F.cosine_similarity(step.image.float(), _frozen(step).float(), dim=-1).mean()


def _frozen(step: Step) -> Tensor:
    """Return the frozen tower's features in the shape of the prompted ones."""
    frozen = step.frozen_image.to(step.image.dtype)
    return frozen if step.image.dim() == 2 else frozen[:, None].expand_as(step.image)
