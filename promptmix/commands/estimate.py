"""``promptmix estimate``: expected memory and time of a run, with the flags of ``promptmix train``, before it runs."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from promptmix.commands import train
from promptmix.config.flags import check_count, make_config
from promptmix.cost.gpu import GPUS, Gpu, bound
from promptmix.errors import ConfigError
from promptmix.files.text import counted

if TYPE_CHECKING:
    from promptmix.cost.estimate import Estimate

split_arguments = train.split_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of ``promptmix train``, and the GPU that is asked about."""
    train.add_arguments(parser)
    about = f"also say what this GPU would need at the least, counted by its data sheet and not measured: {', '.join(GPUS)}"
    parser.add_argument("--gpu", metavar="NAME", help=about)


def run(args: argparse.Namespace) -> int:
    """Build what the run would build, count a step, and print.

    Raises:
        UserError: the run could not be built, or its trainer is not a prompt trainer.
    """
    from promptmix import config
    from promptmix.cost.estimate import estimate
    from promptmix.engine import build_trainer
    from promptmix.prompts.trainer import PromptTrainer

    for flag in ("--eval-only", "--model-dir", "--load-epoch"):
        if getattr(args, flag[2:].replace("-", "_")) not in (False, "", None):
            raise ConfigError(f"{flag} is for a test, but estimate counts a training; leave it out")
    check_count("--devices", args.devices)
    if (args.devices or 1) > 1:
        raise ConfigError(f"--devices {args.devices}: estimate counts a training in one process; leave the flag out")
    for flag, given in (("--coop-repo", args.coop_repo), ("--from-run", args.from_run)):
        if given:
            raise ConfigError(f"{flag} {given}: estimate builds what a --config-file says; leave the flag out and name that file")
    if args.gpu is not None and args.gpu not in GPUS:
        raise ConfigError(f"--gpu {args.gpu!r} is not known; choose one of: {', '.join(GPUS)}")
    train.set_threads(args.threads)
    values: dict[str, Any] = vars(args)
    flags = {flag: (key, values[flag[2:].replace("-", "_")]) for flag, key in train.FLAGS.items()}
    cfg = make_config([args.dataset_config_file, args.config_file], flags, [*args.opts, "VERBOSE", "False"], args.plugin)
    train.check_names(cfg)
    config.validate(cfg)
    trainer = build_trainer(cfg)
    if not isinstance(trainer, PromptTrainer):
        raise ConfigError(f"TRAINER.NAME {cfg.TRAINER.NAME} is not a prompt trainer of promptmix, so its steps can't be counted")
    found = estimate(trainer)
    epochs = cfg.OPTIM.MAX_EPOCH
    step, peak = found.step, "" if found.peak_mb is None else f"; peak of the process {found.peak_mb:,.0f} MiB"
    how = "counted while it ran, since shapes don't tell" if found.ran else "counted by shapes"
    lines = [
        f"step: {step.gflops:,.0f} GFLOP, {step.gigabytes:,.1f} GB moved, {step.operators:,} operators ({how}); "
        f"{found.step_seconds:.3g} s here",
        f"memory: {found.step_mb:,.0f} MiB for a step beside {found.weights_mb:,.0f} MiB of weights, and PyTorch itself{peak}",
        f"reading a picture: {1000 * found.seconds_per_picture:.1f} ms in one process",
        f"epoch: {counted(found.batches, 'step')}, {found.epoch_seconds:,.1f} s; "
        f"{counted(epochs, 'epoch')}: {epochs * found.epoch_seconds:,.0f} s",
    ]
    if args.gpu is not None:
        lines += _on_gpu(found, GPUS[args.gpu], cfg.TRAINER.PREC, epochs)
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def _on_gpu(found: Estimate, gpu: Gpu, precision: str, epochs: int) -> list[str]:
    least = bound(found.step, gpu, precision, found.dispatch_us)
    share = 1.0 if precision == "fp32" else 0.5
    need = (share * found.step_mb + found.weights_mb) * 2**20 / 1e9
    step, whole = 1e3 * least.seconds, epochs * found.batches * least.seconds
    parts = {"arithmetic": least.arithmetic, "memory traffic": least.traffic, "kernels in turn": least.device}
    parts["dispatch by this host"] = least.host
    return [
        f"on one {gpu.name}, {precision}, counted and not measured ({gpu.source}):",
        f"  a step takes at least {step:.3g} ms, limited by {least.limit}: "
        + ", ".join(f"{name} {1e3 * seconds:.3g}" for name, seconds in parts.items()),
        f"  {counted(epochs, 'epoch')}: at least {whole:,.0f} s without reading; "
        f"{need:.1f} of {gpu.memory_gb:.0f} GB beside PyTorch itself",
    ]
