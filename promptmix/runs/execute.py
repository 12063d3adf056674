"""A job, run in this process: what is missing of it, part by part."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from yacs.config import CfgNode

from promptmix.config.flags import load_plugins
from promptmix.engine.run_folder import RunFolder
from promptmix.parallel import group
from promptmix.registry import PROTOCOL_REGISTRY
from promptmix.runs.protocols import Job, Part, Protocol, Watcher, done_parts, parts, title
from promptmix.runs.results import RunResult
from promptmix.runs.run import finished, run, written


def execute(job: Job, watcher: Watcher | None = None, command: Sequence[str] = ()) -> list[RunResult]:
    """Run what is missing of a job, in this process, or in this and the others that it works with (``group``).

    Args:
        job: what to run.
        watcher: told of every part and epoch.
        command: command line, kept in ``results.json``.

    Returns:
        The result of every part; of a piece, its own.

    Raises:
        UserError: a run that can't be done.
    """
    load_plugins(job.plugins)
    watcher = watcher or Watcher()
    protocol: Protocol = PROTOCOL_REGISTRY.get(job.protocol)
    found: list[RunResult] = []
    # For one that outlived its driver, or a second sweep into the same tree; pieces of a job run side by side.
    shares = job.piece or not group.writes()
    with contextlib.nullcontext() if shares else RunFolder(job.folder).alone(wait=True):
        for part, cfg, result, before in done_parts(job):
            group.wait()  # all have looked what is there, before one of them writes
            watcher.begin(job, part)
            if result is None and protocol.prepare(job, part, cfg, before):
                result = finished(cfg)
            if result is not None:
                if group.writes():
                    _clear(RunFolder(cfg.OUTPUT_DIR))
                watcher.end(result, skipped=True)
                found.append(result)
                continue
            options = _options(job, part, cfg, before) | protocol.options(job, part, before)
            result = run(cfg, quiet=True, on_epoch=watcher.epoch, command=list(command), plugins=job.plugins, **options)
            result = written(cfg, result)
            watcher.end(result, skipped=False)
            found.append(result)
    return found


def _clear(folder: RunFolder) -> None:
    """Remove what a process left that was killed after its last word."""
    with folder.alone():
        folder.tidy()
        folder.drop_progress()


def _options(job: Job, part: Part, cfg: CfgNode, before: Sequence[RunResult]) -> dict[str, Any]:
    """Return what ``promptmix.runs.run.run`` takes for a part."""
    labels = {"protocol": job.protocol, "part": part.name, "title": title(part.dataset), "variant": job.variant}
    if part.trains:
        return {"labels": labels, "new_classes": any(other.classes != part.classes for other in parts(job))}
    if PROTOCOL_REGISTRY.get(job.protocol).targets is not None:
        labels["trained_on"] = title(job.dataset)
    trained = before[0]
    last = None if cfg.TEST.FINAL_MODEL == "best_val" else cfg.OPTIM.MAX_EPOCH
    model_dir = trained.config["OUTPUT_DIR"] if trained.learned_parameters else ""
    return {"labels": labels, "eval_only": True, "model_dir": model_dir, "load_epoch": last}
