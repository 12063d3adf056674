"""Registers the embedded backbones and CoOp's names; other open_clip names are found by ``load_clip`` itself."""

from __future__ import annotations

import open_clip
from yacs.config import CfgNode

from promptmix.clip.load import COOP_NAMES, EMBEDDED_NAMES, load_embedded, load_open_clip
from promptmix.errors import ConfigError
from promptmix.hookspecs import hookimpl
from promptmix.registry import BACKBONE_REGISTRY, Registry, closest, is_prompt_trainer


@hookimpl
def register_backbones(registry: Registry) -> None:
    """Add ``tiny-en``, ``tiny-vit`` and CoOp's names."""
    for name in EMBEDDED_NAMES:
        registry.register(load_embedded, name=name)
    for name in COOP_NAMES:
        registry.register(load_open_clip, name=name)


@hookimpl
def validate_config(cfg: CfgNode) -> None:
    """Refuse a backbone that a prompt trainer can't load, and a tag that its weights don't have."""
    node = cfg.MODEL.BACKBONE
    name = COOP_NAMES.get(node.NAME, node.NAME)
    if node.NAME not in BACKBONE_REGISTRY and name not in open_clip.list_models():
        if node.NAME and is_prompt_trainer(cfg.TRAINER.NAME):  # others bring networks of their own
            BACKBONE_REGISTRY.get(node.NAME)
        return
    if node.TOKENIZER and name not in open_clip.list_models():
        raise ConfigError(f"MODEL.BACKBONE.TOKENIZER is {node.TOKENIZER!r}, but {node.NAME} has its own; leave the key out")
    if not node.TAG:
        return
    if name not in open_clip.list_models():
        raise ConfigError(f"MODEL.BACKBONE.TAG is {node.TAG!r}, but {node.NAME} has one set of weights; leave the key out")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if node.TAG not in tags:
        raise ConfigError(
            f"MODEL.BACKBONE.TAG is {node.TAG!r}, which is not a pretrained tag of {name}{closest(node.TAG, tags)} "
            f"(choices: {', '.join(tags) or 'none'})"
        )
