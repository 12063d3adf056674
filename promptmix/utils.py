"""Small helpers that several packages need: files, seeds, versions, console messages."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import random
import stat
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn

from promptmix.errors import DataError, OutputError, UserError, said
from promptmix.files.text import harmless, json_text, parse_json

__all__ = [
    "atomic_write",
    "check_isfile",
    "collect_env_info",
    "count_num_param",
    "get_logger",
    "listdir_nohidden",
    "mkdir_if_missing",
    "read_json",
    "read_text",
    "set_random_seed",
    "tolist_if_not",
    "write_json",
]


class LineFormatter(logging.Formatter):
    """The message alone, as Dassl prints it. Writes control characters out, which names in other people's files may hold."""

    def __init__(self) -> None:
        super().__init__("%(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        return harmless(super().format(record))


class ConsoleHandler(logging.StreamHandler):
    """Writes to whatever ``sys.stdout`` is at the moment, so that a later tee or redirection sees the lines too.

    What can't be written is an error: ``logging`` would print a traceback for each line and go on.
    """

    def __init__(self) -> None:
        logging.Handler.__init__(self, logging.INFO)
        self.setFormatter(LineFormatter())

    def handleError(self, record: logging.LogRecord) -> None:
        """Raise what writing raised."""
        raise

    @property
    def stream(self) -> TextIO:
        """Return the current standard output."""
        return sys.stdout


def get_logger() -> logging.Logger:
    """Return the logger whose messages are the program's output: plain lines on standard output, like Dassl's.

    What only ``log.txt`` is to hold is logged with ``debug``.
    """
    logger = logging.getLogger("promptmix")
    if not any(isinstance(handler, ConsoleHandler) for handler in logger.handlers):
        logger.addHandler(ConsoleHandler())
        logger.setLevel(logging.DEBUG)
        logger.propagate = False  # an application's root handler would print every line a second time
    return logger


@contextlib.contextmanager
def quiet(level: int = logging.WARNING) -> Iterator[None]:
    """Keep messages below ``level`` off the output inside the context."""
    logger = get_logger()
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)


def set_random_seed(seed: int) -> None:
    """Seed python's, numpy's and torch's generators (all CUDA devices too)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


def mkdir_if_missing(dirname: str | os.PathLike[str]) -> None:
    """Make a folder and those above it; an empty name means the current folder."""
    if str(dirname):
        os.makedirs(dirname, exist_ok=True)


def check_isfile(fpath: str | os.PathLike[str]) -> bool:
    """Return whether ``fpath`` is a file, and warn when it isn't."""
    found = os.path.isfile(fpath)
    if not found:
        warnings.warn(f'No file found at "{fpath}"', stacklevel=2)
    return found


def listdir_nohidden(path: str | os.PathLike[str], sort: bool = False) -> list[str]:
    """Return the names in a folder without those that start with a dot."""
    names = [name for name in os.listdir(path) if not name.startswith(".")]
    return sorted(names) if sort else names


def tolist_if_not(x: Any) -> list[Any]:
    """Return ``x`` if it is a list, else a list with ``x`` in it."""
    return x if isinstance(x, list) else [x]


def count_num_param(model: nn.Module | None = None, params: Iterable[Any] | None = None) -> int:
    """Count the numbers in a model's parameters, or in given parameters or parameter groups.

    Raises:
        ValueError: neither ``model`` nor ``params`` is given.
    """
    if model is not None:
        params = model.parameters()
    if params is None:
        raise ValueError("count_num_param needs a model or parameters")
    total = 0
    for item in params:
        tensors = item["params"] if isinstance(item, dict) else item
        total += sum(p.numel() for p in ([tensors] if isinstance(tensors, torch.Tensor) else tensors))
    return total


