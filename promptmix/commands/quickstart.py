"""``promptmix quickstart``: methods side by side on the embedded pictures, base to new classes, with no download."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from promptmix.commands.configure import make_config

if TYPE_CHECKING:
    from yacs.config import CfgNode

    from promptmix.results import RunResult

CONFIG = "configs/quickstart.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add = parser.add_argument
    add("--output-dir", default="output/quickstart", help="runs go to OUTPUT/TRAINER/seedN/{base,new}")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3], metavar="N", help="default: 1 2 3")
    add("--trainers", nargs="+", default=["ZeroshotCLIP", "CoOp", "MoCoOp"], metavar="NAME", help="methods to compare")
    add("--config-file", default=CONFIG, metavar="YAML", help=f"default: {CONFIG}")
    add("--device", choices=("auto", "cpu", "cuda"), help="where to compute")
    add("--plugin", action="append", default=[], metavar="MODULE|FILE", help="load a plugin; may be repeated")
    add("--format", default="github", help="format of the table, as in `promptmix parse`")


def run(args: argparse.Namespace) -> int:
    """Run every method and seed that has not finished before, then print the table."""
    from promptmix import config, results, tables

    started = time.monotonic()
    plan = [(trainer, seed) for trainer in args.trainers for seed in args.seeds]
    for trainer, seed in plan:  # a wrong name or setting shows now, not after the first methods have run
        config.validate(_config(args, trainer, seed, "base"))
    progress = _Progress(total=2 * len(plan))
    done: list[RunResult] = []
    try:
        for trainer, seed in plan:
            done += _base_and_new(args, trainer, seed, progress)
    finally:
        progress.close()
    rows, metrics, notes = tables.aggregate(done)
    sys.stdout.write(f"\n{tables.render(rows, metrics, args.format, sort='time')}\n")
    for note in notes:
        sys.stderr.write(f"note: {note}\n")
    took = f"{len(done)} runs in {time.monotonic() - started:.0f} s"
    sys.stdout.write(f"\n{took}; each has its {results.FILE_NAME} and log.txt below {args.output_dir}\n")
    return 0


def _config(args: argparse.Namespace, trainer: str, seed: int, part: str) -> CfgNode:
    """Return the config of one run; what sets a key is remembered under the name of the flag."""
    flags: dict[str, tuple[str, Any]] = {
        "--trainers": ("TRAINER.NAME", trainer),
        "--seeds": ("SEED", seed),
        "--device": ("DEVICE", args.device),
        "quickstart": ("DATASET.SUBSAMPLE_CLASSES", part),
        "--output-dir": ("OUTPUT_DIR", str(Path(args.output_dir, trainer, f"seed{seed}", part))),
    }
    return make_config([args.config_file], flags, [], args.plugin)


def _base_and_new(args: argparse.Namespace, trainer: str, seed: int, progress: _Progress) -> list[RunResult]:
    """Train on the base classes, then test the very same learned tensors on the new ones."""
    from promptmix.run import finished
    from promptmix.run import run as run_one

    found: list[RunResult] = []
    for part in ("base", "new"):
        cfg = _config(args, trainer, seed, part)
        progress.begin(f"{trainer} seed {seed} {part}")
        result = finished(cfg)
        # New classes are tested with what the base run learned: a base run that just ended makes an old test stale.
        if result is not None and (part == "base" or result.started >= found[0].finished):
            progress.end(result, "finished before")
            found.append(result)
            continue
        options: dict[str, Any] = {}
        if part == "new":
            learned = found[0].learned_parameters
            model_dir = found[0].config["OUTPUT_DIR"] if learned else ""
            options = {"eval_only": True, "model_dir": model_dir, "load_epoch": cfg.OPTIM.MAX_EPOCH}
        command = ["promptmix", *args.argv]
        result = run_one(cfg, quiet=True, on_epoch=progress.epoch, command=command, **options)
        progress.end(result, f"{result.seconds['total']:.1f} s")
        found.append(result)
    return found


class _Progress:
    """One line per run, redrawn after each epoch where there is a terminal."""

    def __init__(self, total: int) -> None:
        self._out = sys.stdout  # the runs redirect theirs into their logs
        self._total = total
        self._done = 0
        self._line = ""
        self._open = False

    def begin(self, name: str) -> None:
        self._done += 1
        self._line = f"[{self._done}/{self._total}] {name}"
        self._redraw("...")

    def epoch(self, trainer: Any) -> None:  # noqa: ANN401  (a trainer with Dassl's interface)
        self._redraw(f"epoch {trainer.epoch + 1}/{trainer.max_epoch}")

    def close(self) -> None:
        """End a line that a failed run left open."""
        if self._open:
            self._out.write("\n")
            self._open = False

    def end(self, result: RunResult, remark: str) -> None:
        shown = result.metrics.get("test", {})
        numbers = f"accuracy {shown['accuracy']:.1f}%" if "accuracy" in shown else "no test"
        if "macro_accuracy" in shown:
            numbers += f", class-balanced {shown['macro_accuracy']:.1f}%"
        start = "\r\033[K" if self._out.isatty() else ""
        self._out.write(f"{start}{self._line}: {numbers} ({remark})\n")
        self._out.flush()
        self._open = False

    def _redraw(self, state: str) -> None:
        if self._out.isatty():
            self._out.write(f"\r\033[K{self._line}: {state}")
            self._out.flush()
            self._open = True
