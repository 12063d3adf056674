"""``promptmix convert IN OUT``: a checkpoint from one layout to another, ours or that of the authors' code."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from promptmix.errors import UserError
from promptmix.files.text import harmless


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add = parser.add_argument
    add("source", metavar="IN", help="output folder of a run of promptmix or of the authors' code, a converted one, or hub:NAME")
    add("target", metavar="OUT", help="folder to write; `--model-dir OUT` evaluates it")
    add(
        "--to",
        choices=("promptmix", "coop"),
        default="promptmix",
        help="promptmix: safetensors and JSON; coop: the authors' layout",
    )
    add("--trainer", default="", help="method that wrote IN, where neither its log nor its names tell")
    add("--load-epoch", type=int, metavar="N", help="epoch of the checkpoint; default: the best one, else the last")


def run(args: argparse.Namespace) -> int:
    """Read, rename, write.

    Raises:
        UserError: OUT holds something already, or IN no checkpoint of a known method.
    """
    from promptmix.engine import convert
    from promptmix.plugin_manager import get_plugin_manager
    from promptmix.registry import TRAINER_REGISTRY
    from promptmix.runs.hub import place_of
    from promptmix.runs.results import read_run

    target = Path(args.target)
    if target.is_dir() and any(target.iterdir()):
        raise UserError(f"{target} is not empty; name a new folder")
    if args.trainer:
        get_plugin_manager()
        TRAINER_REGISTRY.get(args.trainer)
    source = place_of(args.source)
    logged = read_run(source)
    learned = convert.read(source, args.load_epoch, args.trainer, logged.trainer if logged else "")
    if args.trainer and learned.trainer != args.trainer:
        raise UserError(f"--trainer {args.trainer}: {learned.source} was written by {learned.trainer}; leave the flag out")
    written = [convert.write_theirs(learned, target)] if args.to == "coop" else convert.write_ours(learned, target)
    count = sum(tensor.numel() for state in learned.models.values() for tensor in state.values())
    sys.stdout.write(f"{harmless(learned.trainer)}, epoch {learned.epoch}: {count:,} numbers from {learned.source}\n")
    for path in written:
        sys.stdout.write(f"-> {path}\n")
    return 0
