"""Registers the embedded backbones and CoOp's names; other open_clip names are found by ``load_clip`` itself."""

from __future__ import annotations

from promptmix.clip.load import COOP_NAMES, EMBEDDED_NAMES, load_embedded, load_open_clip
from promptmix.hookspecs import hookimpl
from promptmix.registry import Registry


@hookimpl
def register_backbones(registry: Registry) -> None:
    """Add ``tiny-en``, ``tiny-vit`` and CoOp's names."""
    for name in EMBEDDED_NAMES:
        registry.register(load_embedded, name=name)
    for name in COOP_NAMES:
        registry.register(load_open_clip, name=name)
