"""A checkout's ``train.py``, run as the program that it is: its flags, its folder, its modules, its ``main``."""

from __future__ import annotations

import argparse
import ast
import io
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

import packaging
import packaging.version

from promptmix.errors import ConfigError

__all__ = ["OUR_FLAGS", "Early", "command_line", "flags_of", "groups", "has_main_block", "load", "surroundings"]

#: Flags of `promptmix train` that a checkout's train.py never sees, with the number of words that each takes.
_TAKING = ("--coop-repo", "--dassl", "--device", "--plugin", "--threads")
OUR_FLAGS = dict.fromkeys(_TAKING, 2) | dict.fromkeys(("--skip-bad", "--debug", "--quiet", "--list"), 1)
_PATHS = {"--root", "--output-dir", "--resume", "--model-dir"}
_CONFIGS = {"--config-file", "--dataset-config-file"}
_MANY = {"--source-domains", "--target-domains", "--transforms"}


def flags_of(file: Path) -> dict[str, Any]:
    """Return flag (``--eval-only``) -> default of every ``add_argument`` in a checkout's program."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except SyntaxError:  # said when it is run
        return {}
    words = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
    # Also those that are declared in a loop, without their defaults.
    found: dict[str, Any] = {word: None for word in words if isinstance(word, str) and re.fullmatch(r"--[a-zA-Z][\w-]*", word)}
    for call in ast.walk(tree):
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument"):
            continue
        names = [arg.value for arg in call.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        settings = {keyword.arg: keyword.value for keyword in call.keywords}
        try:
            default = ast.literal_eval(settings["default"]) if "default" in settings else None
            action = ast.literal_eval(settings["action"]) if "action" in settings else ""
        except ValueError:  # computed when the program runs
            default, action = None, ""
        for name in names[-1:]:
            found[name] = {"store_true": False, "store_false": True}.get(action, default)
    return found


def has_main_block(file: Path) -> bool:
    """Tell whether ``train.py`` does anything when it is run as a program."""
    tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
    return any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in tree.body)


def command_line(words: Sequence[str], opts: Sequence[str], root: Path, taken: dict[str, Any]) -> list[str]:
    """Return the words that the checkout's ``train.py`` is called with, for those that `promptmix train` was called with.

    Relative paths are made absolute, since the program runs in its own folder; its own configs win over files here.

    Args:
        words: flags, ours and theirs.
        opts: the ``KEY VALUE`` pairs at the end.
        root: folder of the checkout.
        taken: the flags that its ``train.py`` declares.

    Raises:
        ConfigError: a config file is nowhere.
    """
    kept: list[list[str]] = []
    for flag, values in groups(words):
        if flag in OUR_FLAGS and flag not in taken:
            continue
        if flag in ("--eval-only", "--no-train", "--model-dir", "--load-epoch", "--head") and flag not in taken:
            continue  # promptmix does these itself
        meaning = flag.replace("_", "-")  # some write --output_dir
        if meaning in _CONFIGS:
            values = [str(_config_file(value, root)) for value in values]
        elif meaning in _PATHS or (meaning.endswith("-root") and len(values) == 1):
            values = [_absolute(value) for value in values]
        else:
            values = [_existing(value, root) for value in values]
        kept.append([_spelled(flag, taken), *values])
    # A flag that takes many values would take the pairs too.
    kept.sort(key=lambda group: group[0] not in _MANY)
    if kept and kept[-1][0] in _MANY:
        kept.append(["--root", ""])
    pairs = [_existing(word, root) if index % 2 else word for index, word in enumerate(opts)]
    return [word for group in kept for word in group] + pairs


def _spelled(flag: str, taken: dict[str, Any]) -> str:
    """Return a flag as the checkout's program spells it: MuDPT and FAPT write ``--output_dir``."""
    same = [other for other in taken if other.replace("_", "-") == flag.replace("_", "-")]
    return flag if flag in taken or not same else same[0]


