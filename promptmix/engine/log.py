"""What a run writes down: ``log.txt``, progress bars that keep out of it, and the scalar writer."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO, TypeVar, cast

from tqdm import tqdm

from promptmix.errors import OutputError
from promptmix.files.links import open_own
from promptmix.utils import LineFormatter, get_logger, mkdir_if_missing

__all__ = ["LazyWriter", "Logger", "RunLog", "get_logger", "log_file", "logger_is_on", "progress", "setup_logger"]

T = TypeVar("T")

#: Seconds between two progress lines where there is no terminal to draw a bar on.
_LINE_EVERY = 30.0


class RunLog(logging.Handler):
    """Writes the messages of ``get_logger`` to ``log.txt``; until ``open`` they are kept, so that a refused run leaves no file.

    Use as context manager.
    """

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.setFormatter(LineFormatter())
        self.file: TextIO = io.StringIO()

    def open(self, path: Path) -> None:
        """Write what was kept, and what comes, to the new file ``path``."""
        early, self.file = cast(io.StringIO, self.file).getvalue(), open_own(path, buffering=1)
        self.file.write(early)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a message.

        Raises:
            OutputError: the disk is full, or the file is too large.
        """
        _write(self.file, f"{self.format(record)}\n")

    def __enter__(self) -> RunLog:
        get_logger().addHandler(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        get_logger().removeHandler(self)
        with contextlib.suppress(OSError):  # the disk is full, as the write before said
            self.file.close()


def _write(file: TextIO, text: str) -> None:
    try:
        file.write(text)
    except OSError as error:
        raise OutputError(
            f"{file.name} can't be written: {error.strerror or error}; make room or choose another --output-dir"
        ) from error


class Logger:
    """Dassl's log: a standard output that also writes to a file. Use as context manager, or call ``close`` when done.

    For programs that print; ``RunLog`` is the log of what uses ``get_logger``.

    Args:
        fpath: the log file; its folder is made. ``None`` writes to the console only.
    """

    def __init__(self, fpath: str | os.PathLike[str] | None = None) -> None:
        self.console: TextIO = sys.stdout
        self.file: TextIO | None = None
        if fpath is not None:
            mkdir_if_missing(Path(fpath).parent)
            # Line buffering keeps the log complete when a run is killed.
            self.file = open_own(fpath, buffering=1)

    def write(self, msg: str) -> int:
        """Write to both."""
        if self.file is not None:
            _write(self.file, msg)
        return self.console.write(msg)

    def flush(self) -> None:
        """Flush both."""
        self.console.flush()
        if self.file is not None:
            self.file.flush()

    def close(self) -> None:
        """Close the file and give ``sys.stdout`` back; the console stays open. Closing twice is fine."""
        if sys.stdout is self:
            sys.stdout = self.console
        if self.file is not None:
            with contextlib.suppress(OSError):  # the disk is full, as the write before said
                self.file.close()
            self.file = None

    def __enter__(self) -> Logger:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __getattr__(self, name: str) -> Any:
        # encoding, isatty, fileno and the like are the console's business.
        if name == "console":
            raise AttributeError(name)
        return getattr(self.console, name)


def setup_logger(output: str | os.PathLike[str] | None = None) -> Logger:
    """Send everything printed from now on to ``<output>/log.txt`` as well.

    Args:
        output: a folder, or a file that ends in ``.txt`` or ``.log``. An existing log is kept: the new one gets the
            date in its name. ``None`` changes nothing.

    Returns:
        The open log; ``close()`` it, or use it in a ``with`` statement, to restore ``sys.stdout``.
    """
    if output is None:
        return Logger()
    logger = Logger(log_file(output))
    sys.stdout = logger
    return logger


def log_file(output: str | os.PathLike[str]) -> Path:
    """Return where a run's log goes: ``log.txt`` in its folder (or ``output`` itself); the date behind it, if that is there."""
    path = Path(output)
    if path.suffix not in (".txt", ".log"):
        path = path / "log.txt"
    if os.path.lexists(path):
        path = path.with_name(path.name + time.strftime("-%Y-%m-%d-%H-%M-%S"))
    return path


def progress(items: Iterable[T], desc: str = "", total: int | None = None) -> Iterator[T]:
    """Go through ``items`` with a bar on a terminal, or a line now and then where errors go to a file.

    Both go to standard error, so neither ends up in ``log.txt``.

    Args:
        items: what to go through.
        desc: what is being done, in a word or two.
        total: how many there are; found out by ``len`` where possible.
    """
    if sys.stderr.isatty():
        yield from tqdm(items, desc=desc or None, total=total, file=sys.stderr, leave=False, dynamic_ncols=True)
        return
    if total is None and isinstance(items, Sized):
        total = len(items)
    start = last = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if now - last > _LINE_EVERY:
            of_all = f"/{total}" if total else ""
            sys.stderr.write(f"{desc or 'progress'}: {done}{of_all} after {now - start:.0f} s\n")
            last = now
        yield item


def logger_is_on(trainer: Any, name: str, default: bool = False) -> bool:
    """Tell whether ``LOGGER.<name>.ENABLED`` is True; ``default`` where a trainer, of another program, has no such key."""
    cfg = getattr(trainer, "cfg", {})
    return bool(cfg.get("LOGGER", {}).get(name, {}).get("ENABLED", default))


class LazyWriter:
    """A TensorBoard ``SummaryWriter`` that comes to life at its first use.

    Importing tensorboard costs a second, and a run may log no scalar at all.

    Args:
        log_dir: folder of the event files.
    """

    def __init__(self, log_dir: str) -> None:
        self.log_dir = log_dir
        self._writer: Any = None

    def __getattr__(self, name: str) -> Any:
        # Reached only for what LazyWriter lacks: add_scalar, add_image, add_histogram, ...
        if name.startswith("__"):
            raise AttributeError(name)
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(log_dir=self.log_dir)
        return getattr(self._writer, name)

    def close(self) -> None:
        """Write out and close the event file, if there is one."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
