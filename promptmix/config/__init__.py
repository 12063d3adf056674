"""The config tree: Dassl's keys and defaults, ours beside them, and merging that refuses what it doesn't understand."""

from yacs.config import CfgNode

from promptmix.config.tree import (
    check_values,
    get_cfg,
    get_cfg_default,
    get_key,
    merge_file,
    merge_opts,
    merge_tree,
    refuse_lone,
    reset,
    source_of,
    sources,
    validate,
)

__all__ = [
    "CfgNode",
    "check_values",
    "get_cfg",
    "get_cfg_default",
    "get_key",
    "merge_file",
    "merge_opts",
    "merge_tree",
    "refuse_lone",
    "reset",
    "source_of",
    "sources",
    "validate",
]
