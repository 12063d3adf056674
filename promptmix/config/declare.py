"""Declarations of settings: what a key means and which values it takes, written once and checked everywhere.

A component declares its settings in its constructor, and its config node, comments and checks follow from there::

    def __init__(self, task: Task, n_ctx: Annotated[int, Setting("M: context vectors", low=1)] = 16) -> None: ...
"""

from __future__ import annotations

import inspect
import math
import sys
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Annotated, Any

from yacs.config import CfgNode

from promptmix.errors import ConfigError
from promptmix.files.text import real
from promptmix.registry import closest

#: Where a config tree keeps the declarations of its own keys, by name.
_DECLARED = "_declared"
_DEFAULTS = "_defaults"
_RETIRED = "_retired"


@dataclass(frozen=True)
class Setting:
    """What a key means and which values it takes.

    Attributes:
        comment: meaning, unit, the paper's symbol.
        low: smallest number (of each item, where the value is a list), itself allowed.
        high: largest number, itself allowed.
        above: numbers must be larger than this.
        below: numbers must be smaller than this.
        choices: the only values (of each item); empty = no such limit.
        length: number of items of a list; None = any.
        items: type of each item of a list, where the default has none that shows it.
        at_test: whether an evaluation may take another value than the training that it evaluates.
        place: whether it names a file or folder that is opened, which only the caller may name, not a run's record; what was read
            there is in the checkpoint.
        needs: other keys and their values with which this one is read; of a list, how one of its items begins.
    """

    comment: str
    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[Any, ...] = ()
    length: int | None = None
    items: type | tuple[type, ...] | None = None
    at_test: bool = False
    place: bool = False
    needs: tuple[tuple[str, Sequence[Any]], ...] = ()

    @property
    def condition(self) -> str:
        """Return with which other settings the key is read, in words; empty where it always is."""
        named = (
            f"{key} {'above 0' if isinstance(values, range) else ' or '.join(map(str, values))}" for key, values in self.needs
        )
        return f"read with {' and '.join(named)}" if self.needs else ""

    def lacks(self, value_of: Callable[[str], Any]) -> list[str]:
        """Return what to set or add so that the key is read, such as ``set OPTIM.NAME sgd``.

        Args:
            value_of: gives the value of a dotted key.
        """
        found = []
        for key, values in self.needs:
            value = value_of(key)
            if not isinstance(value, (list, tuple)):
                found += [] if value in values else [f"set {key} {values[0]}"]
            elif not any(str(item).startswith(tuple(values)) for item in value):
                found.append(f"add {values[0]!r} to {key}")
        return found

    @property
    def allowed(self) -> str:
        """Return what is allowed, in words; empty where everything of the right type is."""
        if self.choices:
            return f"choose from {', '.join(map(repr, self.choices))}"
        bounds = ((self.low, "{} or more"), (self.above, "more than {}"), (self.high, "{} or less"), (self.below, "less than {}"))
        number = " and ".join(words.format(bound) for bound, words in bounds if bound is not None)
        count = "" if self.length is None else f"{self.length} item" + "s" * (self.length != 1)
        return f"give {count + (', each ' if count and number else '') + number}" if count or number else ""

    def check(self, key: str, value: Any, source: str | None = None) -> None:
        """Refuse a value that the key does not take.

        Args:
            key: dotted key, for the message.
            value: of the right type already.
            source: who set it; None = the default.

        Raises:
            ConfigError: the value is out of range, no number (NaN), not among the choices or a list of the wrong length.
        """
        problem = _unusable(value)
        items = list(value) if isinstance(value, (list, tuple)) else [value]
        if problem or not ((self.length is None or len(items) == self.length) and all(map(self._takes, items))):
            by = f" (set by {source})" if source else ""
            near = closest(str(value), [str(choice) for choice in self.choices]) if self.choices and not problem else ""
            raise ConfigError(f"{key} is {shown(value)}{by}, which is not allowed; {problem or self._wanted()}{near}")

    def _wanted(self) -> str:
        if self.items is None:
            return self.allowed or "give a finite number"
        kinds = self.items if isinstance(self.items, tuple) else (self.items,)
        each = f"each item must be {' or '.join(map(a_kind, kinds))}"
        return f"{self.allowed}; {each}" if self.allowed and not self.choices else self.allowed or each

    def _takes(self, item: Any) -> bool:
        if self.items is not None and not (isinstance(item, self.items) and type(item) is not bool):
            return False
        if self.choices:
            return item in self.choices
        if isinstance(item, bool) or not isinstance(item, (int, float)):
            limited = any(limit is not None for limit in (self.low, self.high, self.above, self.below))
            return not limited  # a range means numbers, also inside a list whose type says nothing of its items
        return (
            (self.low is None or item >= self.low)
            and (self.high is None or item <= self.high)
            and (self.above is None or item > self.above)
            and (self.below is None or item < self.below)
        )


