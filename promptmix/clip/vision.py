"""CLIP's image tower, with prompts per layer for vision transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from promptmix.clip.blocks import first_token_layer, layer
from promptmix.errors import ConfigError


@dataclass(frozen=True)
class PromptStep:
    """What happens to the end of the token sequence before a layer.

    Replacing n prompts is ``PromptStep(new, remove=n)``; appending is ``PromptStep(new)``; what no step touches is carried on.

    Attributes:
        tokens: (n, W) for all images, or (B, n, W); appended after the removal. None appends nothing.
        remove: tokens taken off the end first.
    """

    tokens: Tensor | None
    remove: int = 0


#: Pictures per CPU thread whose states between two layers of a ViT-B/16 stay in the caches; more at once are slower, not faster.
_PICTURES_PER_THREAD = 8

#: {layer: step}; layer 0 is the input, after the positional embedding and before ``ln_pre``.
VisualPrompts = Mapping[int, PromptStep]


class ImageTower(nn.Module):
    """The frozen image tower of an open_clip model.

    Args:
        visual: ``model.visual``: a vision transformer, or any other tower, which then takes no prompts.
    """

    visual: Any  # open_clip's, which comes without types

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual
        #: Whether what nobody reads in the last layer is left out, and pictures go through in portions that fit a CPU's caches;
        #: otherwise every layer is open_clip's.
        self.skips_unread = self.takes_prompts and visual.attn_pool is None and visual.pool_type == "tok"
        self._layer, self._last_layer = layer, first_token_layer

    @property
    def takes_prompts(self) -> bool:
        """Whether the tower is a vision transformer whose layers can be prompted."""
        return type(self.visual) is VisionTransformer and hasattr(self.visual.transformer, "resblocks")

    @property
    def width(self) -> int:
        """Token width W.

        Raises:
            ConfigError: the tower has no tokens (a ResNet or another convolutional network).
        """
        self._require_transformer()
        return self.visual.class_embedding.shape[0]

    @property
    def depth(self) -> int:
        """Number of layers; raises ``ConfigError`` as ``width`` does."""
        self._require_transformer()
        return len(self.visual.transformer.resblocks)

    def compile_layers(self) -> None:
        """Run the layers, or the whole of another tower, through ``torch.compile`` from now on; names of weights stay."""
        if self.skips_unread:
            self._layer, self._last_layer = torch.compile(layer), torch.compile(first_token_layer)
        else:
            self.visual.compile()

    def _require_transformer(self) -> None:
        if not self.takes_prompts:
            raise ConfigError(
                f"MODEL.BACKBONE.NAME: the image tower {type(self.visual).__name__} takes no visual prompts; "
                "choose a vision transformer such as ViT-B/16 or tiny-vit"
            )

    def forward(self, images: Tensor, prompts: VisualPrompts | None = None) -> Tensor:
        """Encode images (B, 3, S, S), with prompts before the layers that ``prompts`` names.

        Returns:
            Image features (B, D), not normalised.

        Raises:
            ConfigError: prompts were given to a tower that is no vision transformer.
        """
        if not prompts and not self.skips_unread:
            features = self.visual(images)
            return features[0] if isinstance(features, tuple) else features
        self._require_transformer()
        prompts = prompts or {}
        separable = all(step.tokens is None or step.tokens.dim() == 2 for step in prompts.values())
        if self.skips_unread and separable and images.device.type == "cpu" and not torch.is_grad_enabled():
            portions = images.split(_PICTURES_PER_THREAD * torch.get_num_threads())
            return torch.cat([self._encode(portion, prompts) for portion in portions])
        return self._encode(images, prompts)

    def _encode(self, images: Tensor, prompts: VisualPrompts) -> Tensor:
        visual = self.visual
        x = visual.conv1(images).flatten(2).transpose(1, 2)
        first = visual.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)
        x = torch.cat([first, x], dim=1) + visual.positional_embedding.to(x.dtype)
        x = visual.ln_pre(_apply(x, prompts.get(0)))
        last = self.depth - 1
        for i, block in enumerate(visual.transformer.resblocks):
            x = _apply(x, prompts.get(i)) if i else x
            run = self._last_layer if i == last else self._layer
            x = run(block, x) if self.skips_unread else block(x)
        pooled, _ = visual._pool(x)
        return pooled if visual.proj is None else pooled @ visual.proj


def _apply(x: Tensor, step: PromptStep | None) -> Tensor:
    if step is None:
        return x
    kept = x[:, : x.shape[1] - step.remove]
    if step.tokens is None:
        return kept
    new = step.tokens.to(x.dtype)
    return torch.cat([kept, new if new.dim() == 3 else new.expand(x.shape[0], -1, -1)], dim=1)
