"""Where the prompts of an evaluation were trained: from ``--model-dir``, which a log of CoOp's tells and nothing else does.

CoOp's scripts evaluate with flags of their own: no shots, another config file, so that the printed tree says little about the
training. What was trained is told by the folder that was evaluated, and by the log in it where that was read too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path, PurePosixPath

from promptmix.runs.results import RunResult

__all__ = ["TRAINING_KEYS", "label", "partner", "resolve", "same_training"]

#: Settings of training, which an evaluation prints and doesn't use.
TRAINING_KEYS = ("OPTIM.", "TRAIN.", "DATALOADER.TRAIN_X.", "DATALOADER.TRAIN_U.", "DATALOADER.K_TRANSFORMS", "INPUT.TRANSFORMS")
_SEED = re.compile(r"^seed[-_]?\d+$", re.IGNORECASE)
_SHOTS = re.compile(r"(?:shots?[-_]?(\d+)|(\d+)[-_]?shots?)", re.IGNORECASE)

#: CoOp's names of data sets in folders and config files, where they are not the data set's name in lower case.
_FOLDERS = {"dtd": "DescribableTextures", "imagenetv2": "ImageNetV2", "imagenetsketch": "ImageNetSketch"}


def resolve(runs: Iterable[RunResult]) -> list[RunResult]:
    """Return the runs, evaluations with the data set and the shots that their prompts were trained with.

    Args:
        runs: what ``promptmix.runs.results.find`` returns; those with a ``trained_on`` or a protocol stay as they are.
    """
    every = list(runs)
    known = {re.sub(r"[^a-z0-9]", "", run.dataset.lower()): run.dataset for run in every} | _FOLDERS
    return [_with_origin(run, partner(run, every), known) if _is_open(run) else run for run in every]


def _is_open(run: RunResult) -> bool:
    return bool(run.checkpoint and run.checkpoint.get("directory")) and not run.protocol and not run.trained_on


def _with_origin(run: RunResult, trained: RunResult | None, known: dict[str, str]) -> RunResult:
    parts = label(run).split("/")
    if trained is not None:
        source, shots = trained.title or trained.dataset, trained.shots
    else:
        names = [known[key] for part in parts if (key := re.sub(r"[^a-z0-9]", "", part.lower())) in known]
        found = [int(hit.group(1) or hit.group(2)) for part in parts if (hit := _SHOTS.search(part))]
        source, shots = (names[-1] if names else ""), (found[-1] if found else run.shots)
    shots = run.shots if run.shots > 0 else shots
    if not source or source in (run.title, run.dataset):
        return replace(run, shots=shots)
    domains = source == "ImageNet" and run.dataset.startswith("ImageNet")
    return replace(run, shots=shots, trained_on=source, protocol="domain-generalization" if domains else "cross-dataset")


def partner(run: RunResult, runs: Iterable[RunResult]) -> RunResult | None:
    """Return the training run in the folder that ``run`` evaluated, or None where it was not read.

    Trees of outputs are copied from machine to machine, so the end of the path decides.
    """
    if not run.checkpoint or not run.checkpoint.get("directory"):
        return None
    wanted = _parts(run.checkpoint["directory"])
    best: list[RunResult] = []
    longest = 0
    for other in runs:
        if other.checkpoint is None and other.trainer == run.trainer and other.source:
            shared = _shared_end(wanted, _folder_of(other.source))
            if shared > longest:
                best, longest = [other], shared
            elif shared == longest:
                best.append(other)
    # The whole of a relative path, or more of an absolute one than a seed's folder.
    return best[0] if len(best) == 1 and longest >= min(len(wanted), 2) else None


def label(run: RunResult) -> str:
    """Return the folder that a run evaluated, or its own, without the parts that name a seed."""
    folder = run.checkpoint["directory"] if run.checkpoint else str(Path(run.source).parent)
    return "/".join(part for part in _parts(folder) if not _SEED.match(part))


def same_training(one: RunResult, other: RunResult) -> bool:
    """Tell whether two runs are of one training but for the seed, as far as their folders tell."""
    mine, theirs = label(one).split("/"), label(other).split("/")
    return _shared_end(mine, theirs) >= min(len(mine), len(theirs))


@cache
def _folder_of(source: str) -> tuple[str, ...]:
    return Path(source).parent.absolute().parts


def _parts(path: str) -> tuple[str, ...]:
    return tuple(part for part in PurePosixPath(path.replace("\\", "/")).parts if part not in (".", "/", ".."))


def _shared_end(one: Iterable[str], other: Iterable[str]) -> int:
    count = 0
    for mine, theirs in zip(reversed(list(one)), reversed(list(other)), strict=False):
        if mine != theirs:
            break
        count += 1
    return count
