"""``promptmix estimate``: expected memory and time of a run, with the flags of ``promptmix train``, before it runs."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from promptmix.commands import train
from promptmix.config.flags import make_config
from promptmix.errors import ConfigError

split_arguments = train.split_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of ``promptmix train``."""
    train.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Build what the run would build, count a step, and print.

    Raises:
        UserError: the run could not be built, or its trainer is no prompt trainer.
    """
    from promptmix import config
    from promptmix.cost.estimate import estimate
    from promptmix.engine import build_trainer
    from promptmix.prompts.trainer import PromptTrainer

    for flag in ("--eval-only", "--model-dir", "--load-epoch"):
        if getattr(args, flag[2:].replace("-", "_")) not in (False, "", None):
            raise ConfigError(f"{flag} is for a test, but estimate counts a training; leave it out")
    train.set_threads(args.threads)
    values: dict[str, Any] = vars(args)
    flags = {flag: (key, values[flag[2:].replace("-", "_")]) for flag, key in train.FLAGS.items()}
    cfg = make_config([args.dataset_config_file, args.config_file], flags, [*args.opts, "VERBOSE", "False"], args.plugin)
    train.check_names(cfg)
    config.validate(cfg)
    trainer = build_trainer(cfg)
    if not isinstance(trainer, PromptTrainer):
        raise ConfigError(f"TRAINER.NAME {cfg.TRAINER.NAME} is no prompt trainer of promptmix, so its steps can't be counted")
    found = estimate(trainer)
    epochs = cfg.OPTIM.MAX_EPOCH
    lines = (
        f"step: {found.step_gflops:,.0f} GFLOP; calibration: {found.gflops_per_second:,.0f} GFLOP/s",
        f"memory: {found.step_mb:,.0f} MiB for a step beside {found.weights_mb:,.0f} MiB of weights, and PyTorch itself",
        f"reading a picture: {1000 * found.seconds_per_picture:.1f} ms in one process",
        f"epoch: {found.batches} steps, {found.epoch_seconds:,.1f} s; {epochs} epochs: {epochs * found.epoch_seconds:,.0f} s",
    )
    sys.stdout.write("\n".join(lines) + "\n")
    return 0
