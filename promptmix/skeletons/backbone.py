"""A backbone for promptmix."""

from __future__ import annotations

import open_clip

from promptmix import hookimpl
from promptmix.clip import CLIP, Tokenizer
from promptmix.config import CfgNode
from promptmix.registry import Registry

WIDTH, SIDE = 64, 32


def MyPart(cfg: CfgNode) -> CLIP:
    """Return a small CLIP with random weights: build your towers here, and load their weights.

    Args:
        cfg: the whole tree, for keys of ``MODEL.BACKBONE``.
    """
    model = open_clip.CLIP(
        embed_dim=WIDTH,
        vision_cfg={"layers": 2, "width": WIDTH, "head_width": 32, "patch_size": 16, "image_size": SIDE},
        text_cfg={"context_length": 77, "vocab_size": 49408, "width": WIDTH, "heads": 2, "layers": 2},
    )
    return CLIP(model, Tokenizer(), "MyPart", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), image_size=SIDE)


@hookimpl
def register_backbones(registry: Registry) -> None:
    registry.register(MyPart)
