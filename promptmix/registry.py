"""Registries: the names that YAML and the command line use, and what stands behind them."""

from __future__ import annotations

import difflib
import re
import sys
from collections import ChainMap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, overload

from promptmix.errors import PluginError, RegistryError

Part = TypeVar("Part", bound=type)

_NAME = re.compile(r"\w[\w.+@:-]*(/\w[\w.+@:-]*)*")
#: Where ``register`` writes the name of a class.
_MARK = "promptmix_name"


def closest(name: str, choices: list[str]) -> str:
    """Return ``; did you mean 'X'?`` for the choice nearest to ``name``, or an empty string."""
    lower = {choice.lower().lstrip("-"): choice for choice in choices}  # dashes would make short flags alike
    near = difflib.get_close_matches(name.lower().lstrip("-"), lower, n=1)
    return f"; did you mean {lower[near[0]]!r}?" if near else ""


class Registry:
    """A table of names, with Dassl's interface: ``register`` as decorator or call, ``get``, ``registered_names``.

    Args:
        name: what the entries are, used in messages (``"trainer"``).
    """

    def __init__(self, name: str) -> None:
        self.kind = name
        self._entries: ChainMap[str, Any] = ChainMap({})
        self._plugins: dict[str, str] = {}  # name of an entry -> plugin that is not built in

    def register(self, obj: Any = None, *, name: str | None = None, force: bool = False) -> Any:
        """Add ``obj`` under ``name`` (default: its ``__name__``); without ``obj``, return a decorator.

        Raises:
            RegistryError: it is not a name for YAML and folders, or is taken by something else; choose another, or pass
                ``force=True`` to replace it.
        """
        if obj is None:
            return lambda later: self.register(later, name=name, force=force)
        key = obj.__name__ if name is None else name
        if not isinstance(key, str) or not _NAME.fullmatch(key):
            raise RegistryError(
                f"{self.kind} {key!r} is not a name; give letters, numbers, '_', '.', '+', '-', such as 'ViT-B/16'"
            )
        if self._entries.maps[0].get(key, obj) is not obj and not force:
            raise RegistryError(
                f"{self.kind} {key!r} is registered already by {self.origin(key)}; "
                "register yours under another name, or with force=True to replace it"
            )
        self._entries[key] = obj
        return obj

    def get(self, name: str) -> Any:
        """Return the entry called ``name``.

        Raises:
            RegistryError: no entry has this name; the message lists those there are.
        """
        name = self.own_name(name)
        if name not in self._entries:
            names = self.registered_names()
            raise RegistryError(
                f"unknown {self.kind} {name[:100]!r}{closest(name[:100], names)} (choices: {', '.join(names) or 'none'}); "
                "a plugin that brings it must be installed or named with --plugin"
            )
        return self._entries[name]

    def own_name(self, name: str) -> str:
        """Return the name here of what its authors' code calls ``name`` (``published_as``); any other name as it is."""
        if name in self._entries:
            return name
        return next((own for own, entry in self._entries.items() if name in getattr(entry, "published_as", ())), name)

    @contextmanager
    def layer(self) -> Iterator[dict[str, Any]]:
        """Take names anew inside the context: they hide earlier entries of the same name, and are gone afterwards.

        Call ``get_plugin_manager()`` before, so that what promptmix itself brings lies below the layer.

        Yields:
            The entries that were added in the context so far.
        """
        below = self._entries
        self._entries = below.new_child()
        try:
            yield self._entries.maps[0]  # type: ignore[misc]
        finally:
            self._entries = below

    def snapshot(self) -> dict[str, Any]:
        """Return the entries of the present layer, for ``restore``."""
        return dict(self._entries.maps[0])

    def restore(self, entries: dict[str, Any]) -> None:
        """Put back what ``snapshot`` returned: what a plugin added before it failed goes."""
        layer = self._entries.maps[0]
        layer.clear()
        layer.update(entries)

    def note_origin(self, plugin: str, before: dict[str, Any]) -> None:
        """Note that what is new or other since the snapshot ``before`` came with ``plugin``."""
        changed = (name for name, entry in self._entries.maps[0].items() if before.get(name) is not entry)
        self._plugins.update(dict.fromkeys(changed, plugin))

    def remove_from(self, plugin: str) -> None:
        """Remove the entries that came with ``plugin``."""
        for name in [name for name, brought in self._plugins.items() if brought == plugin]:
            self._entries.maps[0].pop(name, None)
            del self._plugins[name]

    def registered_names(self) -> list[str]:
        """Return all names in alphabetical order."""
        return sorted(self._entries, key=str.lower)

    def origin(self, name: str) -> str:
        """Return the module that defined the entry, with the version of its package where it states one."""
        entry = self.get(name)
        defined: str = getattr(entry, "__module__", "unknown")
        # An object of one of our classes, such as a protocol, says nothing of where it was made.
        module = defined if isinstance(entry, type) or callable(entry) else self._plugins.get(name, defined)
        version = getattr(sys.modules.get(module.split(".")[0]), "__version__", None)
        return f"{module} ({version})" if version else module

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.registered_names())

    def __len__(self) -> int:
        return len(self._entries)


