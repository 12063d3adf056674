"""Loads plugins: the built-in packages, installed ones, and what ``--plugin`` names. Only here the built-in ones are imported.

A plugin that fails takes nothing along: what it registered is taken back, its error names it and its file, and ``--no-plugin
NAME`` or the environment variable ``PROMPTMIX_NO_PLUGIN`` (names with commas between) leaves it out.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import os
import pkgutil
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import pluggy

from promptmix import hookspecs
from promptmix.errors import PluginError, UserError, words_of
from promptmix.registry import REGISTRIES, add_marked, closest, marked_classes

__all__ = [
    "TRIALS",
    "check_plugins",
    "failed_plugins",
    "file_of",
    "get_plugin_manager",
    "load_plugin",
    "plugin_at",
    "strangers",
    "switch_off",
]

ENTRY_POINT_GROUP = "promptmix"
#: Names of plugins to leave out, with commas between.
SWITCH = "PROMPTMIX_NO_PLUGIN"
_BUILT_IN = (
    "promptmix.trainers",
    "promptmix.plugins",
    "promptmix.data.datasets",
    "promptmix.clip.backbones",
    "promptmix.prompts.heads",
    "promptmix.engine.evaluator",
    "promptmix.engine.openworld",
    "promptmix.runs.protocols",
    "promptmix.runs.active",
    "promptmix.runs.federated",
    "promptmix.runs.clusters",
    "promptmix.dassl.importing",
)


#: Where the modules of promptmix's first form are today, for plugins that still import them.
MOVED = {
    "backends": "runs.backends",
    "clip.weights": "clip.places",
    "commands.configure": "config.flags",
    "components": "prompts.roles (PromptLearner and LossTerms: promptmix.prompts.learner)",
    "context": "prompts.context",
    "convert": "engine.convert",
    "cost": "cost.count",
    "data.features": "data.features.cache",
    "data.images": "data.reading.images",
    "data.loaders": "data.reading.loaders",
    "data.manager": "data.reading.manager",
    "data.pictures": "data.reading.pictures",
    "data.randaugment": "data.reading.randaugment",
    "data.readers": "data.datasets.readers",
    "data.samplers": "data.reading.samplers",
    "data.sources": "data.datasets.sources",
    "data.streams": "data.reading.streams",
    "data.transforms": "data.reading.transforms",
    "data.views": "data.features.views",
    "deep": "prompts.deep",
    "estimate": "cost.estimate",
    "memory": "cost.memory",
    "mixture": "prompts.learner (Mixture: Learner)",
    "plots": "tables.plots",
    "progress": "runs.progress",
    "prompting": "prompts.trainer",
    "prompts.templates": "data.templates",
    "protocols": "runs.protocols",
    "published": "tables.published",
    "results": "runs.results",
    "run": "runs.run",
    "sweep": "runs.sweep",
    "tables": "tables.tables",
    "templates": "data.templates",
}
#: The same for single names that went another way than their module.
MOVED_NAMES = {
    "DeepLearner": "promptmix.prompts.learner.Learner with a bank of promptmix.plugins.prompt_bank",
    "DeepPromptTrainer": "promptmix.prompts.trainer.PromptTrainer",
    "IndependentPrompts": "promptmix.plugins.prompt_bank.independent_deep.IndependentDeep",
    "LossSum": "promptmix.prompts.roles.LossSum",
    "LossTerms": "promptmix.prompts.learner.LossTerms",
    "Mixture": "promptmix.prompts.learner.Learner",
    "PromptLearner": "promptmix.prompts.learner.PromptLearner",
}

#: What must work after a plugin was added: modules above this one put it here.
TRIALS: list[Callable[[], object]] = []


class _Loaded:
    """What this process has loaded."""

    manager: pluggy.PluginManager | None = None
    failed: dict[str, PluginError] = {}


def get_plugin_manager() -> pluggy.PluginManager:
    """Return the process-wide manager with built-in and installed plugins loaded.

    Installed plugins that fail are left out; ``check_plugins`` names them.
    """
    if _Loaded.manager is not None:
        return _Loaded.manager
    manager = pluggy.PluginManager("promptmix")
    manager.add_hookspecs(hookspecs)
    for module in import_built_in():
        _register(manager, module, module.__name__)
    _Loaded.manager = manager  # what is checked next asks for it
    for name, package, load in _entry_points():
        if {name, package} & _switched_off():
            continue
        about = f"installed plugin {name!r}" + (f" of {package}" if package != name else "")
        try:
            _add(manager, load, name, about, f"fix or uninstall {package}, or leave it out with --no-plugin {name}")
        except PluginError as error:
            _Loaded.failed[name] = error
    return manager


def import_built_in() -> list[ModuleType]:
    """Return the built-in plugins, none of them registered."""
    return [module for package in _BUILT_IN for module in _walk(importlib.import_module(package))]


def failed_plugins() -> dict[str, PluginError]:
    """Return why installed plugins could not be loaded, by name."""
    get_plugin_manager()
    return dict(_Loaded.failed)


def check_plugins() -> None:
    """Refuse to work without a plugin that is installed, since numbers could be others than without it.

    Raises:
        PluginError: one could not be loaded; fix or uninstall its package, or leave it out by name.
    """
    for error in failed_plugins().values():
        raise error


def load_plugin(name_or_path: str) -> None:
    """Load one more plugin into the process, by module name or by path of a ``.py`` file.

    Args:
        name_or_path: an importable module (``my_package.plugin``) or a file (``./my_router.py``).

    Raises:
        PluginError: no such module or file, it fails to import or to register, it implements no hook or one that does not exist.
    """
    manager = get_plugin_manager()
    if not isinstance(name_or_path, (str, Path)):
        raise PluginError(f"plugin {name_or_path!r}: give the path of a .py file or an importable module name")
    name_or_path = str(name_or_path)
    try:
        path = Path(name_or_path)
        is_file = path.suffix == ".py" or len(path.parts) > 1
        missing = not name_or_path.strip() or is_file and not path.is_file()
    except (OSError, ValueError):  # too long, or with NUL
        is_file = missing = True
    if missing:
        raise PluginError(f"--plugin {name_or_path}: no such file; give the path of a .py file or an importable module name")
    # A file gets a name of its own, so that it can't shadow an installed module, and the same file is loaded once.
    digest = hashlib.sha256(str(path.resolve()).encode(errors="surrogateescape")).hexdigest()[:12]
    name = f"promptmix_plugin_{path.stem}_{digest}" if is_file else name_or_path
    if manager.has_plugin(name):
        return
    manager.hook.before_plugin(name=name)
    load = (lambda: _import_file(name, path)) if is_file else (lambda: importlib.import_module(name))
    remedy = "fix it, or leave --plugin out" if is_file else "give the path of a .py file or an installed module"
    _add(manager, load, name, f"--plugin {name_or_path}", remedy)


def switch_off(names: Iterable[str]) -> None:
    """Leave plugins out, in this process and in those that it starts.

    Args:
        names: as ``promptmix list plugins`` shows them, or of their packages.

    Raises:
        UserError: no plugin has this name.
    """
    wanted = [name for name in names if name]
    known = {name for name, package, _ in _entry_points() for name in (name, package)}
    manager = _Loaded.manager
    loaded = dict(manager.list_name_plugin()) if manager else {}
    for name in wanted:
        if name not in known and (name not in loaded or _is_built_in(name)):
            kind = "is built in and stays" if _is_built_in(name) else "is not installed"
            there = ", ".join(sorted(known)) or "none"
            raise UserError(f"--no-plugin {name}: {kind}{closest(name, sorted(known))} (installed plugins: {there})")
    if wanted:
        os.environ[SWITCH] = ",".join(sorted({*_switched_off(), *wanted}))
    for name in _switched_off():
        _Loaded.failed.pop(name, None)
        if manager and loaded.get(name) is not None and not _is_built_in(name):
            manager.unregister(name=name)
            for registry in REGISTRIES.values():
                registry.remove_from(name)


def plugin_at(path: str) -> str:
    """Return the name of the plugin that a source file belongs to, "" for promptmix's own and for other files."""
    if _Loaded.manager is None:
        return ""
    for name, plugin in _Loaded.manager.list_name_plugin():
        own = file_of(plugin)
        if own and not _is_built_in(name) and _lies_in(path, own, plugin):
            return name.removeprefix("promptmix_plugin_").rpartition("_")[0] if name.startswith("promptmix_plugin_") else name
    return ""


