"""Names and keys of the authors' code, so that the commands of their scripts run here: each method's file declares its own.

A trainer says ``published_as = ("TheirName",)`` and ``published_keys = {"TRAINER.THEIRS.DIM": "DIM"}``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from yacs.config import CfgNode

from promptmix.errors import ConfigError
from promptmix.registry import TRAINER_REGISTRY

__all__ = ["Theirs", "expect", "flags_of", "translated"]

_EXPECTED = "_expected"


@dataclass(frozen=True)
class Theirs:
    """A key or flag of the authors' code whose values are not simply those of a key here.

    Attributes:
        key: key here, of the method's node where it has no dot; "" = there is none.
        values: their values, as they are typed, and what each is here. Where there is no key, these change nothing and pass.
        instead: what to do about another value, where there is no key; "" = their code doesn't read it either, and any passes.
            With a key: what to do where several of theirs are this key and differ.
    """

    key: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)
    instead: str = ""


def flags_of(trainer: str) -> set[str]:
    """Return the flags of the authors' program that ``trainer`` declares; nothing of an unknown one."""
    return {key for key in _declared(trainer) if key.startswith("--")}


def expect(cfg: CfgNode, trainer: str) -> None:
    """Remember which trainer the tree is for, whatever its files name."""
    cfg.__dict__[_EXPECTED] = trainer


def translated(cfg: CfgNode, pairs: Iterable[tuple[str, Any]], source: str) -> Iterator[tuple[str, Any]]:
    """Yield (key, value) pairs of one source with the chosen trainer's keys in the place of those of its authors' code.

    Args:
        cfg: the tree that they are merged into, which may name the trainer.
        pairs: dotted keys, as they were written.
        source: where they come from, for messages.

    Raises:
        ConfigError: a value that can't be had here, or two keys that are one here and differ.
    """
    pairs = [(str(key), value) for key, value in pairs]
    named = [value for key, value in pairs if key == "TRAINER.NAME"]
    name = TRAINER_REGISTRY.own_name(str(cfg.__dict__.get(_EXPECTED) or (named or [cfg.TRAINER.NAME])[-1]))
    own, declared = f"TRAINER.{name.upper()}", _declared(name)
    others = {_node(key) for key in declared} - {name.upper()}
    if any(_node(key) in cfg.TRAINER and _node(key) not in others for key, _ in pairs):
        # With nodes of this or more methods, as our quick start has them, the source tells methods apart as we do.
        declared = {key: theirs for key, theirs in declared.items() if _node(key) not in others & {*cfg.TRAINER}}
    found: dict[str, tuple[str, Any]] = {}
    for key, value in pairs:
        if key == "TRAINER.NAME":
            yield key, TRAINER_REGISTRY.own_name(value) if isinstance(value, str) else value
            continue
        theirs = declared.get(key)
        if theirs is None:
            yield _of_node(cfg, key, own, declared), value
            continue
        here, meant = theirs.key, theirs.values.get(str(value), value)
        if not here:
            if theirs.instead and str(value) not in theirs.values:
                raise ConfigError(f"{source}: {key} is {str(value)[:100]!r}, which {name} does not have; {theirs.instead}")
            continue
        here = here if "." in here else f"{own}.{here}"
        before, other = found.setdefault(here, (key, meant))
        if str(other) != str(meant):
            remedy = f"give both the same value{theirs.instead and f', or {theirs.instead}'}"
            raise ConfigError(f"{source}: {before} and {key} are one key here, {here}; {remedy}")
        yield here, meant


def _node(key: str) -> str:
    """Return the node below TRAINER that a key stands in; "" where it stands in none."""
    top, _, rest = key.partition(".")
    return rest.partition(".")[0] if top == "TRAINER" and "." in rest else ""


def _declared(trainer: str) -> dict[str, Theirs]:
    entry = TRAINER_REGISTRY.get(trainer) if trainer in TRAINER_REGISTRY else None
    keys: Mapping[str, str | Theirs] = getattr(entry, "published_keys", {})
    return {key: theirs if isinstance(theirs, Theirs) else Theirs(theirs) for key, theirs in keys.items()}


def _of_node(cfg: CfgNode, key: str, own: str, declared: Mapping[str, Theirs]) -> str:
    """Return the key here of one in a node of the authors': by the same name in the method's, else in a node in upper case."""
    group, _, leaf = key.rpartition(".")
    if f"{group}.*" in declared and leaf in cfg.TRAINER[own.partition(".")[2]]:
        return f"{own}.{leaf}"
    top, _, node = group.partition(".")
    if top == "TRAINER" and node not in cfg.TRAINER and node.upper() in cfg.TRAINER:
        return f"TRAINER.{node.upper()}.{leaf}"
    return key