@overload
def register(part: Part) -> Part: ...


@overload
def register(*, name: str) -> Callable[[Part], Part]: ...


def register(part: type | None = None, *, name: str = "") -> Any:
    """Decorator: a plugin that holds the class adds it to its kind's registry when it is loaded.

    The kind follows from the base class (``PromptTrainer``, ``PromptBank``, ``Router``, ``Head``, ``TextSupervision``,
    ``Distiller``, ``DatasetBase``, ``EvaluatorBase``, ``Selector``); a subclass needs its own mark. What is not a class, such as
    a protocol or a function that loads a backbone, goes in by a ``register_*`` hook.

    Args:
        part: the class.
        name: what YAML calls it; "" = the class's own name.

    Raises:
        PluginError: no base of the class is of a kind that has a registry.
    """
    if part is None:
        return lambda later: _marked(later, name)
    return _marked(part, part.__name__)


def _marked(part: type, name: str) -> type:
    if not isinstance(getattr(part, "registry", None), Registry):
        raise PluginError(
            f"@register above {part.__name__}: its base classes say no kind; extend PromptTrainer, PromptBank, Router, Head, "
            "TextSupervision, Distiller, DatasetBase, EvaluatorBase or Selector"
        )
    setattr(part, _MARK, name)
    return part


def name_of(part: type | str) -> str:
    """Return what YAML calls a class that ``register`` marked; a name stays as it is."""
    return part if isinstance(part, str) else str(vars(part).get(_MARK, part.__name__))


def marked_classes(module: object, *, own: bool = False) -> list[Any]:
    """Return the classes among a module's names that ``register`` marked: of its package, or its ``own`` ones alone."""
    name = str(getattr(module, "__name__", ""))
    found = (entry for entry in getattr(module, "__dict__", {}).values() if isinstance(entry, type) and _MARK in vars(entry))
    if own:
        return [entry for entry in found if entry.__module__ == name]
    return [entry for entry in found if entry.__module__.partition(".")[0] == name.partition(".")[0]]


def add_marked(module: object) -> None:
    """Add the classes that ``register`` marked in a module to their registries.

    Raises:
        RegistryError: a name is taken.
    """
    for entry in marked_classes(module):
        entry.registry.register(entry, name=vars(entry)[_MARK])


TRAINER_REGISTRY = Registry("trainer")
DATASET_REGISTRY = Registry("dataset")
BACKBONE_REGISTRY = Registry("backbone")
PROMPT_BANK_REGISTRY = Registry("prompt bank")
ROUTER_REGISTRY = Registry("router")
TEXT_SUPERVISION_REGISTRY = Registry("text supervision")
DISTILLER_REGISTRY = Registry("distiller")
EVALUATOR_REGISTRY = Registry("evaluator")
HEAD_REGISTRY = Registry("head")
PROTOCOL_REGISTRY = Registry("protocol")
SWEEP_BACKEND_REGISTRY = Registry("sweep backend")
SELECTOR_REGISTRY = Registry("selector")

#: Every registry by the plural that ``promptmix list`` and the ``register_*`` hooks use.
REGISTRIES: dict[str, Registry] = {
    "trainers": TRAINER_REGISTRY,
    "datasets": DATASET_REGISTRY,
    "backbones": BACKBONE_REGISTRY,
    "prompt_banks": PROMPT_BANK_REGISTRY,
    "routers": ROUTER_REGISTRY,
    "text_supervisions": TEXT_SUPERVISION_REGISTRY,
    "distillers": DISTILLER_REGISTRY,
    "evaluators": EVALUATOR_REGISTRY,
    "heads": HEAD_REGISTRY,
    "protocols": PROTOCOL_REGISTRY,
    "sweep_backends": SWEEP_BACKEND_REGISTRY,
    "selectors": SELECTOR_REGISTRY,
}

#: Config node of each role, and the registry of the parts that can take it.
ROLES: dict[str, Registry] = {
    "PROMPT_BANK": PROMPT_BANK_REGISTRY,
    "ROUTER": ROUTER_REGISTRY,
    "HEAD": HEAD_REGISTRY,
    "TEXT_SUPERVISION": TEXT_SUPERVISION_REGISTRY,
    "DISTILLER": DISTILLER_REGISTRY,
}


def is_prompt_trainer(name: str) -> bool:
    """Tell whether a trainer is a ``PromptTrainer``, made of parts in roles; others bring networks of their own.

    Raises:
        RegistryError: no trainer of this name.
    """
    return hasattr(TRAINER_REGISTRY.get(name), "roles")
