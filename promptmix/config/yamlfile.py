"""Reading YAML that somebody wrote by hand, or in order to do harm: one line says what is wrong with it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from promptmix.errors import ConfigError

#: No config comes near these; a file beyond them is another file, or built to fill the memory.
_MOST_BYTES = 4 * 2**20
_MOST_NODES = 200_000


#: What YAML 1.1 takes for a number to the base 8 or 60, and nobody means: 010, 1:30.
_OLD_NUMBER = re.compile(r"[-+]?(0[0-7_]+|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)")


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which refuses what that takes in silence: a key that appears twice, of which it keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.tag != "tag:yaml.org,2002:merge":
                if key_node.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key {key_node.value!r} appears twice; keep one of them", key_node.start_mark
                    )
                seen.add(key_node.value)
        tree: dict[Any, Any] = super().construct_mapping(node, deep)
        return tree

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float") and _OLD_NUMBER.fullmatch(str(node.value)):
            other = "to the base 60" if ":" in node.value else "to the base 8"
            problem = f"{node.value} is a number {other} in YAML; write it as usual, or in quotes where it is text"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return super().construct_object(node, deep)


def read_yaml(path: str | Path, what: str = "config file") -> Any:  # whatever the file holds
    """Return what a YAML file holds, as plain values.

    Args:
        path: the file.
        what: what it is, for messages.

    Raises:
        ConfigError: the file is missing, too large, no YAML, or has a key twice.
    """
    file = Path(path)
    try:
        if file.exists() and not file.is_file():  # a named pipe would be waited for
            raise ConfigError(f"{what} {path} is not a file; name a YAML file")
        size = file.stat().st_size
        if size > _MOST_BYTES:
            raise ConfigError(f"{what} {path} has {size:,} bytes, which no config has; check the path")
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what} {path} is not valid YAML: {error}; save it as UTF-8") from error
    except (OSError, ValueError) as error:  # ValueError: NUL in the path
        raise ConfigError(f"{what} {path}: {getattr(error, 'strerror', None) or error}; check the path") from error
    return parse_yaml(text, f"{what} {path}")


def parse_yaml(text: str, where: str) -> Any:
    """Return what YAML text holds, as plain values.

    Args:
        text: the text.
        where: what it is and where it comes from, for messages.

    Raises:
        ConfigError: it is not YAML, has a key twice, or refers to itself.
    """
    try:
        loader = _Loader(text)
        try:
            root = loader.get_single_node()
            if root is None:
                return None
            _weigh(root, where)
            return loader.construct_document(root)
        finally:
            loader.dispose()
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError, TypeError, AttributeError) as error:  # ValueError: a date or number that is none
        raise ConfigError(f"{where} is not valid YAML: {' '.join(str(error).split())}; fix it") from error
    except RecursionError as error:
        raise ConfigError(f"{where} is nested too deep; write fewer levels") from error


def _weigh(root: yaml.Node, where: str) -> None:
    """Refuse anchors that make a small file large, or endless.

    Raises:
        ConfigError: they do.
    """
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: yaml.Node) -> int:
        if id(node) in open_nodes:
            raise ConfigError(f"{where}: an anchor (&name) holds itself (*name); write the value out")
        if id(node) not in sizes:
            open_nodes.add(id(node))
            parts: list[yaml.Node] = []
            if isinstance(node, yaml.MappingNode):
                parts = [part for pair in node.value for part in pair]
            elif isinstance(node, yaml.SequenceNode):
                parts = node.value
            sizes[id(node)] = 1 + sum(size(part) for part in parts)
            open_nodes.discard(id(node))
        return sizes[id(node)]

    if size(root) > _MOST_NODES:
        raise ConfigError(f"{where} stands for more than {_MOST_NODES:,} values, which no config has; write it without anchors")
