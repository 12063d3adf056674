"""Heads: how image and text features become class scores."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from promptmix.config.declare import Setting
from promptmix.errors import ConfigError
from promptmix.prompts.roles import Head, PromptBank, Task
from promptmix.prompts.step import Step
from promptmix.registry import register


@register
class WeightedScores(Head):
    """``s * <f_b, sum_k w_bk t_{e_bk, c}>``: the experts' scores, weighed by the router, equally without one (MoCoOp).

    The mixed text feature is not normalised again, so the weighted sum of the experts' own scores is the same number without a
    text feature per image. With one prompt it is the cosine times the scale.

    Args:
        task: the frozen model.
        bank: unused, like in every head that reads features alone.
        scale: s.
    """

    mixes = True

    def __init__(
        self, task: Task, bank: PromptBank, scale: Annotated[float, Setting("s; 0 = the model's temperature", low=0)] = 0.0
    ) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, step: Step) -> Tensor:
        """Return class scores (B, C)."""
        image = step.image
        text = step.text.to(image.dtype)
        images = "bed" if image.dim() == 3 else "bd"
        scores = torch.einsum(f"{images},{'b' if text.dim() == 4 else ''}ecd->bec", image, text)
        return _with_bias(step, (self.scale or step.task.clip.scale) * weigh(step, scores))


@register
class Cosine(Head):
    """``s * <f_b, t_c>`` for one prompt.

    Args:
        task: the frozen model.
        bank: of one expert.
        scale: s.

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
        return _with_bias(step, step.scores(scale=self.scale))


def weigh(step: Step, scores: Tensor) -> Tensor:
    """Return the experts' scores (B, E, C) weighed by the router, equally without one: (B, C)."""
    if step.routing is None:
        return scores.mean(dim=1)
    weights = step.routing.dense if step.experts is None else step.routing.dense[:, step.experts]
    return torch.einsum("be,bec->bc", weights.to(scores.dtype), scores)


def _with_bias(step: Step, logits: Tensor) -> Tensor:
    """Add SigLIP's bias, which a sigmoid of the logits needs and a softmax does not see."""
    bias = step.task.clip.bias
    return logits if bias is None else logits + bias