def a_kind(kind: type) -> str:
    """Return the name of a type with its article."""
    return f"{'an' if kind is int else 'a'} {kind.__name__}"


def shown(value: Any) -> str:
    """Return ``value`` as a message shows it: on one line, cut where it is long."""
    try:
        text = " ".join(repr(value).splitlines())  # of an array there are several
    except Exception:  # a number of more digits than Python prints, a list that holds itself, an object that can't say what it is
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= 200 else f"{text[:197]}..."


def _unusable(value: Any, depth: int = 0) -> str:
    """Return what no key takes: numbers that are none, numbers beyond 64 bits, text that no file holds; "" for nothing."""
    if isinstance(value, (list, tuple)):
        if depth > 8:
            return "lists lie too deep in each other"
        return next(filter(None, (_unusable(item, depth + 1) for item in value)), "")
    if isinstance(value, float) and not math.isfinite(value):
        return "give a finite number"
    if isinstance(value, int) and abs(value) >= 2**63:
        return "give a number of at most 64 bits"
    if isinstance(value, str) and ("\0" in value or not value.isascii() and _half_characters(value)):
        plain = sys.getfilesystemencoding() == "utf-8"
        return "give text in UTF-8, without NUL" + ("" if plain else ", and set PYTHONUTF8=1: this locale has no such letters")
    return ""


