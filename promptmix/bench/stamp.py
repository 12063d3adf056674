"""A plugin of suite ``startup``: notes when a run had done its first step and when it had ended."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from promptmix.hookspecs import hookimpl
from promptmix.utils import write_json

FILE_NAME = "stamp.json"
_first: list[float] = []


@hookimpl
def log_scalar() -> None:
    """Note the first of a run, which its first step reports."""
    if not _first:
        _first.append(time.monotonic())


@hookimpl
def after_train(trainer: Any) -> None:
    """Write both moments into the run's folder."""
    write_json({"first": _first.pop(), "end": time.monotonic()}, Path(trainer.cfg.OUTPUT_DIR, FILE_NAME))
