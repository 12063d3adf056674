"""Attention of the image over the experts' text features (pFedMoAP, arXiv 2410.10114, section 3.3)."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor, nn

from promptmix import register
from promptmix.config.declare import Setting
from promptmix.errors import SettingError
from promptmix.prompts.roles import Head, PromptBank, Task
from promptmix.prompts.step import Step


@register
class AttentionGate(Head):
    """``lambda s <f, t_1> + s <pool(f), out>``: the own prompt's score and that of a mixture made for each image and class.

    pool takes every (D / d)-th value of a normalised feature. The image is the query, the experts' features of a class are keys
    and values; out is the attention's output for that image and class, not normalised. With one expert it is ``s <f, t_1>``.

    Args:
        bank: the experts, the own one first.

    Raises:
        SettingError: d doesn't fit the features or the heads.
    """

    stays_local = True

    def __init__(
        self,
        task: Task,
        bank: PromptBank,
        gate_dim: Annotated[int, Setting("d: values of a feature that the gate reads; all where it has fewer", low=1)] = 128,
        heads: Annotated[int, Setting("attention heads of the gate", low=1)] = 8,
        scaling: Annotated[float, Setting("factor on the gate's scores, in place of 1 / sqrt(head size)", above=0)] = 10.0,
        lambda_: Annotated[float, Setting("lambda: weight of the own prompt's score", low=0)] = 0.5,
    ) -> None:
        super().__init__()
        width = task.clip.text.embed_dim
        self.dim, self.heads, self.scaling, self.lambda_ = min(gate_dim, width), heads, scaling, lambda_
        if width % self.dim:
            raise SettingError("gate_dim", gate_dim, f"must divide the features' {width} values")
        if self.dim % heads:
            raise SettingError("heads", heads, f"must divide the gate's {self.dim} values")
        self.w_q, self.w_k, self.w_v, self.w_o = (nn.Linear(self.dim, self.dim) for _ in range(4))

    def pool(self, features: Tensor) -> Tensor:
        """Return every (D / d)-th value of features (..., D)."""
        return features[..., :: features.shape[-1] // self.dim]

    def attend(self, image: Tensor, text: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return outputs (B, C, d) and the weights of the experts (B, C, H, E), for pooled features (B, d) and (E, C, d).

        Args:
            image: pooled image features.
            text: pooled text features.
            given: weights (B, E) that take the place of the attention's, for all classes and heads.
        """
        query, key, value = (
            linear(x).unflatten(-1, (self.heads, -1)) for linear, x in ((self.w_q, image), (self.w_k, text), (self.w_v, text))
        )
        weights = (self.scaling * torch.einsum("bhd,echd->bche", query, key)).softmax(dim=-1)
        if given is not None:
            weights = given[:, None, None].to(weights.dtype).expand_as(weights)
        return self.w_o(torch.einsum("bche,echd->bchd", weights, value).flatten(-2)), weights

    def attention(self, step: Step) -> Tensor:
        """Return the weights of the experts (B, C, H, E)."""
        return self.attend(self.pool(step.image), self.pool(step.text.to(step.image.dtype)))[1]

    def forward(self, step: Step, given: Tensor | None = None) -> Tensor:
        """Return class scores (B, C), with ``given`` weights (B, E) in the place of the attention's."""
        image, scale = step.image, step.task.clip.scale
        text = step.text.to(image.dtype)
        own = scale * image @ text[0].T
        if len(text) == 1:
            return own
        pooled = self.pool(image)
        mixed, _ = self.attend(pooled, self.pool(text), given)
        return self.lambda_ * own + scale * torch.einsum("bd,bcd->bc", pooled, mixed)
