"""CLIP's image tower, with prompts per layer for vision transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, overload

import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from promptmix.clip.blocks import attention, first_token_layer, layer, values_layer
from promptmix.clip.places import Changes, LayerAction, PromptStep
from promptmix.clip.weights import Weights, beside, merged, run_changed
from promptmix.errors import ConfigError

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

    @overload
    def forward(
        self,
        images: Tensor,
        prompts: VisualPrompts | None = None,
        *,
        weights: Weights | None = None,
        actions: Mapping[int, LayerAction] | None = None,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        images: Tensor,
        prompts: VisualPrompts | None = None,
        *,
        weights: Weights | None = None,
        actions: Mapping[int, LayerAction] | None = None,
        tokens: Literal["patches", "values"],
    ) -> tuple[Tensor, Tensor]: ...

    def forward(
        self,
        images: Tensor,
        prompts: VisualPrompts | None = None,
        *,
        weights: Weights | None = None,
        actions: Mapping[int, LayerAction] | None = None,
        tokens: Literal["patches", "values"] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Encode images (B, 3, S, S), in one pass.

        Args:
            images: pictures.
            prompts: tokens before layers.
            weights: deltas by their names in this tower's state dict (``visual.transformer.resblocks.0.ln_1.weight``,
                ``visual.proj``). Functions beside linear layers need a vision transformer of CLIP's own, or a timm tower.
            actions: functions at the joints of layers.
            tokens: "patches" gives the patches' own features too: as they leave the last layer (of a ResNet: each place asks in
                the attention pool), through the final norm and projection; "values" those without attention in the last layer
                (of a ResNet: in the pool), as GalLoP and SurPL read them.

        Returns:
            Image features (B, D), not normalised; with ``tokens`` also those of the patches (B, M, D), without class and prompt
            tokens, row after row of the grid.

        Raises:
            ConfigError: prompts, actions or patches were asked of a tower that has none, or a name is unknown.
        """
        changes = self._changes(prompts, weights, actions)
        inside = bool(changes.steps or changes.actions)
        if tokens is not None:
            return self._encode_tokens(images, changes, tokens)
        if not inside and not self.skips_unread:
            return self._whole(images, changes)
        self._require_transformer()
        separable = all(
            step.tokens is None or isinstance(step.tokens, Tensor) and step.tokens.dim() == 2 for step in changes.steps.values()
        )
        separable = separable and not changes.has_functions
        if self.skips_unread and separable and images.device.type == "cpu" and not torch.is_grad_enabled():
            portions = images.split(_PICTURES_PER_THREAD * torch.get_num_threads())
            return torch.cat([self._encode(portion, changes) for portion in portions])
        return self._encode(images, changes)

    def states(
        self,
        images: Tensor,
        prompts: VisualPrompts | None = None,
        *,
        weights: Weights | None = None,
        actions: Mapping[int, LayerAction] | None = None,
        values: bool = False,
    ) -> ImageStates:
        """Return the tokens of images (B, 3, S, S) as they leave the last layer, before ``norm`` and ``project``.

        Args:
            images: pictures.
            prompts: as in ``forward``.
            weights: as in ``forward``.
            actions: as in ``forward``.
            values: leave attention between tokens out of the last layer, except for the class token.

        Raises:
            ConfigError: the tower is no vision transformer of CLIP's own.
        """
        self._require_transformer()
        changes = self._changes(prompts, weights, actions)
        x = self._run(images, changes, "values" if values else "all")
        count = self.visual.positional_embedding.shape[0]
        return ImageStates(x[:, 0], x[:, 1:count], x[:, count:])

    def norm(self, x: Tensor, weights: Weights | None = None) -> Tensor:
        """Apply the final layer norm to states (..., W) of ``states``."""
        return run_changed(self, merged(self, weights or {}), lambda tower, states: tower.visual.ln_post(states), x)

    def project(self, x: Tensor, weights: Weights | None = None) -> Tensor:
        """Map normed states (..., W) into the joint space (..., D)."""
        projection = merged(self, weights or {}).get("visual.proj", self.visual.proj)
        return x if projection is None else x @ projection

    def _changes(
        self, prompts: VisualPrompts | None, weights: Weights | None, actions: Mapping[int, LayerAction] | None
    ) -> Changes:
        changes = Changes(prompts or {}, weights or {}, actions or {}, "visual.transformer.resblocks.")
        if prompts or actions:
            self._require_transformer()
        if prompts or weights or actions:
            changes.check(self, self.depth if prompts or actions else 0, "image")
        return changes

    def _whole(self, images: Tensor, changes: Changes) -> Tensor:
        """Run a tower as its makers wrote it, with changed weights."""
        with beside(self, changes.weights):
            features = run_changed(self, merged(self, changes.weights), lambda tower, images: tower.visual(images), images)
        return features[0] if isinstance(features, tuple) else features

    def _encode(self, images: Tensor, changes: Changes) -> Tensor:
        x = self._run(images, changes, "first" if self.skips_unread else "all")
        return run_changed(self, merged(self, changes.outside), _pooled, x)

    def _encode_tokens(self, images: Tensor, changes: Changes, tokens: Literal["patches", "values"]) -> tuple[Tensor, Tensor]:
        if isinstance(self.visual, ModifiedResNet):
            with beside(self, changes.weights):
                return run_changed(
                    self, merged(self, changes.weights), partial(_resnet_tokens, values=tokens == "values"), images
                )
        if not self.takes_prompts or self.visual.attn_pool is not None:
            raise ConfigError(
                f"MODEL.BACKBONE.NAME: the image tower {type(self.visual).__name__} gives no patch features in the joint space; "
                "choose a CLIP ViT or ResNet such as ViT-B/16 or RN50"
            )
        x = self._run(images, changes, "values" if tokens == "values" else "all")
        patches = x[:, 1 : self.visual.positional_embedding.shape[0]]
        pooled = run_changed(self, merged(self, changes.outside), _pooled, x)
        return pooled, self.project(self.norm(patches, changes.outside), changes.outside)

    def _run(self, images: Tensor, changes: Changes, last: Literal["first", "all", "values"]) -> Tensor:
        """Return the tokens (B, L, W) that leave the last layer: the class token alone, all, or all without attention there."""
        x = run_changed(self, merged(self, changes.outside), partial(_embedded, step=changes.steps.get(0)), images)
        end = self.depth - 1
        for i, block in enumerate(self.visual.transformer.resblocks):
            x = _apply(x, changes.steps.get(i)) if i else x
            own, only_first = changes.at(i), i == end and last == "first"
            if i == end and last == "values":
                x = values_layer(block, x, own)
            elif own is not None:  # functions are not compiled
                x = (first_token_layer if only_first else layer)(block, x, own)
            elif not self.skips_unread:
                x = block(x)
            else:
                x = (self._last_layer if only_first else self._layer)(block, x)
        return x


