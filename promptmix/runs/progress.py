"""Progress on standard output: lines that are redrawn where there is a terminal, and plain lines elsewhere."""

from __future__ import annotations

import contextlib
import logging
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, TextIO

from tabulate import tabulate

from promptmix.files.text import harmless
from promptmix.runs.protocols import Job, Part, Watcher, title

if TYPE_CHECKING:
    from promptmix.runs.backends import Outcome
    from promptmix.runs.results import RunResult


def numbers(result: RunResult) -> str:
    """Return the accuracies of a result in words."""
    shown = result.metrics.get("test", {})
    if "openworld_auc" in shown:
        return f"OpenworldAUC {shown['openworld_auc']:.1f}%"
    text = f"accuracy {shown['accuracy']:.1f}%" if "accuracy" in shown else "no test"
    return text + (f", class-balanced {shown['macro_accuracy']:.1f}%" if "macro_accuracy" in shown else "")


@contextlib.contextmanager
def warnings_to(stream: TextIO, said: set[str] | None = None) -> Iterator[None]:
    """Show warnings on ``stream`` too, while a quiet run sends its lines to its log; those of ``said`` not once more."""
    said = set() if said is None else said

    def show(record: logging.LogRecord) -> bool:
        line = harmless(record.getMessage())
        if record.levelno >= logging.WARNING and line not in said:
            stream.write(f"  note: {line}\n")
            said.add(line)
        return True

    from promptmix.utils import get_logger  # here, as progress of other processes needs no torch

    logger = get_logger()
    logger.addFilter(show)
    try:
        yield
    finally:
        logger.removeFilter(show)


class Lines(Watcher):
    """One line per run of jobs that run one after another in this process.

    Args:
        total: number of runs.
    """

    def __init__(self, total: int) -> None:
        self._out = sys.stdout  # the runs redirect theirs into their logs
        self._total = total
        self._done = 0
        self._line = ""
        self._open = False

    def begin(self, job: Job, part: Part) -> None:
        """Name the run."""
        self.next(f"{job.name} {part.name}")

    def next(self, name: str) -> None:
        """Begin the line of another run."""
        self._done += 1
        self._line = f"[{self._done}/{self._total}] {name}"
        self._redraw("...")

    def epoch(self, trainer: Any) -> None:
        """Show how far the training is."""
        self._redraw(f"epoch {trainer.epoch + 1}/{trainer.max_epoch}")

    def end(self, result: RunResult, skipped: bool) -> None:
        """Show the numbers."""
        remark = "finished before" if skipped else f"{result.seconds['total']:.1f} s"
        start = "\r\033[K" if self._out.isatty() else ""
        self._out.write(f"{start}{self._line}: {numbers(result)} ({remark})\n")
        self._out.flush()
        self._open = False

    def close(self) -> None:
        """End a line that a failed run left open."""
        if self._open:
            self._out.write("\n")
            self._open = False

    def _redraw(self, state: str) -> None:
        if self._out.isatty():
            self._out.write(f"\r\033[K{self._line}: {state}")
            self._out.flush()
            self._open = True


class Grid:
    """The state of a sweep: a line for each job that ended and, on a terminal, a table that is drawn anew below them.

    Args:
        jobs: all jobs of the sweep.
        log: file that gets the lines too.
    """

    def __init__(self, jobs: Sequence[Job], log: TextIO) -> None:
        self._jobs = jobs
        self._log = log
        self._state = ["waiting"] * len(jobs)
        self._ended = 0
        self._drawn = 0
        self._live = sys.stdout.isatty()

    def started(self, index: int) -> None:
        """A job was given to a backend."""
        self._state[index] = "running"
        self._draw()

    def ended(self, index: int, outcome: Outcome, remark: str = "") -> None:
        """A job is over."""
        self._ended += 1
        self._state[index] = "failed" if outcome.error else "done"
        job = self._jobs[index]
        shown = ", ".join(f"{part} {number:.1f}%" for part, number in outcome.numbers.items())
        what = f"FAILED: {outcome.error}" if outcome.error else shown or "done"
        self.say(f"[{self._ended}/{len(self._jobs)}] {job.protocol} {job.name}: {what} ({remark or f'{outcome.seconds:.1f} s'})")

    def say(self, line: str) -> None:
        """Write a line above the table, and into the log."""
        self._erase()
        sys.stdout.write(harmless(line) + "\n")
        self._log.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {harmless(line)}\n")
        self._log.flush()
        self._draw()

    def close(self) -> None:
        """Take the table away."""
        self._erase()
        sys.stdout.flush()

    def table(self) -> str:
        """Return how far each method is on each data set: ended of all, and what runs or failed."""
        columns = list(dict.fromkeys(title(job.dataset) for job in self._jobs))
        cells: dict[tuple[str, str], dict[str, Counter[str]]] = {}
        for job, state in zip(self._jobs, self._state, strict=True):
            row = cells.setdefault((job.protocol, " ".join(filter(None, (job.trainer, job.variant)))), {})
            row.setdefault(title(job.dataset), Counter())[state] += 1
        rows = [[*key, *(_cell(row.get(column, Counter())) for column in columns)] for key, row in cells.items()]
        return tabulate(rows, headers=["Protocol", "Method", *columns], tablefmt="simple", disable_numparse=True)

    def _draw(self) -> None:
        if self._live:
            self._erase()
            # A line that wraps could not be erased again.
            width, height = shutil.get_terminal_size()
            lines = [line[: width - 1] for line in self.table().splitlines()[: max(1, height - 2)]]
            sys.stdout.write("\n".join(lines) + "\n")
            sys.stdout.flush()
            self._drawn = len(lines)

    def _erase(self) -> None:
        if self._drawn:
            sys.stdout.write(f"\033[{self._drawn}A\033[J")
            self._drawn = 0


def _cell(states: Counter[str]) -> str:
    if not states:
        return ""
    parts = [f"{states['done']}/{states.total()}"]
    parts += [f"{states[state]} {state}" for state in ("running", "failed") if states[state]]
    return ", ".join(parts)
