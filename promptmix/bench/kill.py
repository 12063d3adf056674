"""``promptmix bench kill``: runs that are killed at random moments and started again, against the same runs unbroken.

Each trial takes one way to train (with or without augmentation, cached views, the best validated model, checkpoints in between)
through one command (``train``, ``run``, ``sweep`` on this machine or on Ray), kills it by SIGKILL, SIGTERM or SIGINT a few times,
each time with another number of workers, and lets it end. Then every checkpoint and every number must be those of the unbroken
run bit for bit, and nothing else may be left.
"""

from __future__ import annotations

import functools
import itertools
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
import yaml

from promptmix.engine.checkpoint import load_checkpoint
from promptmix.errors import UserError
from promptmix.files.text import one_line
from promptmix.runs.results import FILE_NAME

__all__ = ["COMMANDS", "Trial", "differences", "run", "trials"]

#: Commands that train; ``ray`` is a sweep with ``--backend ray``.
COMMANDS = ("train", "run", "sweep", "ray")
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
#: What a run may differ in and be the same: when and where it ran, and with how many workers.
_NOT_COMPARED = (
    "config_sources",
    "started",
    "finished",
    "seconds",
    "peak_memory_mb",
    "command",
    "replay",
    "config",
    "checkpoint",
)
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
    failed = 0
    for command, method in itertools.product(args.through, args.methods):
        done = Counter[str]()
        for trial in trials(method, args.kills, folder / command / method, args, command):
            done["runs"] += 1
            done["kills"] += len(trial.kills)
            done["equal"] += len(trial.kills) if not trial.wrong else 0
            done.update(trial.kills)
            if trial.wrong:
                failed += 1
                shown = f"{command} {method}, {' '.join(trial.way)}, {', '.join(trial.kills)}"
                sys.stdout.write(f"DIFFERS: {shown}: {'; '.join(trial.wrong[:5])}\n")
            sys.stdout.flush()
        kinds = ", ".join(f"{done[name]} {name}" for name in sorted({one.name for one in SIGNALS}))
        sys.stdout.write(
            f"{command} {method}: {done['kills']} kills ({kinds}) in {done['runs']} runs, {done['equal']} resumed bit for bit\n"
        )
        sys.stdout.flush()
    return int(failed > 0)


def trials(method: str, kills: int, folder: Path, args: Namespace, command: str = "train") -> Iterator[Trial]:
    """Yield trials of a method until ``kills`` kills have hit.

    Args:
        method: name of the trainer.
        kills: how many.
        folder: where runs go; made.
        args: ``epochs``, ``shots``, ``threads``, ``workers`` and ``seed`` of the trials.
        command: one of ``COMMANDS``.
    """
    draw = random.Random(f"{method} {args.seed}")
    start = functools.partial(_start, command, method, args)
    unbroken: dict[tuple[str, ...], tuple[Path, float]] = {}
    can_cache = _ends(
        _start("train", method, args, _settings(**{"INPUT.CACHED_VIEWS": 1, "TEST.NO_TEST": True}), folder / "views")
    )
    hits = number = 0
    while hits < kills:
        way = _way(draw, args, can_cache)
        if way not in unbroken:
            place, begin = folder / f"whole{len(unbroken)}", time.monotonic()
            if not _ends(start(way, place)):
                raise UserError(f"bench kill: {method} {' '.join(way)} can't {command} even unbroken{_last_words(place)}")
            unbroken[way] = place, time.monotonic() - begin
        whole, seconds = unbroken[way]
        place, number = folder / f"trial{number}", number + 1
        found: list[str] = []
        wrong: list[str] = []
        wanted = min(draw.randint(1, 3), kills - hits)
        while len(found) < wanted:
            child = start(way, place, draw.choice(args.workers))
            child.join(draw.uniform(0, seconds))
            if child.exitcode is not None:
                break  # it ended before it was hit
            hit = draw.choice(SIGNALS)
            os.kill(child.pid or 0, hit)
            child.join()
            found.append(hit.name)
            if child.exitcode not in (0, -hit, 128 + hit):  # it may have ended in time, or not have begun to listen
                wrong.append(f"{hit.name} ended it with {child.exitcode}")
        if not _ends(start(way, place, draw.choice(args.workers))):
            wrong.append(f"it could not go on{_last_words(place)}")
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


def _ends(child: BaseProcess) -> bool:
    """Let a run end; tell whether all went well."""
    child.join()
    return child.exitcode == 0


