"""``promptmix bench kill``: runs that are killed at random moments and started again, against the same runs unbroken.

Each trial takes one way to train (with or without augmentation, cached views, the best validated model, checkpoints in between),
kills it by SIGKILL, SIGTERM or SIGINT a few times, each time with another number of workers, and lets it end. Then every
checkpoint and every number must be those of the unbroken run bit for bit, and nothing else may be left.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import runpy
import signal
import sys
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from promptmix.engine.checkpoint import load_checkpoint
from promptmix.errors import UserError
from promptmix.runs.results import CONFIG_NAME, FILE_NAME

__all__ = ["Trial", "differences", "run", "trials"]

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
#: What a run may differ in and be the same: when and where it ran, and with how many workers.
_NOT_COMPARED = ("started", "finished", "seconds", "peak_memory_mb", "command", "config", "config_sources", "checkpoint")
_AUGMENT = "('random_resized_crop','random_flip','colorjitter','normalize')"
_PRELOAD = ["open_clip", "torch.utils.tensorboard", "promptmix.runs.run", "promptmix.prompts.trainer"]


@dataclass
class Trial:
    """One run that was killed and started again until it ended.

    Attributes:
        method: name of the trainer.
        place: its run folder.
        way: settings of the run.
        kills: signals that hit it.
        wrong: how it differs from the unbroken run; empty = nothing.
    """

    method: str
    place: Path
    way: tuple[str, ...]
    kills: list[str]
    wrong: list[str]


def run(args: Namespace, folder: Path) -> int:
    """Do the trials, print a line for each method, and return 1 if a run came out differently."""
    if args.kills < 1:
        raise UserError(f"--kills is {args.kills}, but must be at least 1")
    failed = 0
    for method in args.methods:
        done = Counter[str]()
        for trial in trials(method, args.kills, folder / method, args):
            done["runs"] += 1
            done["kills"] += len(trial.kills)
            done["equal"] += len(trial.kills) if not trial.wrong else 0
            done.update(trial.kills)
            if trial.wrong:
                failed += 1
                shown = f"{method}, {' '.join(trial.way)}, {', '.join(trial.kills)}"
                sys.stdout.write(f"DIFFERS: {shown}: {'; '.join(trial.wrong[:5])}\n")
            sys.stdout.flush()
        kinds = ", ".join(f"{done[name]} {name}" for name in sorted({one.name for one in SIGNALS}))
        sys.stdout.write(
            f"{method}: {done['kills']} kills ({kinds}) in {done['runs']} runs, {done['equal']} resumed bit for bit\n"
        )
        sys.stdout.flush()
    return int(failed > 0)


def trials(method: str, kills: int, folder: Path, args: Namespace) -> Iterator[Trial]:
    """Yield trials of a method until ``kills`` kills have hit.

    Args:
        method: name of the trainer.
        kills: how many.
        folder: where runs go; made.
        args: ``epochs``, ``shots``, ``threads``, ``workers`` and ``seed`` of the trials.
    """
    draw = random.Random(f"{method} {args.seed}")
    unbroken: dict[tuple[str, ...], tuple[Path, float]] = {}
    can_cache = _ends(method, _settings(**{"INPUT.CACHED_VIEWS": 1}), folder / "views", args)
    hits = number = 0
    while hits < kills:
        way = _way(draw, args, can_cache)
        if way not in unbroken:
            place, begin = folder / f"whole{len(unbroken)}", time.monotonic()
            if not _ends(method, way, place, args):
                raise UserError(f"bench kill: {method} {' '.join(way)} can't run even unbroken; try it with `promptmix train`")
            unbroken[way] = place, time.monotonic() - begin
        whole, seconds = unbroken[way]
        place, number = folder / f"trial{number}", number + 1
        found: list[str] = []
        wrong: list[str] = []
        wanted = min(draw.randint(1, 3), kills - hits)
        while len(found) < wanted:
            child = _start(method, way, place, args, draw.choice(args.workers))
            child.join(draw.uniform(0, seconds))
            if child.exitcode is not None:
                break  # it ended before it was hit
            hit = draw.choice(SIGNALS)
            os.kill(child.pid or 0, hit)
            child.join()
            found.append(hit.name)
            if child.exitcode not in (0, -hit, 128 + hit):  # it may have ended in time, or not have begun to listen
                wrong.append(f"{hit.name} ended it with {child.exitcode}")
        if not _ends(method, way, place, args, draw.choice(args.workers)):
            wrong.append("it could not go on")
        hits += len(found)
        if found:
            yield Trial(method, place, way, found, wrong + differences(whole, place))


def _settings(**keys: object) -> tuple[str, ...]:
    return tuple(str(part) for pair in keys.items() for part in pair)


def _way(draw: random.Random, args: Namespace, can_cache: bool) -> tuple[str, ...]:
    """Return settings of one run."""
    return _settings(
        **{
            "TEST.FINAL_MODEL": draw.choice(("last_step", "best_val")),
            "TRAIN.CHECKPOINT_FREQ": draw.choice((0, 1, 2)),
            "INPUT.TRANSFORMS": draw.choice((_AUGMENT, "('center_crop','normalize')")),
            "INPUT.CACHED_VIEWS": draw.choice((0, 2, args.epochs) if can_cache else (0,)),
            "INPUT.FEATURE_CACHE": draw.choice((True, False)) if can_cache else False,
        }
    )


def _ends(method: str, way: tuple[str, ...], place: Path, args: Namespace, workers: int = 0) -> bool:
    """Run to the end; tell whether all went well."""
    child = _start(method, way, place, args, workers)
    child.join()
    return child.exitcode == 0


def _start(method: str, way: tuple[str, ...], place: Path, args: Namespace, workers: int) -> BaseProcess:
    """Start a run, or go on with it, in a process that has imported everything already."""
    sizes = _settings(**{"OPTIM.MAX_EPOCH": args.epochs, "DATASET.NUM_SHOTS": args.shots, "DATALOADER.NUM_WORKERS": workers})
    config = f"configs/trainers/{method}/tiny.yaml"
    argv = ["train", "--config-file", config, "--trainer", method, "--seed", "1", "--output-dir", str(place), "--device", "cpu"]
    # Of their own, so that some are cold when a run is killed.
    cache = ("INPUT.FEATURE_CACHE_DIR", str(place) + "-features")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    child = context.Process(target=_work, args=([*argv, *sizes, *way, *cache], args.threads))
    child.start()
    return child


def _work(argv: list[str], threads: int) -> None:
    """Be the process of one command; what it prints is not wanted."""
    multiprocessing.set_start_method(None, force=True)  # workers start as in a process of its own
    nothing = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nothing, stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server that we are forked from ignores it
    torch.set_num_threads(threads)
    sys.argv[1:] = argv
    runpy.run_module("promptmix.cli", run_name="__main__")


# Comparison


def differences(whole: Path, broken: Path) -> list[str]:
    """Say how two run folders differ: in a tensor or value of a checkpoint, a number of the result, or the files there are."""
    found: list[str] = []
    names = {place: sorted(_checkpoints(place)) for place in (whole, broken)}
    if names[whole] != names[broken]:
        found.append(f"checkpoints {', '.join(names[broken])} instead of {', '.join(names[whole])}")
    for name in sorted(set(names[whole]) & set(names[broken])):
        if (whole / name).name == "checkpoint":
            same = (whole / name).read_bytes() == (broken / name).read_bytes()
        else:
            same = _same(load_checkpoint(whole / name), load_checkpoint(broken / name))
        found += [] if same else [f"{name} differs"]
    if not (broken / FILE_NAME).is_file():
        return [*found, f"no {FILE_NAME}"]
    one, other = (json.loads((place / FILE_NAME).read_text(encoding="utf-8")) for place in (whole, broken))
    found += [
        f"{key}: {other.get(key)!r} instead of {one[key]!r}"
        for key in one
        if key not in _NOT_COMPARED and one[key] != other.get(key)
    ]
    known = {FILE_NAME, CONFIG_NAME, "tensorboard", *(name.partition("/")[0] for name in names[whole])}
    left = [path.name for path in broken.iterdir() if path.name not in known and not path.name.startswith("log.txt")]
    left += [path.name for path in broken.glob("*/.*")]
    left += [path.name for path in broken.parent.glob(f".{broken.name}*")]
    return found + ([f"left behind: {', '.join(left)}"] if left else [])


def _checkpoints(place: Path) -> Iterator[str]:
    for pattern in ("*/*.pth.tar*", "*/checkpoint"):
        for path in place.glob(pattern):
            yield str(path.relative_to(place))


def _same(one: Any, other: Any) -> bool:  # noqa: ANN401  (what a checkpoint holds)
    """Tell whether two trees of tensors and plain values are equal to the last bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and list(one) == list(other) and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(_same, one, other))
    return type(one) is type(other) and bool(one == other)
