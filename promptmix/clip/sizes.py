"""Whether pictures of ``INPUT.SIZE`` fit the backbone, known before its weights are loaded where its config says so."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import open_clip
import torch

from promptmix.clip.load import COOP_NAMES, EMBEDDED_NAMES
from promptmix.clip.model import CLIP
from promptmix.errors import ConfigError
from promptmix.utils import get_logger

if TYPE_CHECKING:
    from yacs.config import CfgNode

__all__ = ["check_size", "check_takes", "warn_of_other_input"]


def check_size(cfg: CfgNode) -> None:
    """Refuse ``INPUT.SIZE`` where the backbone's config says that it takes another.

    CLIP's own vision transformers and ResNets have a position for each patch; what else there is shows in ``check_takes``.

    Raises:
        ConfigError: it does.
    """
    node = cfg.MODEL.BACKBONE
    vision: Any = None
    if node.NAME in EMBEDDED_NAMES:
        from promptmix.assets import asset_path

        vision = json.loads(asset_path(f"models/{node.NAME}.json").read_text(encoding="utf-8"))["model_cfg"]["vision_cfg"]
    elif not node.WEIGHTS:  # a file may hold a smaller relative of the model
        vision = (open_clip.get_model_config(COOP_NAMES.get(node.NAME, node.NAME)) or {}).get("vision_cfg")
    if not vision or vision.get("timm_model_name"):
        return
    size = vision.get("image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    if tuple(cfg.INPUT.SIZE) != (height, width):
        raise _refusal(cfg.INPUT.SIZE, node.NAME, (height, width))


def check_takes(clip: CLIP, size: tuple[int, int]) -> None:
    """Refuse ``INPUT.SIZE`` where the loaded backbone can't encode pictures of it.

    Args:
        clip: the frozen model; nothing is computed where ``size`` is its own.
        size: height and width in pixels.

    Raises:
        ConfigError: it can't.
    """
    wanted = (clip.image_size, clip.image_size)
    if tuple(size) == wanted:
        return
    device = next(clip.parameters()).device
    try:
        with torch.no_grad():
            clip.encode_image(torch.zeros(1, 3, *size, device=device))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise _refusal(size, clip.name, wanted) from error


def _refusal(size: tuple[int, int], name: str, wanted: tuple[int, int]) -> ConfigError:
    return ConfigError(
        f"INPUT.SIZE is {tuple(size)}, but backbone {name} takes pictures of {wanted} only; "
        f'set INPUT.SIZE "{wanted}" or choose another MODEL.BACKBONE.NAME'
    )


def warn_of_other_input(cfg: CfgNode, clip: CLIP) -> None:
    """Warn where pictures reach the model otherwise than it was trained: it still runs, but worse than it could."""
    wanted = {
        "INPUT.SIZE": (cfg.INPUT.SIZE, (clip.image_size,) * 2),
        "INPUT.PIXEL_MEAN": (cfg.INPUT.PIXEL_MEAN, clip.mean),
        "INPUT.PIXEL_STD": (cfg.INPUT.PIXEL_STD, clip.std),
    }
    for key, (given, expected) in wanted.items():
        if max(abs(a - b) for a, b in zip(given, expected, strict=True)) > 1e-3:
            shown = [round(number, 8) for number in expected]
            get_logger().warning("%s is %s, but backbone %s was trained with %s", key, list(given), clip.name, shown)
