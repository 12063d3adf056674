"""TensorBoard: every scalar of a run as an event file in ``<OUTPUT_DIR>/tensorboard``, where Dassl puts it.

TensorBoard is an extra (``pip install 'promptmix[tensorboard]'``); where it is not installed, nothing is written.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from yacs.config import CfgNode

from promptmix import hookimpl
from promptmix.config.declare import Setting, declare
from promptmix.engine.log import logger_is_on

if TYPE_CHECKING:
    from promptmix.engine import SimpleTrainer


@hookimpl
def extend_config(cfg: CfgNode) -> None:
    """Declare the switch."""
    node = cfg.LOGGER.TENSORBOARD = CfgNode()
    declare(node, "ENABLED", True, Setting("write an event file, where TensorBoard is installed"))


@hookimpl
def log_scalar(trainer: SimpleTrainer, tag: str, value: float, step: int | None) -> None:
    """Add the number to the event file; before training opens one (an evaluation alone) there is nothing to add to."""
    wanted = logger_is_on(trainer, "TENSORBOARD", default=True)  # programs of Dassl's expect it
    if trainer._writer is not None and wanted and find_spec("tensorboard"):
        trainer._writer.add_scalar(tag, value, step)
