"""What a run leaves on the console and in its folder: ``log.txt``, ``run_config.yaml``, or nothing where it is refused."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import yaml
from yacs.config import CfgNode as CN

from promptmix.engine.log import Logger, RunLog, log_file
from promptmix.engine.run_folder import RunFolder
from promptmix.errors import TrainingError, UserError
from promptmix.files.links import open_own
from promptmix.runs.results import CONFIG_NAME
from promptmix.utils import ConsoleHandler, atomic_write, get_logger

#: PyYAML's own writer in C, where it was built with it: the same text in a quarter of the time.
_Dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


class Output:
    """The run's folder and log: keeps what is logged until ``open``, then writes it to ``log.txt``.

    A user error takes away what this run made, so that nothing half-written stays behind, unless a run can go on from it.

    Args:
        directory: the run's output folder.
        quiet: send nothing to the console, only to the log.
        prints: the trainer is of a program that prints, so that the log is what is printed.
    """

    def __init__(self, directory: str, quiet: bool, prints: bool = False) -> None:
        self._directory = Path(directory)
        self._around = contextlib.ExitStack()
        self._quiet, self._prints = quiet, prints
        self._log: RunLog | _Printed = _Printed() if prints else RunLog()
        self._made: list[Path] = []

    def __enter__(self) -> Output:
        enter = self._around.enter_context
        if self._prints:
            if self._quiet:
                enter(contextlib.redirect_stdout(io.StringIO()))
            enter(_console(logging.DEBUG))  # the log is what is printed
        else:
            enter(_console(logging.CRITICAL + 1 if self._quiet else logging.INFO))
        enter(self._log)
        if self._quiet:
            enter(contextlib.redirect_stderr(_ToLog()))
        return self

    def open(self, cfg: CN) -> None:
        """Make the folder, the config and the log, and write there what was logged so far.

        Args:
            cfg: what the run was asked to do.

        Raises:
            UserError: the folder can't be made or written; choose another ``--output-dir``.
        """
        note, log = self._directory / CONFIG_NAME, log_file(self._directory / "log.txt")
        missing = [path for path in (note, self._directory, *self._directory.parents) if not path.exists()]
        try:
            text = yaml.dump(_plain(cfg), Dumper=_Dumper)
            atomic_write(note, lambda path: path.write_text(text, encoding="utf-8"))
            self._log.open(log)
        except OSError as error:
            raise UserError(f"OUTPUT_DIR {self._directory}: {error.strerror or error}; choose another --output-dir") from error
        self._made = [log, *missing]

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._around.close()
        if isinstance(error, UserError) and not (isinstance(error, TrainingError) or RunFolder(self._directory).has_trained()):
            # The log shows how a loss came to be NaN; what can go on, as from a full disk, needs its config.
            for path in self._made:
                with contextlib.suppress(OSError):  # a folder that got a checkpoint stays
                    path.rmdir() if path.is_dir() else path.unlink()


def _plain(node: Any) -> Any:  # any config value
    return {key: _plain(value) for key, value in node.items()} if isinstance(node, CN) else node


class _Printed(contextlib.AbstractContextManager["_Printed"]):
    """The log of a program that prints (a checkout of CoOp, a trainer in Dassl's idiom): all that reaches standard output."""

    def __init__(self) -> None:
        self._tee = Logger()
        self._tee.file = io.StringIO()

    def open(self, path: Path) -> None:
        """Write what was kept, and what comes, to the new file ``path``."""
        early = cast(io.StringIO, self._tee.file).getvalue()
        self._tee.file = open_own(path, buffering=1)
        self._tee.file.write(early)

    def __enter__(self) -> _Printed:
        self._tee.console = sys.stdout
        sys.stdout = self._tee
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._tee.close()


class _ToLog(io.TextIOBase):
    """A standard error whose text goes to the log, and which is never a terminal."""

    def write(self, text: str) -> int:
        """Log the lines of ``text``."""
        for line in text.splitlines():
            if line.strip():
                get_logger().debug("%s", line)
        return len(text)


@contextlib.contextmanager
def _console(level: int) -> Iterator[None]:
    """Let the console show messages of at least this level."""
    found = next(handler for handler in get_logger().handlers if isinstance(handler, ConsoleHandler))
    before = found.level
    found.setLevel(level)
    try:
        yield
    finally:
        found.setLevel(before)