def _last_words(place: Path) -> str:
    """Return the last line that the latest run into ``place`` printed, as the end of a message."""
    lines = Path(f"{place}.txt").read_text(encoding="utf-8", errors="replace").split("\n")
    return next((f": {one_line(line)}" for line in reversed(lines) if line.strip()), "")


def _start(command: str, method: str, args: Namespace, way: tuple[str, ...], place: Path, workers: int = 0) -> BaseProcess:
    """Start a run, or go on with it, in a process that has imported everything already."""
    # The cache is the run's own, so that some are cold when a run is killed.
    more = {"DATALOADER.NUM_WORKERS": workers, "OPTIM.MAX_EPOCH": args.epochs, "INPUT.FEATURE_CACHE_DIR": f"{place}-features"}
    argv = _argv(command, method, str(args.shots), place, (*_settings(**more), *way))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    child = context.Process(target=_work, args=(argv, args.threads, f"{place}.txt"))
    child.start()
    return child


def _argv(command: str, method: str, shots: str, place: Path, settings: tuple[str, ...]) -> list[str]:
    """Return the arguments of ``promptmix`` that train into ``place``."""
    config = f"configs/trainers/{method}/tiny.yaml"
    if command == "train":
        where = ["--seed", "1", "--output-dir", str(place), "--device", "cpu"]
        return ["train", "--config-file", config, "--trainer", method, *where, *settings, "DATASET.NUM_SHOTS", shots]
    if command == "run":
        what = ["--trainer", method, "--datasets", "EmojiFamilies", "--shots", shots, "--seeds", "1", "--config-file", config]
        return ["run", "base-to-new", *what, "--output-dir", str(place), "--device", "cpu", *settings]
    plan = {
        "output": str(place),
        "protocols": ["base-to-new"],
        "trainers": [method],
        "datasets": ["EmojiFamilies"],
        "seeds": [1, 2],
        "shots": [int(shots)],
        "set": dict(zip(settings[::2], settings[1::2], strict=True)),
        "device": "cpu",
    }
    file = Path(f"{place}.yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(plan), encoding="utf-8")
    return ["sweep", str(file), "--jobs", "2", "--threads", "1", "--backend", "ray" if command == "ray" else "local"]


def _work(argv: list[str], threads: int, told: str) -> None:
    """Be the process of one command; what it prints goes to the file ``told``."""
    multiprocessing.set_start_method(None, force=True)  # workers start as in a process of its own
    os.makedirs(os.path.dirname(told), exist_ok=True)
    told_to = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(told_to, stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server that we are forked from ignores it
    torch.set_num_threads(threads)
    sys.argv[1:] = argv
    runpy.run_module("promptmix.cli", run_name="__main__")


# Comparison


def differences(whole: Path, broken: Path) -> list[str]:
    """Say how two trees of runs differ: in a tensor or value of a checkpoint, a number of a result, or the files there are."""
    ours, theirs = _files(whole), _files(broken)
    found = [f"missing: {', '.join(sorted(ours - theirs))}"] if ours - theirs else []
    for name in sorted(ours & theirs):
        one, other = whole / name, broken / name
        if ".pth.tar" in one.name:
            found += [] if _same(load_checkpoint(one), load_checkpoint(other)) else [f"{name} differs"]
        elif one.name == "checkpoint":
            found += [] if one.read_bytes() == other.read_bytes() else [f"{name} differs"]
        elif one.name == FILE_NAME:
            found += [f"{name}: {line}" for line in _other_numbers(one, other)]
    left = [*sorted(theirs - ours), *(path.name for path in broken.parent.glob(f".{broken.name}*"))]
    return found + ([f"left behind: {', '.join(left)}"] if left else [])


def _files(place: Path) -> set[str]:
    """Return the files below ``place``, without those that every start of a run adds: logs and tensorboard's events."""
    every = {path.relative_to(place) for path in place.rglob("*") if path.is_file()}
    return {str(path) for path in every if "tensorboard" not in path.parts and not path.name.startswith("log.txt")}


def _other_numbers(whole: Path, broken: Path) -> list[str]:
    """Say in which fields two ``results.json`` differ that should be equal."""
    one, other = (json.loads(path.read_text(encoding="utf-8")) for path in (whole, broken))
    changed = [key for key in one if key not in _NOT_COMPARED and one[key] != other.get(key)]
    return [f"{key} is {other.get(key)!r} instead of {one[key]!r}" for key in changed]


def _same(one: Any, other: Any) -> bool:  # what a checkpoint holds
    """Tell whether two trees of tensors and plain values are equal to the last bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and list(one) == list(other) and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(_same, one, other))
    return type(one) is type(other) and bool(one == other)
