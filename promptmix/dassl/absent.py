"""What a checkout imports and doesn't find: packages that aren't installed stand in until something uses them."""

from __future__ import annotations

import ast
import importlib
import pdb
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from promptmix.dassl.reasons import here
from promptmix.data.templates import IMAGENET_7, IMAGENET_80
from promptmix.errors import PluginError
from promptmix.utils import get_logger

__all__ = ["standing_in"]

#: They only write down what a run does, and its numbers don't depend on them.
_LOGGERS = ("aim", "clearml", "comet_ml", "mlflow", "neptune", "swanlab", "tensorboardX", "wandb")
#: Backports of what Python has by now.
_MOVED = {"pickle5": "pickle"}
#: A file of CoOp's that forks forget to publish, as the names in it.
_COOPS = {"trainers.imagenet_templates": {"IMAGENET_TEMPLATES": IMAGENET_80, "IMAGENET_TEMPLATES_SELECT": IMAGENET_7}}


@contextmanager
def standing_in(root: Path, engine: Path | None) -> Iterator[None]:
    """Let what the checkout at ``root`` imports be absent inside the context, as far as nothing uses it; say what is.

    Where nobody sits at a terminal, ``pdb.set_trace()`` is passed over too.

    Args:
        root: folder of the checkout.
        engine: folder of the Dassl that it runs on, where that is not ours.
    """
    finder = _Absent([folder for folder in (root, engine) if folder is not None], root)
    trace = pdb.set_trace
    sys.meta_path.append(finder)
    if not sys.stdin.isatty():
        pdb.set_trace = lambda *_args, **_kwargs: get_logger().warning("%s waits in a debugger, which is passed over", _at(root))
    try:
        yield
    finally:
        pdb.set_trace = trace
        sys.meta_path.remove(finder)
        for name in finder.made:
            sys.modules.pop(name, None)


class _Absent(MetaPathFinder, Loader):
    """Finds, when nobody else does, what a file of the checkout imports outside of a ``try``.

    Args:
        folders: of the files whose imports are looked at.
        root: of the checkout, whose own modules are never made up.
    """

    def __init__(self, folders: list[Path], root: Path) -> None:
        self.folders, self.root, self.made = folders, root, list[str]()

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        top = fullname.partition(".")[0]
        frame = _importer()
        if frame is None or not any(Path(frame.f_code.co_filename).is_relative_to(folder) for folder in self.folders):
            return None
        if fullname in _COOPS or fullname in _MOVED:
            return ModuleSpec(fullname, self)
        is_own = (self.root / top).is_dir() or (self.root / f"{top}.py").is_file() or top in ("dassl", "datasets", "trainers")
        parent = sys.modules.get(fullname.rpartition(".")[0])
        # It may be a name that its module lacks; a namespace (google) has parts of several packages.
        if parent is not None and not isinstance(parent, _Package) and getattr(parent, "__file__", None):
            return None
        if is_own or frame.f_lineno in _tried(frame.f_code.co_filename):
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        self.made.append(spec.name)
        log = get_logger().warning
        module = ModuleType(spec.name)
        if spec.name in _MOVED:
            there = vars(importlib.import_module(_MOVED[spec.name]))
            vars(module).update({name: value for name, value in there.items() if not name.startswith("__")})
            return module
        if spec.name in _COOPS:
            vars(module).update({name: list(lines) for name, lines in _COOPS[spec.name].items()})
            log("%s imports %s, which was not published with it; CoOp's is used", _at(self.root), spec.name)
            return module
        parent = sys.modules.get(spec.name.rpartition(".")[0])
        if isinstance(parent, _Package):
            return _Package(spec.name, self.root, parent.of)
        until = "what it would write down is lost" if spec.name in _LOGGERS else "it is passed over until something uses it"
        log("The package %s (%s) is not installed; %s", spec.name, _at(self.root), until)
        return _Package(spec.name, self.root, spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run."""


class _Package(ModuleType):
    """A package that is not installed."""

    def __init__(self, name: str, root: Path, of: str) -> None:
        super().__init__(name)
        self.of = of
        self.__dict__["_part"] = _Part(name, root, of)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.__dict__["_part"], name)


class _Part:
    """Something in a package that is not installed: it may be named, and says so when it is called."""

    def __init__(self, name: str, root: Path, of: str) -> None:
        self._name, self._root, self._of = name, root, of

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Part(f"{self._name}.{name}", self._root, self._of)

    def __call__(self, *_args: Any, **_kwargs: Any) -> Any:
        if self._of in _LOGGERS:
            return self
        raise PluginError(f"{_at(self._root)} needs the package {self._of}, which is not installed ({self._name}); install it")

    def __mro_entries__(self, _bases: tuple[Any, ...]) -> tuple[type, ...]:
        return (type(self._name.rpartition(".")[2], (), {"__init__": lambda _self, *_args, **_kwargs: self()}),)

    def __instancecheck__(self, _instance: object) -> bool:
        return False

    def __or__(self, _other: object) -> Any:  # in annotations
        return self

    __ror__ = __getitem__ = __or__

    def __enter__(self) -> Any:
        return self()

    def __exit__(self, *_error: object) -> None:
        """Nothing to close."""

    def __setitem__(self, _key: object, _value: object) -> None:
        self()


def _importer() -> FrameType | None:
    """Return the frame whose import statement is being run.

    Python tells a finder what is imported, not by which line, and the line decides: one in a ``try`` has an answer of its own.
    """
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame


def _at(root: Path) -> str:
    return here(root) or "the checkout"


@lru_cache(maxsize=64)
def _tried(file: str) -> frozenset[int]:
    """Return the lines of a file that are in a ``try``, whose program does without what can't be imported."""
    tree = ast.parse(Path(file).read_text(encoding="utf-8", errors="replace"))
    tries = [node for node in ast.walk(tree) if isinstance(node, ast.Try)]
    return frozenset(
        line for node in tries for part in node.body for line in range(part.lineno, (part.end_lineno or part.lineno) + 1)
    )