def atomic_write(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Have ``write`` make a file in a temporary folder beside ``path``, then put it in place in one step.

    A run that is killed halfway leaves the old file, never half a new one. What it leaves behind lies in a hidden folder
    ``.<name of the file>.<random>.tmp``, even if ``write`` makes temporary files of its own, as safetensors does.

    Args:
        path: the file to make; missing folders are made too.
        write: gets the temporary path and writes the whole content there.

    Raises:
        OutputError: the file can't be written; the disk is full, or the folder can't be written to; or the name is a folder's, a
            device's or a pipe's.
    """
    target = Path(path)
    prefix = f".{target.name}."
    _refuse_special(target)
    try:
        mkdir_if_missing(target.parent)
        _write_whole(target, prefix, write)
    except UserError:
        raise
    except OSError as error:
        raise OutputError(f"{target} can't be written: {said(error, 'make room or name another folder')}") from error
    except (RuntimeError, SafetensorError) as error:  # what torch and safetensors make of a full disk
        reason = _no_room(str(error))
        if not reason:
            raise
        raise OutputError(f"{target} can't be written: {reason}; make room or name another folder") from error


def _refuse_special(target: Path) -> None:
    """Refuse to put a file in the place of a device such as ``/dev/stdout``, which root could, or of a folder."""
    for look in (target.lstat, target.stat):
        try:
            mode = look().st_mode
        except (OSError, ValueError):  # nothing there, or no such name: the writing says so
            return
        if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
            raise OutputError(f"{target} is {'a folder' if stat.S_ISDIR(mode) else 'a device or a pipe'}; name a file to write")


def _no_room(words: str) -> str:
    """Return why a library could not write a file, "" where it was for another reason than room."""
    full = any(text in words for text in ("No space left", "File too large", "quota", "PytorchStreamWriter", "unexpected pos"))
    return "no room, or a limit on the size of files (ulimit -f)" if full else ""


def _write_whole(target: Path, prefix: str, write: Callable[[Path], object]) -> None:
    with tempfile.TemporaryDirectory(prefix=prefix, suffix=".tmp", dir=target.parent, ignore_cleanup_errors=True) as room:
        temporary = Path(room, target.name)
        write(temporary)
        temporary.chmod(0o666 & ~_umask())  # safetensors makes private files; results are meant to be shared
        os.replace(temporary, target)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read_text(path: str | os.PathLike[str], most: int = 64 * 2**20, encoding: str = "utf-8-sig") -> str:
    """Return the content of a text file that somebody else wrote.

    Args:
        path: a regular file: a named pipe would be waited for, and a device never ends.
        most: bytes that such a file may have.
        encoding: of the text.

    Raises:
        DataError: it is missing, no file, too large or no text; the message says which, without a remedy.
    """
    try:
        file = Path(path)
        if file.exists() and not file.is_file():
            raise DataError(f"{path} is not a file")
        if file.stat().st_size > most:
            raise DataError(f"{path} has more than {most:,} bytes")
        return file.read_text(encoding=encoding)
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text") from error
    except (OSError, ValueError) as error:  # ValueError: NUL in the path
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def read_json(fpath: str | os.PathLike[str]) -> Any:
    """Return the content of a JSON file.

    Raises:
        DataError: the file is missing, no file of text, or isn't JSON; the message names it.
    """
    try:
        text = read_text(fpath)
    except DataError as error:
        raise DataError(f"{error}; check the path") from error
    try:
        return parse_json(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{fpath} is not valid JSON ({error}); fix it or make it anew") from error


def write_json(obj: Any, fpath: str | os.PathLike[str]) -> None:
    """Write ``obj`` as JSON, whole or not at all; folders are made where missing."""
    text = json_text(json.dumps(obj, indent=4, ensure_ascii=False)) + "\n"
    atomic_write(fpath, lambda path: path.write_text(text, encoding="utf-8"))


def collect_env_info() -> str:
    """Return the versions that decide a result, on one line."""
    found = [f"python {platform.python_version()}", f"torch {torch.__version__}"]
    found += [_installed(package) for package in ("promptmix", "torchvision", "open_clip_torch", "numpy", "pillow")]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    found += [f"gpu {device}", f"threads {torch.get_num_threads()}", f"{platform.system()} {platform.machine()}"]
    return ", ".join(found)


@cache
def _installed(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} (not installed)"