def _half_characters(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


@dataclass(frozen=True)
class Declared:
    """One setting of a constructor: its default and what it takes."""

    default: Any
    setting: Setting


def settings_of(function: Callable[..., Any]) -> dict[str, Declared]:
    """Return the settings that ``function`` (a constructor) declares, by argument name, in order.

    Raises:
        TypeError: an annotated setting has no default, which a config node needs.
    """
    if isinstance(function, type):
        function = function.__init__  # type: ignore[misc]
    return dict(_settings_of(getattr(function, "__func__", function)))  # a bound method would keep its trainer alive


@cache
def _settings_of(function: Callable[..., Any]) -> dict[str, Declared]:
    found: dict[str, Declared] = dict(getattr(function, "inherited_settings", {}))
    for name, parameter in inspect.signature(function).parameters.items():
        hint = parameter.annotation
        if isinstance(hint, str) and "Setting" in hint:  # other names may be there for the type checker alone
            hint = eval(hint, function.__globals__)  # the annotation's own code, as typing.get_type_hints would run it
        if typing.get_origin(hint) is not Annotated:
            continue
        kind, *extras = typing.get_args(hint)
        for extra in extras:
            if isinstance(extra, Setting):
                setting = extra if extra.items else replace(extra, items=_items_of(kind))
                if parameter.default is inspect.Parameter.empty:
                    raise TypeError(f"{function.__qualname__}: setting {name!r} has no default")
                found[name] = Declared(parameter.default, setting)
    return found


def _items_of(kind: Any) -> type | tuple[type, ...] | None:  # any annotation
    """Return the type of each item of a list that is annotated with it (``Sequence[str]``); None where it is not said."""
    item = next(iter(typing.get_args(kind)), None)
    if not isinstance(typing.get_origin(kind), type) or not isinstance(item, type):
        return None
    return (int, float) if item is float else item


def inherits(
    constructor: Callable[..., Any],
    *,
    without: Iterable[str] = (),
    **defaults: Any,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a function whose ``**kwargs`` go to ``constructor``: it declares that one's settings too.

    Args:
        constructor: whose settings are taken over.
        without: settings that are not offered.
        defaults: other defaults than the constructor's.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        theirs = {name: found for name, found in settings_of(constructor).items() if name not in set(without)}
        strangers = set(defaults) - set(theirs)
        if strangers:
            raise TypeError(f"{function.__qualname__}: {constructor.__qualname__} has no setting {sorted(strangers)}")
        taken = {name: Declared(defaults.get(name, found.default), found.setting) for name, found in theirs.items()}
        function.inherited_settings = getattr(function, "inherited_settings", {}) | taken  # type: ignore[attr-defined]
        function.inherited_by = (*inherited_by(function), constructor)  # type: ignore[attr-defined]
        return function

    return decorate


def inherited_by(function: Callable[..., Any]) -> tuple[Any, ...]:
    """Return the constructors whose settings ``function`` declares too (see ``inherits``)."""
    return getattr(function, "inherited_by", ())


def key_of(name: str) -> str:
    """Return the key of a setting: its argument in upper case, where ``lambda_`` stands for ``LAMBDA``."""
    return name.rstrip("_").upper()


def parted(settings: dict[str, Any], constructor: Callable[..., Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Part settings into those of ``constructor`` and the others, for functions that inherit those of several."""
    own = settings_of(constructor)
    return {k: v for k, v in settings.items() if k in own}, {k: v for k, v in settings.items() if k not in own}


def declare(node: CfgNode, name: str, default: Any, setting: Setting) -> None:
    """Add the key ``name`` with ``default`` to ``node``, and remember what it takes."""
    node[name] = default
    if isinstance(default, (list, tuple)) and default and setting.items is None:
        kinds = {type(item) for item in default}
        setting = replace(setting, items=(int, float) if kinds <= {int, float} and float in kinds else tuple(kinds))
    node.__dict__.setdefault(_DECLARED, {})[name] = setting
    node.__dict__.setdefault(_DEFAULTS, {})[name] = default


def declare_all(node: CfgNode, function: Callable[..., Any]) -> None:
    """Add every setting of ``function`` to ``node``, in upper case."""
    for name, found in settings_of(function).items():
        declare(node, key_of(name), found.default, found.setting)


def retire(node: CfgNode, keys: dict[str, str]) -> None:
    """Remember keys that ``node`` no longer has, each with what to write instead."""
    node.__dict__.setdefault(_RETIRED, {}).update(keys)


def retired_from(node: CfgNode) -> dict[str, str]:
    """Return the keys that ``node`` no longer has."""
    return node.__dict__.get(_RETIRED, {})


def declared_in(node: CfgNode) -> dict[str, Setting]:
    """Return the declarations of this node's own keys."""
    return node.__dict__.get(_DECLARED, {})


def all_declared(cfg: CfgNode, prefix: str = "") -> dict[str, Setting]:
    """Return every declaration of the tree by dotted key."""
    found = {f"{prefix}{name}": setting for name, setting in declared_in(cfg).items()}
    for name, value in cfg.items():
        if isinstance(value, CfgNode):
            found |= all_declared(value, f"{prefix}{name}.")
    return found


def parse_sum(text: str) -> list[tuple[float, str]]:
    """Return the (factor, name) pairs of ``"10 * FrozenImageL1 + ZeroshotKL"``; a name alone has the factor 1.

    Raises:
        ConfigError: a factor that is not a number or is 0, or a name is missing.
    """
    pairs = []
    for term in text.split("+"):
        factor, star, name = term.rpartition("*")
        try:
            pairs.append((real(factor) if star else 1.0, name.strip()))
        except ValueError:
            name = ""
        if name.strip() and not pairs[-1][0]:
            raise ConfigError(
                f"{text!r} adds nothing of {name.strip()}, whose settings would be ignored; leave it out of the sum"
            )
        if not name.strip():
            raise ConfigError(f"{text!r} is not a sum of losses; write names, with factors if you like: '10 * NAME + OTHER'")
    return pairs


def all_defaults(cfg: CfgNode, prefix: str = "") -> dict[str, Any]:
    """Return the default of every declared key of the tree by dotted key."""
    found = {f"{prefix}{name}": default for name, default in cfg.__dict__.get(_DEFAULTS, {}).items()}
    for name, value in cfg.items():
        if isinstance(value, CfgNode):
            found |= all_defaults(value, f"{prefix}{name}.")
    return found


def all_values(cfg: CfgNode, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and value of every key of the tree, declared or not."""
    for name, value in cfg.items():
        if isinstance(value, CfgNode):
            yield from all_values(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def all_keys(cfg: CfgNode) -> list[str]:
    """Return the dotted key of every value of the tree, declared or not."""
    return [key for key, _ in all_values(cfg)]
