"""Loads plugins: the built-in rooms, installed packages, and what ``--plugin`` names. The only place that imports rooms."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import pluggy

from promptmix import hookspecs
from promptmix.errors import PluginError
from promptmix.registry import REGISTRIES

ENTRY_POINT_GROUP = "promptmix"
_ROOMS = (
    "promptmix.trainers",
    "promptmix.plugins",
    "promptmix.data.datasets",
    "promptmix.clip.backbones",
    "promptmix.prompts.heads",
)


@lru_cache(maxsize=1)
def get_plugin_manager() -> pluggy.PluginManager:
    """Return the process-wide manager with built-in and installed plugins loaded.

    Raises:
        PluginError: an installed plugin fails to import or names an unknown hook; mend or uninstall that package.
    """
    manager = pluggy.PluginManager("promptmix")
    manager.add_hookspecs(hookspecs)
    for room in _ROOMS:
        for module in _walk(importlib.import_module(room)):
            _register(manager, module, module.__name__)
    for name, load in _entry_points():
        try:
            plugin = load()
        except Exception as error:
            raise PluginError(
                f"installed plugin {name!r} failed to load ({type(error).__name__}: {error}); mend or uninstall its package"
            ) from error
        _register(manager, plugin, name)
    return manager


def load_plugin(name_or_path: str) -> None:
    """Load one more plugin into the process, by module name or by path of a ``.py`` file.

    Args:
        name_or_path: an importable module (``my_package.plugin``) or a file (``./my_router.py``).

    Raises:
        PluginError: no such module or file, it fails to import, or it implements a hook that does not exist.
    """
    manager = get_plugin_manager()
    path = Path(name_or_path)
    is_file = path.suffix == ".py" or len(path.parts) > 1
    if is_file and not path.is_file():
        raise PluginError(f"--plugin {name_or_path}: no such file; give the path of a .py file or an importable module name")
    # A file gets a name of its own, so that it can't shadow an installed module, and the same file is loaded once.
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
    name = f"promptmix_plugin_{path.stem}_{digest}" if is_file else name_or_path
    if manager.has_plugin(name):
        return
    try:
        module = _import_file(name, path) if is_file else importlib.import_module(name)
    except Exception as error:
        sys.modules.pop(name, None)
        raise PluginError(
            f"--plugin {name_or_path}: import failed ({type(error).__name__}: {error}); "
            "give the path of a .py file or an installed module"
        ) from error
    _register(manager, module, name)


def _entry_points() -> list[tuple[str, Callable[[], object]]]:
    """Return (name, loader) of each installed plugin, sorted by name so that the order never depends on the file system."""
    from importlib.metadata import entry_points

    return sorted(((point.name, point.load) for point in entry_points(group=ENTRY_POINT_GROUP)), key=lambda pair: pair[0])


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


def _register(manager: pluggy.PluginManager, plugin: object, name: str) -> None:
    """Check ``plugin``, then let it fill the registries (only it, so that nothing is registered twice)."""
    if manager.is_registered(plugin):
        return
    manager.register(plugin, name)
    try:
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        manager.unregister(plugin)
        known = sorted(attr for attr in vars(hookspecs) if hasattr(getattr(hookspecs, attr), "promptmix_spec"))
        raise PluginError(f"plugin {name!r}: {error}; hooks there are: {', '.join(known)}") from error
    others = [other for other in manager.get_plugins() if other is not plugin]
    for kind, registry in REGISTRIES.items():
        hook = f"register_{kind}"
        if hasattr(manager.hook, hook):
            manager.subset_hook_caller(hook, others)(registry=registry)
