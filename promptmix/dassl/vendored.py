"""Copies of Dassl that checkouts bring, and how they differ from the original."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.machinery
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from promptmix.dassl.importing import MODULES, OursLoader
from promptmix.dassl.original import FILES
from promptmix.errors import ConfigError, PluginError
from promptmix.utils import get_logger

__all__ = ["Engine", "choose", "fingerprint", "theirs"]

_NAMES = ("gdown", "pandas", "wilds")


@dataclass
class Engine:
    """The Dassl that a checkout is run on.

    Attributes:
        folder: folder of the package; None = promptmix's own engine.
        name: what the checkout imports it as.
        changed: files that differ from the original Dassl or that it lacks, where ``folder`` is a copy.
        borrowed: modules that ``folder`` was published without, and ours is used for; found out while it runs.
    """

    folder: Path | None = None
    name: str = "dassl"
    changed: list[str] = field(default_factory=list)
    borrowed: list[str] = field(default_factory=list)


def choose(root: Path, file: Path, wanted: str) -> Engine:
    """Return the Dassl to run the checkout at ``root`` on.

    Args:
        root: folder of the checkout.
        file: its program.
        wanted: ``ours``: promptmix's; ``theirs``: the checkout's copy, else an installed one; "": the checkout's copy where its
            code differs from the original's, else ours; any other word: the Dassl in the folder of that name.

    Raises:
        ConfigError: what is wanted is not there.
    """
    if wanted not in ("", "ours", "theirs"):
        return _in_folder(wanted)
    renamed = _renamed(root, file)
    if renamed is not None:
        if wanted == "ours":
            raise ConfigError(
                f"--dassl ours: {root} imports its engine as {renamed.name}, which ours can't stand for; leave the flag out"
            )
        get_logger().info("Engine: the checkout's own %s", renamed.name)
        return renamed
    copy = _copy(root)
    changed = _changed(copy) if copy is not None else []
    if wanted == "ours" and changed:
        get_logger().warning(
            "Engine: promptmix's; these files of the checkout's Dassl differ from the original and are not used: %s",
            _short(changed),
        )
    if wanted == "ours" or (not wanted and not changed):
        return Engine()
    if copy is not None:
        why = (
            f"differs from the original in {_short(changed)}; --dassl ours runs promptmix's"
            if changed
            else "the same code as the original"
        )
        get_logger().info("Engine: the checkout's own Dassl, %s (%s)", copy, why)
        return Engine(copy, changed=changed)
    installed = importlib.machinery.PathFinder.find_spec("dassl")
    if installed is None or installed.origin is None:
        raise ConfigError(f"--dassl theirs: {root} brings no Dassl, and none is installed; leave the flag out")
    folder = Path(installed.origin).parent
    get_logger().info("Engine: the installed Dassl, %s", folder)
    return Engine(folder, changed=_changed(folder))


def _in_folder(path: str) -> Engine:
    """Return the Dassl that the user names: a checkout of a fork, or the package in it."""
    given = Path(path).expanduser().resolve()
    folder = next((one for one in (given, given / "dassl") if (one / "engine" / "trainer.py").is_file()), None)
    if folder is None or folder.name != "dassl":
        raise ConfigError(f"--dassl {path}: no Dassl there; choose ours, theirs, or the folder of a fork of Dassl")
    get_logger().info("Engine: the Dassl in %s", folder)
    return Engine(folder, changed=_changed(folder))


def _renamed(root: Path, file: Path) -> Engine | None:
    """Return the copy under another name (``my_dassl``) whose ``build_trainer`` ``file`` imports."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except SyntaxError:  # said when it is run
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and any(name.name == "build_trainer" for name in node.names):
            name = node.module.partition(".engine")[0]  # my_dassl, Dassl.dassl
            folder = root.joinpath(*name.split("."))
            if name != "dassl" and (folder / "engine").is_dir():
                return Engine(folder, name, _changed(folder))
    return None


