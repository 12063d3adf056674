"""JSON lines: every scalar of a run as a line of ``<OUTPUT_DIR>/scalars.jsonl``, for programs that draw curves.

A training that was cut off and goes on repeats the batches of the epoch that was lost: the last line of a tag and step counts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from yacs.config import CfgNode

from promptmix import hookimpl
from promptmix.config.declare import Setting, declare
from promptmix.engine.log import logger_is_on
from promptmix.files.links import open_own

if TYPE_CHECKING:
    from promptmix.engine import SimpleTrainer


@hookimpl
def extend_config(cfg: CfgNode) -> None:
    """Declare the switch."""
    node = cfg.LOGGER.JSONL = CfgNode()
    declare(node, "ENABLED", True, Setting("write every scalar into scalars.jsonl"))


@hookimpl
def log_scalar(trainer: SimpleTrainer, tag: str, value: float, step: int | None) -> None:
    """Add a line."""
    if logger_is_on(trainer, "JSONL") and trainer._writer is not None:
        with open_own(Path(trainer.output_dir, "scalars.jsonl"), append=True) as file:
            file.write(json.dumps({"tag": tag, "step": step, "value": value}) + "\n")