def groups(words: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield each flag among ``words`` with the words that follow it."""
    flag, values = "", list[str]()
    for word in words:
        if word.startswith("--"):
            if flag:
                yield flag, values
            flag, _, value = word.partition("=")
            values = [value] if "=" in word else []
        else:
            values.append(word)
    if flag:
        yield flag, values


def _config_file(path: str, root: Path) -> Path:
    for file in (root / path, Path(path).absolute()):
        if file.is_file():
            return file
    raise ConfigError(f"config file {path}: neither here nor in {root}; check the path")


def _absolute(value: str) -> str:
    """Make a path absolute; the slash at its end stays, since some only add a name to it."""
    if not value:
        return value
    return os.path.abspath(os.path.expanduser(value)) + ("/" if value.endswith("/") else "")


def _existing(value: str, root: Path) -> str:
    """Make a path of a file or folder that is here, and not in the checkout, absolute; leave any other word as it is."""
    path = Path(value)
    is_path = len(path.parts) > 1 or path.suffix
    return str(path.absolute()) if is_path and not path.is_absolute() and path.exists() and not (root / path).exists() else value


class Early(io.TextIOBase):
    """A standard output that keeps what is printed before there is a log.

    Args:
        console: where it also goes.
    """

    def __init__(self, console: TextIO) -> None:
        self.console, self.kept = console, io.StringIO()
        self.closed_early = False

    def write(self, text: str) -> int:
        """Print and keep."""
        if not self.closed_early:
            self.kept.write(text)
        return self.console.write(text)

    def flush(self) -> None:
        """Flush the console."""
        self.console.flush()

    def close(self) -> None:
        """Stay open: Dassl's log closes its console when it is closed itself."""

    def isatty(self) -> bool:
        """Tell whether the console is a terminal."""
        return self.console.isatty()

    def take(self) -> str:
        """Return what was kept, and keep nothing more."""
        self.closed_early = True
        return self.kept.getvalue()


@contextmanager
def surroundings(root: Path, file: Path, words: Sequence[str]) -> Iterator[Early]:
    """Run in the checkout's folder, with its modules in front, ``words`` as arguments and standard output kept.

    Everything is put back afterwards.
    """
    before = Path.cwd(), sys.argv, sys.stdout
    early, process, leave = Early(sys.stdout), os.getpid(), os._exit

    def unwind(code: int = 0) -> None:
        if os.getpid() != process:  # a worker of a loader
            leave(code)
        raise SystemExit(code)

    with _modules_of(root), _pkg_resources():
        os.chdir(root)
        sys.argv = [str(file), *words]
        if file.parent != root:  # python tools/train.py
            sys.path.insert(1, str(file.parent))
        sys.stdout = early
        os._exit = unwind  # type: ignore[assignment]  # some end with it, which would leave nothing behind
        try:
            yield early
        finally:
            os._exit = leave
            os.chdir(before[0])
            sys.argv, sys.stdout = before[1:]


@contextmanager
def _modules_of(root: Path) -> Iterator[None]:
    """Let the checkout's top-level modules win over any others of the same names; put everything back afterwards."""
    names = {entry.stem for entry in root.iterdir() if entry.suffix == ".py" or (entry.is_dir() and _has_modules(entry))}
    names -= {"promptmix", "dassl"}  # which Dassl it is, is chosen elsewhere
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in names}
    before = list(sys.path)
    sys.path.insert(0, str(root))
    for name in names:
        if (root / name).is_dir() and not (root / name / "__init__.py").is_file() and not (root / f"{name}.py").is_file():
            # Without __init__.py the import system would prefer a package of this name anywhere else on the path.
            sys.modules[name] = package = ModuleType(name)
            package.__path__ = [str(root / name)]
    try:
        yield
    finally:
        sys.path[:] = before
        for name in [name for name in sys.modules if name.partition(".")[0] in names]:
            del sys.modules[name]
        sys.modules.update(hidden)


def _has_modules(folder: Path) -> bool:
    return any(folder.glob("*.py")) or any(folder.glob("*/*.py"))


@contextmanager
def _pkg_resources() -> Iterator[None]:
    """Give ``from pkg_resources import packaging`` back, which OpenAI's CLIP does and setuptools has dropped."""
    name = "pkg_resources"
    try:
        found = __import__(name)
    except ImportError:
        found = None
    if found is not None and hasattr(found, "packaging"):
        yield
        return
    module = ModuleType(name)
    module.packaging = packaging  # type: ignore[attr-defined]
    module.parse_version = packaging.version.parse  # type: ignore[attr-defined]
    sys.modules[name] = module
    try:
        yield
    finally:
        del sys.modules[name]
        if found is not None:
            sys.modules[name] = found


def load(file: Path, name: str) -> ModuleType:
    """Run a checkout's program as the module ``name``; with ``__main__`` it does all that it does as a program.

    Raises:
        ConfigError: its own argument parser refuses the command line.
    """
    code = compile(file.read_text(encoding="utf-8"), str(file), "exec")
    program = ModuleType(name)
    program.__file__ = str(file)
    sys.modules["train"] = program
    parse = argparse.ArgumentParser.error

    def refuse(parser: argparse.ArgumentParser, message: str) -> None:
        if Path(parser.prog).name == file.name:
            flags = ", ".join(sorted(flag for flag in flags_of(file) if flag.startswith("-")))
            raise ConfigError(f"the checkout's {file.name} refuses its command line: {message}; it takes {flags}")
        parse(parser, message)

    argparse.ArgumentParser.error = refuse  # type: ignore[assignment,method-assign]
    try:
        exec(code, vars(program))
    finally:
        argparse.ArgumentParser.error = parse  # type: ignore[method-assign]
        sys.modules.pop("train", None)
    return program
