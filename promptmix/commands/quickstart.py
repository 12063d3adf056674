"""``promptmix quickstart``: methods side by side on the embedded pictures, base to new classes, with no download."""

from __future__ import annotations

import argparse
from pathlib import Path

from promptmix.commands.train import set_threads
from promptmix.config.flags import check_count

CONFIG = "configs/quickstart.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add = parser.add_argument
    add("--output-dir", default="output/quickstart", help="runs go to OUTPUT/TRAINER/seedN/{base,new}")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3], metavar="N", help="default: 1 2 3")
    add("--trainers", nargs="+", default=["ZeroshotCLIP", "CoOp", "MoCoOp"], metavar="NAME", help="methods to compare")
    add("--config-file", default=CONFIG, metavar="YAML", help=f"default: {CONFIG}")
    add("--device", choices=("auto", "cpu", "cuda"), default="", help="where to compute")
    add("--jobs", type=int, metavar="N", help="methods and seeds at a time; default: one per CPU, or 1 where there is a GPU")
    add("--threads", type=int, default=1, help="CPU threads; the embedded models are so small that more wait on each other")
    add("--plugin", action="append", default=[], metavar="MODULE|FILE", help="load a plugin; may be repeated")
    add("--format", default="github", help="format of the table, as in `promptmix parse`")


def run(args: argparse.Namespace) -> int:
    """Run every method and seed that has not finished before, then print the table.

    Raises:
        UserError: something that can't be done.
    """
    from promptmix.commands.run import run_all
    from promptmix.runs.backends import begin, cpus
    from promptmix.runs.protocols import Job

    check_count("--jobs", args.jobs)
    check_count("--threads", args.threads)
    if (args.jobs or cpus()) > 1:
        begin(args.threads)
    import torch

    set_threads(args.threads)
    jobs = [
        Job(
            protocol="base-to-new",
            trainer=trainer,
            dataset="",
            folder=str(Path(args.output_dir, trainer, f"seed{seed}")),
            seed=seed,
            config_file=args.config_file,
            plugins=tuple(args.plugin),
            device=args.device,
        )
        for trainer in args.trainers
        for seed in args.seeds
    ]
    at_once = args.jobs or (1 if args.device != "cpu" and torch.cuda.is_available() else min(cpus(), len(jobs)))
    run_all(jobs, args, sort="time", at_once=at_once)
    return 0