def strangers() -> list[str]:
    """Return the plugins that are not built in, each by its name or file."""
    if _Loaded.manager is None:
        return []
    pairs = [(name, file_of(plugin)) for name, plugin in _Loaded.manager.list_name_plugin() if plugin is not None]
    own = [(name, file) for name, file in pairs if not _is_built_in(name) and not name.isdigit()]
    return [file if name.startswith("promptmix_plugin_") else name for name, file in own]


def file_of(plugin: object) -> str:
    """Return the file that a plugin was loaded from, "" where it has none."""
    module = plugin if isinstance(plugin, ModuleType) else sys.modules.get(type(plugin).__module__)
    return str(getattr(module, "__file__", None) or "")


def _lies_in(path: str, own: str, plugin: object) -> bool:
    """Tell whether ``path`` is the plugin's file, or another one of its package."""
    name = getattr(plugin, "__name__", type(plugin).__module__)
    depth = name.count(".") + (Path(own).name == "__init__.py")
    return path == own or (depth > 0 and Path(own).parents[depth - 1] in Path(path).parents)


def _is_built_in(name: str) -> bool:
    return name.startswith("promptmix.")


def _switched_off() -> set[str]:
    return {name.strip() for name in os.environ.get(SWITCH, "").split(",") if name.strip()}


def _entry_points() -> list[tuple[str, str, Callable[[], object]]]:
    """Return (name, package, loader) of each installed plugin, by name, so that the order never depends on the file system."""
    from importlib.metadata import entry_points

    found = [
        (point.name, point.dist.name if point.dist else point.name, point.load) for point in entry_points(group=ENTRY_POINT_GROUP)
    ]
    return sorted(found, key=lambda entry: entry[:2])


