"""CLIP's image tower, with prompts per layer for vision transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, overload

import torch
from open_clip.modified_resnet import ModifiedResNet
from torch import Tensor, nn

from promptmix.clip.blocks import (
    ClipLayers,
    Layers,
    apply_step,
    attention,
    enter,
    finish,
    first_token_layer,
    fits_caches,
    frozen_layer,
    is_standard,
    layer,
    project_some,
    recalled,
)
from promptmix.clip.compose import cut, rows_of
from promptmix.clip.networks import can_read_places, layers_of, places_of
from promptmix.clip.places import Changes, LayerAction, LayerChanges, PromptStep, Weights, beside, merged, run_changed
from promptmix.errors import ConfigError
from promptmix.parallel import group

#: Pictures per CPU thread whose states between two layers of a ViT-B/16 stay in the caches; more at once are slower, not faster.
_PICTURES_PER_THREAD = 8

#: {layer: step}; layer 0 is the input, after the positional embedding and before ``ln_pre``.
VisualPrompts = Mapping[int, PromptStep]

#: Which tokens' features are read beside the image's; see ``ImageTower.forward``.
TokenKind = Literal["patches", "values", "values and prompts", "prompts"]


def are_pictures(batch: Tensor) -> bool:
    """Tell pictures (B, 3, height, width), or views of each (B, V, 3, height, width), from features (B, ...) of a cache."""
    return batch.dim() in (4, 5) and batch.shape[-3] == 3


def are_views(batch: Tensor) -> bool:
    """Tell several augmented views of each picture (V, B, 3, height, width) from pictures and features."""
    return batch.dim() == 5 and batch.shape[2] == 3


class ImageTower(nn.Module):
    """The frozen image tower of an open_clip model.

    Args:
        visual: ``model.visual``: a vision transformer, or any other tower, which then takes no prompts.
    """

    visual: Any  # open_clip's, which comes without types

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual
        self.layers = layers_of(visual)
        #: Whether what nobody reads in the last layer is left out, and a transformer's pictures go through in portions that fit a
        #: CPU's caches, as those of other networks always do; otherwise every layer is open_clip's.
        self.skips_unread = isinstance(self.layers, ClipLayers) and self.layers.reads_first
        self._layer, self._last_layer = frozen_layer, first_token_layer

    @property
    def takes_prompts(self) -> bool:
        """Whether the tower is a vision transformer whose layers can be prompted."""
        return self.layers is not None

    @property
    def width(self) -> int:
        """Token width W.

        Raises:
            ConfigError: the tower has no tokens (a ResNet or another convolutional network).
        """
        return self._transformer().width

    @property
    def patches(self) -> int:
        """Number of patches M; raises ``ConfigError`` as ``width`` does."""
        return self._transformer().patches

    def first_norm(self, layer: int) -> nn.Module:
        """Return the norm in front of the attention of ``layer``, counted from 0; raises ``ConfigError`` as ``width`` does."""
        return self._transformer().first_norm(layer)

    @property
    def depth(self) -> int:
        """Number of layers; raises ``ConfigError`` as ``width`` does."""
        return len(self._transformer().blocks)

    def compile_layers(self) -> None:
        """Run the layers, or the whole of another tower, through ``torch.compile`` from now on; names of weights stay."""
        if self.skips_unread:
            self._layer, self._last_layer = torch.compile(frozen_layer), torch.compile(first_token_layer)
        else:
            self.visual.compile()

    def _transformer(self) -> Layers:
        if self.layers is None:
            made = getattr(self.visual, "trunk", self.visual)
            raise ConfigError(
                f"MODEL.BACKBONE.NAME: the image tower {type(made).__name__} takes no visual prompts; "
                "choose a vision transformer such as ViT-B/16 or tiny-vit"
            )
        return self.layers

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
        tokens: TokenKind,
    ) -> tuple[Tensor, Tensor]: ...

    def forward(
        self,
        images: Tensor,
        prompts: VisualPrompts | None = None,
        *,
        weights: Weights | None = None,
        actions: Mapping[int, LayerAction] | None = None,
        tokens: TokenKind | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Encode images (B, 3, S, S), in one pass.

        Args:
            images: pictures.
            prompts: tokens before layers.
            weights: deltas by their names in this tower's state dict (``visual.transformer.resblocks.0.ln_1.weight``,
                ``visual.proj``); layers of timm's vision transformers go by OpenAI's names too.
            actions: functions at the joints of layers.
            tokens: "patches" gives the patches' own features too: as they leave the last layer (of CLIP's ResNet: each place asks
                in the attention pool; of other networks: the places of the last map), through norm and projection as if each
                alone were the picture; "values" those without attention in the last layer (of CLIP's ResNet: in the pool), as
                GalLoP reads them; "values and prompts" has the prompt tokens' behind (SurPL); "prompts"
                gives those of the prompt tokens alone, as they leave the last layer (MMRL).

        Returns:
            Image features (B, D), not normalised; with ``tokens`` also those of the patches (B, M, D), row after row of the grid,
            without class and (unless asked for) prompt tokens.

        Raises:
            ConfigError: prompts, actions or patches were asked of a tower that has none, or a name is unknown.
        """
        changes = self._changes(prompts, weights, actions)
        if not group.divides():
            return self._forward(images, changes, tokens)
        return group.shared(len(images), lambda part: self._forward(images[part], _some(changes, part), tokens))

    def _forward(self, images: Tensor, changes: Changes, tokens: TokenKind | None) -> Tensor | tuple[Tensor, Tensor]:
        if tokens is None and not self.skips_unread and (self.layers is None or not changes):
            features = [self._whole(part, changes) for part in self._portions(images)]
            return features[0] if len(features) == 1 else torch.cat(features)
        tokens_of = [step.tokens for step in changes.steps.values()]
        same_for_all = all(new is None or isinstance(new, Tensor) and new.dim() == 2 for new in tokens_of)
        separable = same_for_all and not changes.has_functions
        if self.skips_unread and separable and fits_caches(images):
            portions = self._portions(images)
            if tokens is None:
                return torch.cat([self._encode(portion, changes) for portion in portions])
            both = [self._encode_tokens(portion, changes, tokens) for portion in portions]
            return torch.cat([image for image, _ in both]), torch.cat([patches for _, patches in both])
        return self._encode(images, changes) if tokens is None else self._encode_tokens(images, changes, tokens)

    def _portions(self, images: Tensor) -> tuple[Tensor, ...]:
        """Pictures that go through together: those whose maps and tokens fit the caches, where no graph is wanted."""
        return images.split(_PICTURES_PER_THREAD * torch.get_num_threads()) if fits_caches(images) else (images,)

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
            ConfigError: the tower is not a vision transformer that is read at its class token.
        """
        layers = self._transformer()
        if not layers.reads_first:
            raise ConfigError(
                f"MODEL.BACKBONE.NAME: the image tower {type(self.visual).__name__} is not read at its class token, so it has no "
                "states before the projection; choose a vision transformer such as ViT-B/16"
            )
        changes = self._changes(prompts, weights, actions)
        last: Literal["values", "all"] = "values" if values else "all"
        if group.divides():
            x = group.shared(len(images), lambda part: self._run(images[part], _some(changes, part), last))
        else:
            x = self._run(images, changes, last)
        count = layers.leading + layers.patches
        return ImageStates(x[:, 0], x[:, layers.leading : count], x[:, count:])

    def norm(self, x: Tensor, weights: Weights | None = None) -> Tensor:
        """Apply the final layer norm to states (..., W) of ``states``."""
        return run_changed(self, merged(self, weights or {}), lambda tower, states: tower._transformer().norm(states), x)

    def project(self, x: Tensor, weights: Weights | None = None) -> Tensor:
        """Map normed states (..., W) into the joint space (..., D)."""
        return run_changed(self, merged(self, weights or {}), lambda tower, states: tower._transformer().project(states), x)

    def _changes(
        self, prompts: VisualPrompts | None, weights: Weights | None, actions: Mapping[int, LayerAction] | None
    ) -> Changes:
        prefix = "" if self.layers is None else self.layers.prefix
        if weights and self.layers is not None:
            weights = {self.layers.own_name(name): delta for name, delta in weights.items()}
        changes = Changes(prompts or {}, weights or {}, actions or {}, prefix)
        if prompts or weights or actions:
            changes.check(self, self.depth if prompts or actions else 0, "image")
        return changes

    def _whole(self, images: Tensor, changes: Changes) -> Tensor:
        """Run a tower as its makers wrote it, with changed weights."""
        with beside(self, changes.weights):
            features = run_changed(self, merged(self, changes.weights), lambda tower, images: tower.visual(images), images)
        return features[0] if isinstance(features, tuple) else features

    def _encode(self, images: Tensor, changes: Changes) -> Tensor:
        return self._pooled(self._run(images, changes, "first" if self.skips_unread else "all"), changes)

    def _pooled(self, x: Tensor, changes: Changes) -> Tensor:
        return run_changed(self, merged(self, changes.outside), lambda tower, x: tower._transformer().pooled(x), x)

    def _encode_tokens(self, images: Tensor, changes: Changes, tokens: TokenKind) -> tuple[Tensor, Tensor]:
        layers = self.layers
        if layers is None and can_read_places(self.visual):
            if tokens != "patches" and not isinstance(self.visual, ModifiedResNet):
                raise ConfigError(
                    f"MODEL.BACKBONE.NAME: the image tower {type(self.visual).__name__} has no last-block values; ask for "
                    "patches, or choose a CLIP ViT or ResNet such as ViT-B/16 or RN50"
                )
            read = partial(places_of, values=tokens != "patches")
            with beside(self, changes.weights):
                changed = merged(self, changes.weights)
                return run_changed(self, changed, lambda tower, images: read(tower.visual, images), images)
        if layers is None:
            raise ConfigError(
                f"MODEL.BACKBONE.NAME: the image tower {type(self.visual).__name__} gives no patch features in the joint space; "
                "choose a CLIP ViT or ResNet such as ViT-B/16 or RN50"
            )
        x = self._run(images, changes, "all" if tokens in ("patches", "prompts") else "values")
        last = layers.leading + layers.patches
        spans = {"values and prompts": slice(layers.leading, None), "prompts": slice(last, None)}
        patches = self.norm(x[:, spans.get(tokens, slice(layers.leading, last))], changes.outside)
        return self._pooled(x, changes), self.project(patches, changes.outside)

    def _run(self, images: Tensor, changes: Changes, last: Literal["first", "all", "values"]) -> Tensor:
        """Return the tokens (B, L, W) that leave the last layer: the class token alone, all, or all without attention there."""
        layers, step = self._transformer(), changes.steps.get(0)
        x, about = run_changed(
            self, merged(self, changes.outside), lambda tower, images: tower._transformer().embed(images, step), images
        )
        end, length = len(layers.blocks) - 1, x.shape[1]
        for i, block in enumerate(layers.blocks):
            own, reads_all = changes.at(i), i < end or last == "all"
            as_rows = own is None and self.skips_unread and reads_all
            if x.dim() == 2 and (i in changes.steps or not as_rows):
                x = x.view(-1, length, x.shape[-1])
            if i in changes.steps and i:
                x = apply_step(x, changes.steps[i])
                length = x.shape[1]
            if as_rows:  # functions are not compiled
                x = self._layer(block, x.flatten(0, -2), length)
                continue
            given = layers.given(i, x, about)
            if not reads_all and last == "values":
                x = _values_layer(block, x, own)
            elif own is not None:
                x = layer(block, x, own, given=given) if reads_all else first_token_layer(block, x, own)
            else:
                x = block(x, **given) if reads_all else self._last_layer(block, x)
        return x if x.dim() == 3 else x.view(-1, length, x.shape[-1])


def _values_layer(block: nn.Module, x: Tensor, own: LayerChanges | None = None) -> Tensor:
    """``layer`` where only the first token asks and each other token sees itself alone (last-block values of GalLoP, SurPL).

    Raises:
        ConfigError: the block is not open_clip's, or an action there does not change each token on its own.
    """
    if not is_standard(block) or not (own is None or own.action is None or own.action.alone):
        raise ConfigError(
            f"last-block values need a CLIP layer at the end that no action looks across, not {type(block).__name__}; "
            "choose a backbone such as ViT-B/16, or patches instead of values"
        )
    x, normed = enter(block, x, own)
    query, key, value = project_some(block, normed[:, :1], normed, own)
    first = attention(query, key, value, block.attn.num_heads, memory=recalled(block, own))
    return finish(block, x, torch.cat([first, value[:, 1:]], dim=1), own)


def _some(changes: Changes, part: slice) -> Changes:
    """Return the changes for a part of the pictures."""
    return cut(changes, partial(rows_of, part=part, dims=(3,), dim=0))


def prompts_of(prompts: VisualPrompts, rows: Tensor) -> VisualPrompts:
    """Return the prompts of some images: tokens that differ from image to image (B, n, W) are cut to these rows."""
    return {
        i: replace(step, tokens=step.tokens[rows]) if isinstance(step.tokens, Tensor) and step.tokens.dim() == 3 else step
        for i, step in prompts.items()
    }


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
