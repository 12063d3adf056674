"""A logger for promptmix."""

from __future__ import annotations

from pathlib import Path

from promptmix import hookimpl
from promptmix.engine import SimpleTrainer


@hookimpl
def log_scalar(trainer: SimpleTrainer, tag: str, value: float, step: int | None) -> None:
    """Add a line to ``<OUTPUT_DIR>/my_part.csv``: tag, number of the batch or epoch, value."""
    with Path(trainer.output_dir, "my_part.csv").open("a", encoding="utf-8") as file:
        file.write(f"{tag},{'' if step is None else step},{value}\n")