def _walk(package: ModuleType) -> list[ModuleType]:
    """Import and return the package's modules, deep, in alphabetical order."""
    if not hasattr(package, "__path__"):
        return [package]
    found = pkgutil.walk_packages(package.__path__, package.__name__ + ".")
    return [importlib.import_module(info.name) for info in sorted(found, key=lambda info: info.name) if not info.ispkg]


def _import_file(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before execution, as the import system does, so that dataclasses and pickles find it
    spec.loader.exec_module(module)
    return module


def _add(manager: pluggy.PluginManager, load: Callable[[], Any], name: str, about: str, remedy: str) -> None:
    """Load, check and register a plugin that is not ours; whatever it does wrong, it leaves nothing behind.

    Args:
        manager: the manager.
        load: imports and returns it.
        name: what the manager calls it.
        about: what messages call it.
        remedy: end of the message.

    Raises:
        PluginError: it fails, ends the process, or has nothing that anybody would call.
    """
    before = {kind: registry.snapshot() for kind, registry in REGISTRIES.items()}
    doing, plugin = "import", None
    try:
        plugin = load()
        doing = "registration"
        _refuse_unmarked(plugin)
        idle = all(registry.snapshot() == before[kind] for kind, registry in REGISTRIES.items())
        if idle and not _marked(plugin) and not marked_classes(plugin):
            raise PluginError(
                "it implements no hook; mark functions with @promptmix.hookimpl (`promptmix list hooks`) or classes with "
                "@promptmix.register"
            )
        _register(manager, plugin, name)
        for trial in TRIALS:
            trial()
    except BaseException as error:  # SystemExit too: a plugin does not end the process
        for kind, registry in REGISTRIES.items():
            registry.restore(before[kind])
        if plugin is not None:
            with contextlib.suppress(ValueError, AssertionError):
                manager.unregister(plugin)
        else:
            sys.modules.pop(name, None)
        if isinstance(error, (KeyboardInterrupt, GeneratorExit)):
            raise
        words = f"{type(error).__name__}: {words_of(error)}" if not isinstance(error, UserError) else str(error)
        words = _moved(error) or words
        if isinstance(error, SystemExit):
            words = f"it ended the process (SystemExit: {error.code})"
        file = file_of(plugin) if plugin is not None else ""
        where = f" ({file})" if file and file not in about else ""
        raise PluginError(f"{about}{where}: {doing} failed ({' '.join(words.split())}); {remedy}") from error
    for kind, registry in REGISTRIES.items():
        registry.note_origin(name, before[kind])


def _moved(error: BaseException) -> str:
    """Say in words what to import instead of what ``error`` did not find; "" where it is not a name of ours that moved."""
    lacking = re.match(r"cannot import name '(\w+)' from '(promptmix[\w.]*)'", words_of(error))
    module, name = (lacking.group(2), lacking.group(1)) if lacking else (getattr(error, "name", None) or "", "")
    if not isinstance(error, ImportError) or not module.startswith("promptmix"):
        return ""
    if name in MOVED_NAMES:
        return f"{module}.{name} is now {MOVED_NAMES[name]}; import that"
    for old in (f"{module}.{name}", module):
        if old.removeprefix("promptmix.") in MOVED:
            return f"{old} is now promptmix.{MOVED[old.removeprefix('promptmix.')]}; import that"
    return ""


def _hooks() -> dict[str, Any]:
    return {name: spec for name, spec in vars(hookspecs).items() if hasattr(spec, "promptmix_spec")}


def _marked(plugin: object) -> list[str]:
    """Return the names of what a plugin marks with ``@hookimpl``."""
    return [name for name in dir(plugin) if hasattr(getattr(plugin, name, None), "promptmix_impl")]


def _refuse_unmarked(plugin: object) -> None:
    """Refuse a function that is called like a hook, but would never be called.

    Raises:
        PluginError: it lacks the mark.
    """
    for name in _hooks():
        function = getattr(plugin, name, None)
        own = getattr(function, "__module__", "") == getattr(plugin, "__name__", type(plugin).__module__)
        if callable(function) and own and not hasattr(function, "promptmix_impl"):
            raise PluginError(f"{name} has the name of a hook, but not its mark; put @promptmix.hookimpl above it")


def _register(manager: pluggy.PluginManager, plugin: object, name: str) -> None:
    """Check ``plugin``, then let it fill the registries (only it, so that nothing is registered twice)."""
    if manager.is_registered(plugin):
        return
    try:
        manager.register(plugin, name)
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise PluginError(f"{' '.join(str(error).split())}; hooks there are: {', '.join(sorted(_hooks()))}") from error
    others = [other for other in manager.get_plugins() if other is not plugin]
    for kind, registry in REGISTRIES.items():
        hook = f"register_{kind}"
        if hasattr(manager.hook, hook):
            manager.subset_hook_caller(hook, others)(registry=registry)
    add_marked(plugin)
