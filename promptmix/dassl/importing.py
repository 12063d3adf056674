"""``import dassl`` without Dassl: an import hook that is asked last for it, so that an installed Dassl always wins."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from promptmix.hookspecs import hookimpl

__all__ = ["MODULES", "OursLoader", "install", "installed", "lacking", "uninstall"]

_HERE = "promptmix.dassl"

#: Dassl's modules, and which of ours stands for each.
MODULES: dict[str, str] = {
    "dassl": _HERE,
    **{
        f"dassl.{name}": f"{_HERE}.{name}"
        for name in (
            "config",
            "data",
            "data.data_manager",
            "data.datasets",
            "data.samplers",
            "data.transforms",
            "engine",
            "evaluation",
            "metrics",
            "modeling",
            "optim",
            "utils",
        )
    },
    "dassl.modeling.ops": f"{_HERE}.ops",
    **{
        f"dassl.modeling.ops.{name}": f"{_HERE}.ops"
        for name in (
            *("cross_entropy", "dsbn", "efdmix", "mixstyle", "mixup", "mmd", "optimal_transport", "reverse_grad", "sequential2"),
            "utils",
        )
    },
    **{
        f"dassl.data.datasets.{name}": f"{_HERE}.data.sets"
        for name in (
            *(
                "da",
                "da.cifarstl",
                "da.digit5",
                "da.domainnet",
                "da.mini_domainnet",
                "da.office31",
                "da.office_home",
                "da.visda17",
            ),
            *(
                "dg",
                "dg.cifar_c",
                "dg.digit_single",
                "dg.digits_dg",
                "dg.office_home_dg",
                "dg.pacs",
                "dg.vlcs",
                "ssl",
                "ssl.cifar",
                "ssl.stl10",
                "ssl.svhn",
            ),
        )
    },
    # Files that Dassl cuts finer than we do.
    **{
        f"dassl.{package}.{name}": f"{_HERE}.{package}"
        for package, names in {
            "config": ("defaults",),
            "data.datasets": ("base_dataset", "build"),
            "data.transforms": ("autoaugment", "randaugment", "transforms"),
            "engine": ("build", "trainer"),
            "evaluation": ("build", "evaluator"),
            "metrics": ("accuracy", "distance"),
            "modeling": (
                *("backbone", "backbone.backbone", "backbone.build", "backbone.resnet", "head", "head.build", "head.mlp"),
                *("network", "network.build"),
            ),
            "optim": ("lr_scheduler", "optimizer", "radam"),
            "utils": ("logger", "meters", "registry", "tools", "torchtools"),
        }.items()
        for name in names
    },
}


@hookimpl
def before_plugin() -> None:
    """Let a plugin in Dassl's idiom run where no Dassl is installed."""
    install()


def install() -> bool:
    """Let ``import dassl`` find this package, unless a real Dassl is installed (or imported already).

    Returns:
        True where ``dassl`` now is promptmix's, False where a real Dassl stays in place.
    """
    if _real_dassl():
        return False
    if _TOP not in sys.meta_path:
        sys.meta_path.append(_TOP)
        sys.meta_path.insert(0, _BELOW)
    return True


def uninstall() -> None:
    """Undo ``install``: remove the hook, and our modules under Dassl's names."""
    for finder in (_TOP, _BELOW):
        if finder in sys.meta_path:
            sys.meta_path.remove(finder)
    for name in _loaded():
        if getattr(sys.modules[name], "__name__", "").startswith(_HERE):
            del sys.modules[name]


@contextmanager
def installed() -> Iterator[None]:
    """Make ``dassl`` promptmix's inside the context, even where a real Dassl is installed; put everything back afterwards."""
    before, position = {name: sys.modules.pop(name) for name in _loaded()}, list(sys.meta_path)
    sys.meta_path[:0] = [_TOP, _BELOW]
    try:
        yield
    finally:
        sys.meta_path[:] = position
        for name in _loaded():
            del sys.modules[name]
        sys.modules.update(before)


def lacking(module: str, names: Sequence[str] = (), why: str = "") -> Callable[[str], Any]:
    """Return a module's ``__getattr__`` that says what the module lacks.

    Args:
        module: Dassl's name of the module.
        names: what Dassl has there and we have not.
        why: what these are, in a few words.
    """

    def lookup(name: str) -> Any:
        if name in names:
            raise ImportError(
                f"promptmix.dassl lacks {module}.{name}{f' ({why})' if why else ''}; install Dassl.pytorch to use it", name=module
            )
        raise AttributeError(f"promptmix.dassl has no {module}.{name}")

    return lookup


def _loaded() -> list[str]:
    return [name for name in sys.modules if name == "dassl" or name.startswith("dassl.")]


def _real_dassl() -> bool:
    if "dassl" in sys.modules:
        return sys.modules["dassl"].__name__ != _HERE
    finders = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]
    return any(getattr(finder, "find_spec", lambda *_: None)("dassl", None) for finder in finders)


class _Finder(MetaPathFinder):
    """Finds the names in ``MODULES``, and names those of Dassl's modules that there are not.

    Args:
        top: find ``dassl`` itself, else what is below it once ``dassl`` is ours. Only the former must be asked last; the latter
            must be asked first, since the folder of this package would give second copies of its modules.
    """

    def __init__(self, top: bool) -> None:
        self.top = top

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        first, _, rest = fullname.partition(".")
        if first != "dassl" or bool(rest) is self.top or (rest and sys.modules[first].__name__ != _HERE):
            return None
        if fullname in MODULES:
            return importlib.util.spec_from_loader(fullname, OursLoader())
        raise ModuleNotFoundError(f"promptmix.dassl lacks the module {fullname}; install Dassl.pytorch to use it", name=fullname)


class _Whole(ModuleType):
    """One of our modules that stands for its submodules too: it is never put into itself, where a function may have that name."""

    def __setattr__(self, name: str, value: object) -> None:
        if value is not self:
            super().__setattr__(name, value)


class OursLoader(Loader):
    """Puts one of our modules, as it is, under Dassl's name."""

    def create_module(self, spec: ModuleSpec) -> None:
        """Leave it to the import system to make a module that ``exec_module`` then replaces."""

    def exec_module(self, module: ModuleType) -> None:
        """Put ours in the module's place."""
        name = module.__name__
        ours = importlib.import_module(MODULES[name])
        if not hasattr(ours, "__path__") and any(other.startswith(f"{name}.") for other in MODULES):
            ours.__class__ = _Whole
            ours.__path__ = []  # only packages are asked for submodules, which the finder above supplies
        sys.modules[name] = ours


_TOP, _BELOW = _Finder(top=True), _Finder(top=False)
