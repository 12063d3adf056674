"""Which values the fields of a run's record may have: checked once, where it is read, so that nothing fails far from there."""

from __future__ import annotations

import json
import math
import types
import typing
from typing import Any

__all__ = ["check_fields"]

#: What stands in ``vocabulary``, and in ``checkpoint`` where there is one.
_VOCABULARY: dict[str, Any] = {
    "classnames": list[str],
    "all_classnames": list[str],
    "templates": list[str],
    "template_groups": list[list[str]],
}
_CHECKPOINT: dict[str, Any] = {"directory": str, "epoch": int | None}
#: Nodes of the config that are read without its declarations.
_NODES = ("TRAINER", "DATASET", "INPUT", "OPTIM", "MODEL", "MODEL.BACKBONE")
_MOST = 2**63


def check_fields(result: Any) -> None:  # a RunResult, whose module reads with this one
    """Refuse values of another kind than ours.

    Args:
        result: a record as it was read; its annotations say what its fields are.

    Raises:
        TypeError: there is one; the message names the field.
    """
    for name, hint in typing.get_type_hints(type(result)).items():
        _refuse(name, getattr(result, name), hint)
    for name, hint in _VOCABULARY.items():
        if name in result.vocabulary:
            _refuse(f"vocabulary.{name}", result.vocabulary[name], hint)
    json.dumps(result.vocabulary, ensure_ascii=False).encode()  # a half of a character is not a word
    if result.checkpoint is not None:
        for name, hint in _CHECKPOINT.items():
            _refuse(f"checkpoint.{name}", result.checkpoint.get(name), hint)
    for path in _NODES:
        node: Any = result.config
        for part in path.split("."):
            node = node.get(part, {})
            _refuse(f"config.{path}", node, dict[str, Any])


def _refuse(name: str, value: object, hint: Any) -> None:  # a type
    if not _fits(value, hint):
        words = getattr(hint, "__name__", str(hint)) if typing.get_origin(hint) is None else str(hint)
        text = repr(value)
        raise TypeError(f"{name} is {text if len(text) <= 60 else f'{text[:57]}...'}, not {words.replace('typing.', '')}")


def _fits(value: object, hint: Any) -> bool:
    """Tell whether a value of JSON is what a type hint of plain values says; numbers are finite and of 64 bits."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, inner[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(key, inner[0]) and _fits(item, inner[1]) for key, item in value.items())
    if hint is float:
        return type(value) in (int, float) and math.isfinite(typing.cast(float, value))
    if hint is int:
        return type(value) is int and abs(value) < _MOST
    if hint is str:
        return isinstance(value, str) and "\0" not in value
    return hint is Any or value is None and hint is type(None)
