"""``promptmix eval RUN``: test a run's checkpoint again, on its own data or on other data, with nothing retyped."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from promptmix.commands.train import set_threads, split_arguments
from promptmix.errors import ConfigError

__all__ = ["add_arguments", "run", "split_arguments"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add = parser.add_argument
    add("run", metavar="RUN", help="output folder of the run")
    about = "other data: a data set's name or YAML file, a folder with a folder for each class, or a CSV file; all own pictures "
    about += "that come without parts are tested"
    add("--on", default="", metavar="DATA", help=about)
    add("--root", default="", help="folder of the data sets; default: the run's")
    add("--load-epoch", type=int, metavar="N", help="the checkpoint of this epoch; default: the one that the run was tested with")
    add("--skip-bad", action="store_const", const=True, help="leave out missing or damaged pictures instead of stopping")
    add("--split", choices=("test", "val"), default="", help="what is evaluated; default: as the run, mostly test")
    add("--calibrate", action="store_true", help="also fit a temperature on the val part and keep it, for `promptmix predict`")
    add("--weights", default="", metavar="FILE", help="the backbone's file, where the run had one of its own")
    add(
        "--output-dir",
        default="",
        metavar="DIR",
        help="default: RUN/eval/<what is evaluated>; of packed prompts output/eval/NAME/...",
    )
    add("--device", choices=("auto", "cpu", "cuda"), help="where to compute; default: as the run")
    add("--threads", type=int, metavar="N", help="CPU threads; default: as PyTorch chooses")
    add("--plugin", action="append", default=[], metavar="MODULE|FILE", help="load a plugin; may be repeated")
    add("opts", nargs="*", metavar="KEY VALUE", help="config overrides at the end (DATASET.SUBSAMPLE_CLASSES new)")


def run(args: argparse.Namespace) -> int:
    """Evaluate and print the numbers.

    Raises:
        UserError: something that can't be done.
    """
    if args.calibrate and args.on:
        raise ConfigError(
            f"--calibrate fits on the run's own val part; leave out --on {args.on}, or do the two one after another"
        )
    set_threads(args.threads)
    from promptmix.runs import calibration
    from promptmix.runs.again import read_config
    from promptmix.runs.hub import NOTE, place_of
    from promptmix.runs.progress import Lines, warnings_to
    from promptmix.runs.protocols import title
    from promptmix.runs.run import running

    args.run = str(place_of(args.run))
    what = title(args.on.rstrip("/")).rpartition("/")[2] or args.on if args.on else args.split or "test"
    # A packed folder is passed on: what is found out here stays out of it.
    place = Path("output", "eval", Path(args.run).name) if Path(args.run, NOTE).is_file() else Path(args.run, "eval")
    folder = args.output_dir or str(place / (Path(what).stem or "data"))
    flags: dict[str, tuple[str, Any]] = {
        "--root": ("DATASET.ROOT", args.root),
        "--skip-bad": ("DATASET.SKIP_BAD", args.skip_bad),
        "--split": ("TEST.SPLIT", args.split),
        "--weights": ("MODEL.BACKBONE.WEIGHTS", args.weights),
        "--device": ("DEVICE", args.device),
        "--output-dir": ("OUTPUT_DIR", folder),
    }
    cfg = read_config(args.run, flags, args.opts, args.plugin, evaluates=True, on=args.on)
    options: dict[str, Any] = {"eval_only": True, "model_dir": args.run, "load_epoch": args.load_epoch, "quiet": True}
    options |= {"command": ["promptmix", *args.argv], "plugins": tuple(args.plugin)}
    if args.on and cfg.DATASET.NAME in ("ImageFolder", "CSV"):
        options["labels"] = {"title": Path(what).stem}
    progress = Lines(total=1)
    progress.next(f"{cfg.TRAINER.NAME} on {what}")
    found = None
    try:
        with warnings_to(sys.stdout), running(cfg, **options) as (trainer, result):
            trainer.test()
            found = calibration.calibrate(trainer, args.run, args.load_epoch) if args.calibrate else None
        progress.end(result, skipped=False)
    finally:
        progress.close()
    names = result.vocabulary.get("classnames", [])
    sys.stdout.write(f"among {len(names)} classes; {folder} has its results.json and log.txt\n")
    if args.calibrate:
        kept = f"; kept in {Path(args.run, calibration.FILE)}" if found is not None else ""
        sys.stdout.write(calibration.in_words(found) + kept + "\n")
    return 0
