"""Logger plugins: where the numbers of a run go besides ``log.txt``; each has a node below ``LOGGER`` with its switch."""

from __future__ import annotations

from yacs.config import CfgNode


def is_on(cfg: CfgNode, name: str, default: bool = False) -> bool:
    """Tell whether ``LOGGER.<name>.ENABLED`` is True; ``default`` where the tree, of another program, has no such key."""
    return bool(cfg.get("LOGGER", {}).get(name, {}).get("ENABLED", default))
