"""Instance-conditional prompts: a small network shifts the context by each image's feature (CoCoOp, arXiv 2203.05557)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from yacs.config import CfgNode

from promptmix import register
from promptmix.config.declare import Setting
from promptmix.errors import ConfigError
from promptmix.prompts.context import initial_context, refuse_idle_length
from promptmix.prompts.roles import PromptBank, Task


@register
class InstanceConditional(PromptBank):
    """Soft prompts ``v_m + pi(f)``: the meta-net pi maps an image feature to one vector that is added to every context vector.

    All images' prompts go through the text tower at once, each as an expert of its own: what the classes share is computed
    once per image, never once per image and class.

    Raises:
        ConfigError: no context vector, no prompt, or a factor below 1.
    """

    per_image = True

    def __init__(
        self,
        task: Task,
        n_ctx: Annotated[int, Setting("M: context vectors", low=1)] = 4,
        ctx_init: Annotated[str, Setting('words to start from, such as "a photo of a"; then M is their number of tokens')] = "",
        n_prompts: Annotated[int, Setting("E: soft prompts, all shifted by the same vector", low=1)] = 1,
        reduction: Annotated[int, Setting("joint width D over the meta-net's hidden width", low=1)] = 16,
        image_chunk: Annotated[int, Setting("images encoded together in evaluation; less needs less memory", low=1)] = 16,
    ) -> None:
        super().__init__()
        joint = task.clip.embed_dim
        if not 1 <= reduction <= joint or image_chunk < 1:
            raise ConfigError(
                f"instance-conditional prompts: REDUCTION is {reduction} (choose from 1 to the joint width, {joint}) "
                f"and IMAGE_CHUNK is {image_chunk} (choose 1 or more)"
            )
        self.task, self.image_chunk = task, image_chunk
        self.ctx = nn.Parameter(initial_context(task.clip.text, n_ctx, ctx_init, n_prompts))
        hidden = joint // reduction
        layers = (
            ("linear1", nn.Linear(joint, hidden)),
            ("relu", nn.ReLU()),
            ("linear2", nn.Linear(hidden, task.clip.text.width)),
        )
        self.meta_net = nn.Sequential(OrderedDict(layers))

    @classmethod
    def check_settings(cls, cfg: CfgNode, node: str) -> None:
        """Refuse a context length that the initial words would override."""
        refuse_idle_length(cfg, node)

    @property
    def num_experts(self) -> int:
        return self.ctx.shape[0]

    def forward(self, names: Sequence[str], image_features: Tensor | None = None, *, full_stop: bool | None = None) -> Tensor:
        """Return normalised text features (B, E, C, D) for image features (B, D); prompts end with a full stop by default.

        Raises:
            ValueError: no image features were given.
        """
        if image_features is None:
            raise ValueError("instance-conditional prompts need image features; check bank.per_image before calling")
        chunk = len(image_features) if torch.is_grad_enabled() else self.image_chunk
        stop = full_stop in (None, True)
        return torch.cat([self._encode(names, part, stop) for part in image_features.split(chunk)])

    def _encode(self, names: Sequence[str], image_features: Tensor, full_stop: bool) -> Tensor:
        tower = self.task.clip.text
        shift = self.meta_net(image_features)  # (B, W)
        ctx = (self.ctx + shift[:, None, None]).flatten(0, 1)  # (B * E, M, W)
        features = tower(tower.compose(ctx, tower.tokenizer.class_tokens(names), self.stop(full_stop)))
        return F.normalize(features, dim=-1).unflatten(0, (len(image_features), -1))
