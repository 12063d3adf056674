"""Config names that stand for a file with a number or a word changed: ``trainers/_names.yaml`` says what for, in one place."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from promptmix.config.yamlfile import read_yaml

__all__ = ["named_configs", "named_tree"]

FILE = "_names.yaml"


def named_tree(path: Path) -> dict[str, Any] | None:
    """Return the tree that stands for ``path`` where no file is there, or None.

    Args:
        path: ``<folder>/<method>/<name>.yaml``; the table lies in ``<folder>`` and has an entry ``<method>/<name>``.
    """
    if path.suffix != ".yaml" or path.is_file():
        return None
    tree = _table(path.parent.parent / FILE).get(f"{path.parent.name}/{path.stem}")
    return None if tree is None else dict(tree)


def named_configs(configs: Path) -> Iterable[str]:
    """Return the names below a folder of configs, as paths relative to it."""
    for table in configs.rglob(FILE):
        above = table.parent.relative_to(configs)
        yield from ((above / f"{name}.yaml").as_posix() for name in _table(table))


@lru_cache(maxsize=8)
def _table(path: Path) -> dict[str, dict[str, Any]]:
    if not path.is_file():
        return {}
    tree = read_yaml(path)
    return tree if isinstance(tree, dict) else {}
