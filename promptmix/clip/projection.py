"""The last linear map of an image tower: features before it, and the map itself, for every tower that ends with one."""

from __future__ import annotations

from typing import Any

import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from torch.func import functional_call

from promptmix.clip.vision import ImageTower, VisualPrompts
from promptmix.errors import ConfigError


def last_map(tower: ImageTower) -> tuple[Tensor, Tensor | None]:
    """Return the tower's last linear map ``x @ weight + bias`` into the joint space: its weight (W, D) and its bias (D,), if any.

    Raises:
        ConfigError: the tower does not end with one linear map.
    """
    name, bias = _names(tower)
    weight = tower.get_parameter(name)
    return weight.T if name.endswith(".weight") else weight, None if bias is None else tower.get_parameter(bias)


def map_last(tower: ImageTower, x: Tensor) -> Tensor:
    """Return features (..., D) of what the tower's last linear map takes (..., W); raises as ``last_map`` does."""
    weight, bias = last_map(tower)
    projected = x @ weight.to(x.dtype)
    return projected if bias is None else projected + bias.to(x.dtype)


def unprojected(tower: ImageTower, images: Tensor, *prompts: VisualPrompts, **asked: Any) -> Any:
    """Return the features (B, W) of images (B, 3, S, S) that the tower's last linear map takes: those of the map x = x.

    Prompts and keywords are those of ``ImageTower.forward``; with ``tokens``, those of the patches (B, M, W) come behind.

    Raises:
        ConfigError: the tower does not end with one linear map.
    """
    (name, bias), (weight, _) = _names(tower), last_map(tower)
    swapped = {name: torch.eye(weight.shape[0], dtype=weight.dtype, device=weight.device)}
    if bias is not None:
        swapped[bias] = torch.zeros_like(weight[:, 0])
    return functional_call(tower, swapped, (images, *prompts), asked)


def _names(tower: ImageTower) -> tuple[str, str | None]:
    """Return the names of the map's weight and bias in the tower."""
    visual = tower.visual
    if type(visual) is VisionTransformer and visual.proj is not None:
        return "visual.proj", None
    name = ""
    if isinstance(visual, ModifiedResNet):
        name, linear = "visual.attnpool.c_proj", visual.attnpool.c_proj
    elif isinstance(visual, TimmModel):
        name, linear = "visual.head.proj", getattr(visual.head, "proj", None)
    if name and isinstance(linear, nn.Linear):
        return f"{name}.weight", None if linear.bias is None else f"{name}.bias"
    raise ConfigError(
        f"MODEL.BACKBONE.NAME: the image tower {type(visual).__name__} does not end with a linear map; "
        "choose a CLIP ViT or ResNet such as ViT-B/16 or RN50, or an embedded backbone"
    )