def _copy(root: Path) -> Path | None:
    """Return the package ``dassl`` in the checkout, or beside it where the checkout is a folder of a repository."""
    places = [root / "dassl", *sorted(root.glob("*/dassl")), *sorted(root.glob("*/*assl*/dassl"))]
    in_repository = any((root.parent / name).exists() for name in (".git", "README.md"))  # an archive has no .git
    if in_repository and not (root / ".git").exists():
        places += [parent / "dassl" for parent in sorted(root.parent.glob("*assl*"))]
    return next((place for place in places if (place / "engine" / "trainer.py").is_file()), None)


def _changed(folder: Path) -> list[str]:
    """Return the files of a copy that the original lacks or has otherwise, methods and data sets of Dassl's own left out."""
    names = []
    for file in sorted(folder.rglob("*.py")):
        name = file.relative_to(folder).as_posix()
        beside = any(part in ("da", "dg", "ssl") or part.startswith(".") for part in Path(name).parts)
        if (
            not beside
            and name != "__init__.py"
            and FILES.get(name) != fingerprint(file.read_text(encoding="utf-8", errors="replace"))
        ):
            names.append(name)
    return names


def fingerprint(text: str) -> str:
    """Return a hash of a source file that line ends, empty lines and comment lines don't change."""
    lines = [line.rstrip() for line in text.splitlines()]
    kept = [line for line in lines if line and not line.lstrip().startswith("#")]
    return hashlib.sha256("\n".join(kept).encode()).hexdigest()[:10]


def _short(names: list[str]) -> str:
    first = ", ".join(names[:6])
    return f"{first} and {len(names) - 6} more" if len(names) > 6 else first


@contextmanager
def theirs(engine: Engine) -> Iterator[Any]:
    """Make ``engine`` importable inside the context, in front of ours, and yield its module ``engine``."""
    top = engine.name.partition(".")[0]
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == top}
    finders, paths = list(sys.meta_path), list(sys.path)
    said = logging.root.manager.disable  # Dassl's module for WILDS silences all logs
    sys.meta_path[:] = [_Borrowed(engine), *(finder for finder in finders if not _is_ours(finder))]
    sys.path.insert(0, str(Path(engine.folder or "").parents[engine.name.count(".")]))
    try:
        with _absent():
            module = importlib.import_module(f"{engine.name}.engine")
        logging.disable(said)
        yield module
    finally:
        logging.disable(said)
        sys.meta_path[:] = finders
        sys.path[:] = paths
        for name in [name for name in sys.modules if name.partition(".")[0] == top]:
            del sys.modules[name]
        sys.modules.update(hidden)


@contextmanager
def _absent() -> Iterator[None]:
    """Let packages that Dassl imports, and needs for downloads and WILDS' data sets only, be absent while it is imported."""
    finder = _Absent()
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        # Others ask whether pandas was imported.
        for name in [name for name, module in sys.modules.items() if isinstance(module, _Missing)]:
            del sys.modules[name]


def _is_ours(finder: object) -> bool:
    return type(finder).__module__ == "promptmix.dassl.importing"


class _Borrowed(MetaPathFinder):
    """Finds our module where a copy of Dassl was published without it: a ``.gitignore`` with ``data`` takes ``dassl/data`` out.

    It is asked first, since below one of our packages the folder of that would give second copies of its modules.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if self.engine.name != "dassl" or fullname == "dassl" or fullname not in MODULES:
            return None
        place = Path(self.engine.folder or "", *fullname.split(".")[1:])
        if place.is_dir() or place.with_suffix(".py").is_file():
            return None
        if not any(fullname.startswith(f"{name}.") for name in self.engine.borrowed):
            self.engine.borrowed.append(fullname)
            get_logger().warning("The checkout's own Dassl was published without %s; promptmix's is used", fullname)
        return ModuleSpec(fullname, OursLoader())


class _Absent(MetaPathFinder, Loader):
    """Finds what is not installed of ``_NAMES``."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=True) if fullname.partition(".")[0] in _NAMES else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Missing(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run."""


class _Missing(ModuleType):
    """A module whose functions say that it is not installed."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*_args: Any, **_kwargs: Any) -> None:
            raise PluginError(f"the checkout calls {self.__name__}.{name}, but that package is not installed; install it")

        return missing
