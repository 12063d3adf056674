"""Networks of the image tower that are not CLIP's vision transformer: timm's, and those that give a map of places (ResNet)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from typing_extensions import override

from promptmix.clip.blocks import ClipLayers, Layers, attention, enter_first
from promptmix.clip.places import PromptStep


def layers_of(visual: nn.Module) -> Layers | None:
    """Return the layers of a vision transformer of open_clip's or timm's; None for every other network."""
    if type(visual) is VisionTransformer and hasattr(visual.transformer, "resblocks"):
        return ClipLayers(visual)
    if isinstance(visual, TimmModel):
        from timm.models.eva import Eva
        from timm.models.vision_transformer import VisionTransformer as TimmTransformer

        if type(visual.trunk) in (Eva, TimmTransformer):
            return TimmLayers(visual)
    return None


#: What a layer of OpenAI's layout calls its parts, and what timm calls them.
_TIMM_NAMES = {
    "ln_1.": "norm1.",
    "ln_2.": "norm2.",
    "attn.in_proj_": "attn.qkv.",
    "attn.out_proj.": "attn.proj.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}


class TimmLayers(Layers):
    """A vision transformer of timm: SigLIP's, EVA's, ViTamin's, Perception Encoder's."""

    prefix = "visual.trunk.blocks."

    def __init__(self, visual: TimmModel) -> None:
        self.visual, self.trunk = visual, visual.trunk
        self.blocks = self.trunk.blocks
        self.width = self.trunk.embed_dim
        self.leading = self.trunk.num_prefix_tokens
        self.patches = self.trunk.patch_embed.num_patches
        self.reads_first = self.trunk.attn_pool is None and self.trunk.global_pool == "token"

    @override
    def embed(self, images: Tensor, step: PromptStep | None) -> tuple[Tensor, Tensor | None]:
        trunk, about = self.trunk, None
        x = trunk._pos_embed(trunk.patch_embed(images))
        if isinstance(x, tuple):
            x, about = x
        if getattr(trunk, "patch_drop", None) is not None:
            x = trunk.patch_drop(x)
        return enter_first(trunk.norm_pre, x, step), about

    @override
    def given(self, layer: int, x: Tensor, about: Tensor | None) -> Mapping[str, Tensor]:
        """Rotations of the patches, and none for the prompts behind them."""
        if about is None:
            return {}
        about = about[layer] if getattr(self.trunk, "rope_mixed", False) else about
        more = x.shape[1] - self.leading - about.shape[-2]
        if more:
            sin, cos = about.new_zeros(2, *about.shape[:-2], more, about.shape[-1] // 2).unbind()
            about = torch.cat([about, torch.cat([sin, cos + 1], dim=-1)], dim=-2)
        return {"rope": about}

    @override
    def first_norm(self, layer: int) -> nn.Module:
        norm: nn.Module = self.blocks[layer].norm1  # type: ignore[assignment]
        return norm

    @override
    def own_name(self, name: str) -> str:
        if not name.startswith(ClipLayers.prefix):
            return name
        layer, _, part = name.removeprefix(ClipLayers.prefix).partition(".")
        for openai, timms in _TIMM_NAMES.items():
            if part.startswith(openai):
                part = timms + part.removeprefix(openai)
        return f"{self.prefix}{layer}.{part}"

    @override
    def pooled(self, x: Tensor) -> Tensor:
        pooled: Tensor = self.visual.head(self.trunk.forward_head(self.trunk.norm(x)))
        return pooled

    @override
    def norm(self, x: Tensor) -> Tensor:
        normed: Tensor = self.trunk.norm(x)
        return normed

    @override
    def project(self, x: Tensor) -> Tensor:
        return _timm_project(self.visual, x)


def can_read_places(visual: nn.Module) -> bool:
    """Tell whether ``places_of`` knows the network."""
    return isinstance(visual, ModifiedResNet) or isinstance(visual, TimmModel) and not hasattr(visual.head, "pool")


def places_of(visual: Any, images: Tensor, *, values: bool) -> tuple[Tensor, Tensor]:
    """Image features (B, D) and those of the places of the last map (B, M, D), each as if it alone were the picture.

    Args:
        visual: CLIP's ResNet, or a network of timm that gives a map or tokens.
        images: (B, 3, S, S).
        values: for CLIP's ResNet: the places go through the pool's value and output projections alone, without their positions
            (GalLoP); otherwise each asks in it.
    """
    if isinstance(visual, ModifiedResNet):
        return _resnet_places(visual, images, values=values)
    trunk: Any = visual.trunk
    x = trunk.forward_features(images)
    features: Tensor = visual.head(trunk.forward_head(x))
    if x.dim() == 3:
        return features, _timm_project(visual, x[:, getattr(trunk, "num_prefix_tokens", 0) :])
    last = str(getattr(trunk, "output_fmt", "NCHW")).endswith("NHWC")
    rows = (x if last else x.permute(0, 2, 3, 1)).flatten(1, 2)  # (B, M, W)
    single = rows.reshape(-1, 1, 1, rows.shape[-1])
    single = single if last else single.permute(0, 3, 1, 2)
    places: Tensor = visual.head(trunk.forward_head(single))
    return features, places.unflatten(0, rows.shape[:2])


def _resnet_places(visual: Any, images: Tensor, *, values: bool) -> tuple[Tensor, Tensor]:
    x = visual.stem(images)
    for stage in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
        x = stage(x)
    pool = visual.attnpool
    places = x.flatten(2).transpose(1, 2)
    x = torch.cat([places.mean(dim=1, keepdim=True), places], dim=1) + pool.positional_embedding.to(x.dtype)
    mixed = attention(pool.q_proj(x[:, :1] if values else x), pool.k_proj(x), pool.v_proj(x), pool.num_heads)
    out = pool.c_proj(torch.cat([mixed, pool.v_proj(places)], dim=1) if values else mixed)
    return out[:, 0], out[:, 1:]


def _timm_project(visual: Any, x: Tensor) -> Tensor:
    trunk, shape = visual.trunk, x.shape[:-1]
    single = x.reshape(-1, 1, x.shape[-1])
    pool = getattr(trunk, "attn_pool", None)
    out = pool(single) if pool is not None else single[:, 0]
    projected: Tensor = visual.head(trunk.head(trunk.head_drop(trunk.fc_norm(out))))
    return projected.unflatten(0, shape)