@dataclass(frozen=True)
class ImageStates:
    """Tokens of B images of width W.

    Attributes:
        first: the class token (B, W).
        patches: (B, M, W), row after row of the grid.
        prompts: (B, n, W), the prompt tokens behind them.
    """

    first: Tensor
    patches: Tensor
    prompts: Tensor


def _embedded(tower: ImageTower, images: Tensor, step: PromptStep | None) -> Tensor:
    """Return the tokens (B, L, W) that enter the first layer."""
    visual = tower.visual
    x = visual.conv1(images).flatten(2).transpose(1, 2)
    first = visual.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)
    x = torch.cat([first, x], dim=1) + visual.positional_embedding.to(x.dtype)
    out: Tensor = visual.ln_pre(_apply(x, step))
    return out


def _pooled(tower: ImageTower, x: Tensor) -> Tensor:
    """Return the image features (B, D) of the last layer's tokens, read as open_clip reads them."""
    visual = tower.visual
    pooled, _ = visual._pool(x)
    out: Tensor = pooled if visual.proj is None else pooled @ visual.proj
    return out


def _resnet_tokens(tower: ImageTower, images: Tensor, values: bool) -> tuple[Tensor, Tensor]:
    """Image features (B, D) and those of the H * W places (B, M, D) of CLIP's ResNet, through its attention pool."""
    visual = tower.visual
    x = visual.stem(images)
    for stage in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
        x = stage(x)
    pool = visual.attnpool
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + pool.positional_embedding.to(x.dtype)
    key, value = pool.k_proj(x), pool.v_proj(x)
    query = pool.q_proj(x[:, :1] if values else x)
    mixed = attention(query, key, value, pool.num_heads)
    out = pool.c_proj(torch.cat([mixed, value[:, 1:]], dim=1) if values else mixed)
    return out[:, 0], out[:, 1:]


def _apply(x: Tensor, step: PromptStep | None) -> Tensor:
    if step is None:
        return x
    end = x.shape[1] - step.remove
    kept, new = x[:, :end], step.tokens
    if new is not None and not isinstance(new, Tensor):
        new = new(x[:, end:])
    if new is None:
        return kept
    new = new.to(x.dtype)
    return torch.cat([kept, new if new.dim() == 3 else new.expand(x.shape[0], -1, -1)], dim=1)
