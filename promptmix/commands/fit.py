"""``promptmix fit PICTURES``: train on your own pictures, with everything else chosen, and say what was chosen."""

from __future__ import annotations

import argparse
import gc
import shlex
import sys
import time
from typing import TYPE_CHECKING, Any

from promptmix.commands import COMMANDS
from promptmix.commands.train import add_devices, refuse_undivided, split_arguments, start_devices
from promptmix.errors import UserError
from promptmix.files.text import whole

if TYPE_CHECKING:
    from yacs.config import CfgNode

    from promptmix.runs.fit import Wish
    from promptmix.runs.progress import Lines
    from promptmix.runs.results import RunResult

__all__ = ["add_arguments", "run", "split_arguments"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add = parser.add_argument
    add(
        "pictures",
        metavar="PICTURES",
        help="a folder with a folder for each class, or a table (CSV, JSON) with path,label[,split]",
    )
    add("--trainer", default="CoOp", metavar="NAME", help="method; default: CoOp")
    add("--backbone", default="", metavar="NAME", help="CLIP model, such as ViT-B/16; default: the embedded one")
    add("--weights", default="", metavar="FILE", help="file of the backbone's weights, in place of a download")
    add("--shots", default="all", metavar="N", help="training pictures per class; default: all")
    add("--template", action="append", default=[], metavar="TEXT", help='"a photo of a {}."; may be repeated')
    add("--seed", type=int, default=1, help="default: 1")
    add("--output-dir", default="", metavar="DIR", help="runs go to DIR/TRAINER; default: output/<name of the pictures>")
    add("--no-baseline", action="store_true", help="leave out the zero-shot model that the prompts are compared with")
    add("--skip-bad", action="store_const", const=True, help="leave out missing or damaged pictures instead of stopping")
    add("--device", choices=("auto", "cpu", "cuda"), default="", help="where to compute")
    add_devices(parser)
    add("--plugin", action="append", default=[], metavar="MODULE|FILE", help="load a plugin; may be repeated")
    add("opts", nargs="*", metavar="KEY VALUE", help="config overrides at the end (OPTIM.MAX_EPOCH 5)")


def run(args: argparse.Namespace) -> int:
    """Train, test and print the table.

    Raises:
        UserError: something that can't be done; nothing is left behind then.
    """
    code = start_devices(args)
    if code is not None:
        return code
    from promptmix.engine.precision import choose_device
    from promptmix.parallel import group
    from promptmix.runs import fit
    from promptmix.runs.progress import Lines
    from promptmix.tables import tables

    wish = fit.Wish(
        args.pictures,
        args.trainer,
        args.backbone,
        args.weights,
        tuple(args.template),
        _shots(args.shots),
        args.seed,
        args.output_dir,
        args.device,
        args.skip_bad,
        tuple(args.plugin),
        tuple(args.opts),
    )
    cfg = fit.config_of(wish)
    refuse_undivided(args.trainer)
    jobs = [cfg] if args.no_baseline or args.trainer == fit.BASELINE else [cfg, fit.baseline_of(cfg, wish)]
    started, command = time.monotonic(), ["promptmix", *args.argv]
    progress, said = Lines(total=len(jobs)), set[str]()
    try:
        done, arrays = [], False
        with group.joined(choose_device(cfg.DEVICE, cfg.USE_CUDA), args.trainer):
            for job in jobs:
                result, exported = _run(job, wish, progress, command, said, alone=len(jobs) == 1)
                done.append(result)
                arrays = arrays or exported
                gc.collect()  # a trainer refers to itself: its model goes before the next one comes
    finally:
        progress.close()
    rows, metrics, _ = tables.aggregate(done)
    write = sys.stdout.write
    write(f"\n{tables.render(rows, metrics, 'github', sort='test')}\n")
    write(f"\n{time.monotonic() - started:.0f} s. Next:\n" + "".join(f"  {line}\n" for line in _what_next(cfg, wish, arrays)))
    return 0


def _shots(text: str) -> int:
    if text == "all":
        return -1
    try:
        shots = whole(text)
    except ValueError:
        shots = 0
    if shots < 1:
        raise UserError(f"--shots is {text!r}; give a number of pictures from 1 on, or all")
    return shots


def _run(cfg: CfgNode, wish: Wish, progress: Lines, command: list[str], said: set[str], alone: bool) -> tuple[RunResult, bool]:
    """Run one config, unless it has finished before; the first says what was chosen, and none repeats a note.

    Returns:
        Its result, and whether it was trained here to a classifier that can be exported as arrays.
    """
    from promptmix.engine import build_trainer
    from promptmix.parallel import group
    from promptmix.predict.export import has_arrays
    from promptmix.registry import is_prompt_trainer
    from promptmix.runs import fit
    from promptmix.runs.calibration import calibrate, in_words
    from promptmix.runs.progress import warnings_to
    from promptmix.runs.run import finished, running, train_or_test, written
    from promptmix.utils import get_logger

    out = sys.stdout
    trained = wish.trainer == cfg.TRAINER.NAME

    def build(cfg: CfgNode) -> Any:  # a trainer with Dassl's interface
        trainer: Any = build_trainer(cfg)
        if trained:
            for word, line in fit.defaults(cfg, trainer.dm.dataset, wish):
                out.write(f"  {word:<9}  {line}\n")
            out.flush()
        progress.next(cfg.TRAINER.NAME)
        return trainer

    before = finished(cfg)
    group.wait()  # all have looked, before one of them writes
    if before is not None:
        progress.next(cfg.TRAINER.NAME)
        progress.end(before, skipped=True)
        if trained:
            out.write(f"  note: pictures that changed since are not looked at; remove {cfg.OUTPUT_DIR} to train anew\n")
        return before, False
    with warnings_to(out if trained else sys.stderr, said):
        options: dict[str, Any] = {"quiet": True, "build": build, "on_epoch": progress.epoch, "command": command}
        with running(cfg, labels={"title": wish.name}, plugins=wish.plugins, **options) as (trainer, result):
            train_or_test(trainer)
            calibratable = trained and trainer.val_loader is not None and hasattr(trainer, "scores")
            found = calibrate(trainer, cfg.OUTPUT_DIR) if calibratable else None
            exported = trained and is_prompt_trainer(cfg.TRAINER.NAME) and has_arrays(trainer.model)
            if alone and fit.template_is_unread(trainer, wish):
                get_logger().warning(
                    "--template changed nothing: %s reads none, and --no-baseline leaves out what does", cfg.TRAINER.NAME
                )
    result = written(cfg, result)
    progress.end(result, skipped=False)
    if calibratable:
        out.write(f"  {in_words(found)}\n")
    return result, exported


def _what_next(cfg: CfgNode, wish: Wish, arrays: bool) -> list[str]:
    """Return the commands that make use of the run, as far as this promptmix has them and the method allows them."""
    run = shlex.quote(str(cfg.OUTPUT_DIR))
    weights = f" --weights {shlex.quote(cfg.MODEL.BACKBONE.WEIGHTS)}" if cfg.MODEL.BACKBONE.WEIGHTS else ""
    lines = {
        "predict": f"promptmix predict --model-dir {run}{weights} {shlex.quote(wish.pictures)}",
        "eval": f"promptmix eval {run}{weights} --on OTHER_PICTURES",
        "report": f"promptmix report {run}{weights} --root {shlex.quote(str(cfg.DATASET.ROOT))}",
        "export": f"promptmix export {run}{weights} --format npz",
    }
    if not arrays:
        del lines["export"]
    again = f"promptmix fit {shlex.quote(wish.pictures)} --trainer MoCoOp"
    return [line for name, line in lines.items() if name in COMMANDS] + [again] * (wish.trainer != "MoCoOp")
