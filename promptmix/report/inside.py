"""What was learned, for a page: one run of each method that learned something, the first seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from promptmix.errors import DataError, UserError
from promptmix.interpret.look import Insight, look
from promptmix.interpret.opened import Opened, open_run
from promptmix.runs.results import RunResult

__all__ = ["insights"]

MOST = 6


def _opened(folder: Path, **options: Any) -> Opened:
    """Open a run, without its pictures where those of the caller's folder are of other runs."""
    try:
        return open_run(folder, **options)
    except DataError:
        return open_run(folder, **options | {"root": ""})


def insights(runs: list[RunResult], notes: list[str], **options: Any) -> dict[str, Insight]:
    """Look into the first run of each method that trained.

    Args:
        runs: of any methods.
        notes: gets what could not be looked into, and why.
        options: what ``open_run`` takes.

    Returns:
        What was found, by what the run is called.
    """
    first: dict[str, RunResult] = {}
    for run in sorted(runs, key=lambda run: (run.checkpoint is not None, run.seed)):
        if run.learned_parameters and run.source.endswith("results.json"):
            first.setdefault(run.trainer, run)
    found = {}
    best = sorted(first, key=lambda name: -first[name].metrics.get("test", {}).get("accuracy", 0.0))[:MOST]
    for name, run in ((name, run) for name, run in first.items() if name in best):
        try:
            insight = look(_opened(Path(run.source).parent, **options))
        except UserError as error:
            notes.append(f"{name}: what it learned is not told: {error}")
            continue
        found[f"{name}, {run.dataset}, {run.subsample_classes} classes, seed {run.seed}"] = insight
    if len(first) > MOST:
        notes.append(
            f"what was learned is told of the best {MOST} of {len(first)} methods; `promptmix interpret RUN` tells of any"
        )
    return found
