"""TensorBoard: every scalar of a run as an event file in ``<OUTPUT_DIR>/tensorboard``, where Dassl puts it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from promptmix import hookimpl

if TYPE_CHECKING:
    from promptmix.engine import TrainerBase


@hookimpl
def log_scalar(trainer: TrainerBase, tag: str, value: float, step: int | None) -> None:
    """Add the number to the event file; before training opens one (an evaluation alone) there is nothing to add to."""
    if trainer._writer is not None:
        trainer._writer.add_scalar(tag, value, step)
