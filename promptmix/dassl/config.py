"""``dassl.config``: the default tree and its clean-up."""

from __future__ import annotations

from typing import Any

from yacs.config import CfgNode

from promptmix import config
from promptmix.dassl.importing import lacking
from promptmix.plugin_manager import get_plugin_manager

__all__ = ["clean_cfg", "get_cfg_default"]


def get_cfg_default() -> CfgNode:
    """Return Dassl's default tree with promptmix's own keys, for the engine and for plugins; no trainer has a node in it."""
    cfg = config.get_cfg_default()
    get_plugin_manager().hook.extend_config(cfg=cfg)
    return cfg


def clean_cfg(cfg: CfgNode, trainer: str) -> None:
    """Remove from ``cfg.TRAINER`` the nodes of all trainers but ``trainer``."""
    for key in list(cfg.TRAINER):
        if key not in ("NAME", trainer.upper()) and isinstance(cfg.TRAINER[key], CfgNode):
            del cfg.TRAINER[key]


def __getattr__(name: str) -> Any:
    if name in ("cfg_default", "_C"):  # a tree of one's own, which no other program changes
        return get_cfg_default()
    return lacking("dassl.config")(name)
