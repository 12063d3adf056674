"""Temperature scaling: one number, fitted on validation pictures, that makes probabilities mean what they say.

Guo, Pleiss, Sun, Weinberger: On Calibration of Modern Neural Networks, ICML 2017 (arXiv 1706.04599), section 4.2: probabilities
are softmax(logits / T), where T minimises the negative log-likelihood on the validation part. The order of the classes stays.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from promptmix.errors import DataError, UserError
from promptmix.parallel import group
from promptmix.utils import read_json, write_json

__all__ = ["FILE", "Calibration", "calibrate", "expected_error", "fit_temperature", "read"]

FILE = "calibration.json"
#: Between which T is sought; a bound that is reached says that the pictures can't tell.
_LOW, _HIGH = 1e-2, 1e2
_BINS = 15  # as in the paper
_NO_GAIN = 0.0005  # nats a picture, below what is printed


@dataclass(frozen=True)
class Calibration:
    """What was measured on the validation pictures of a run.

    Attributes:
        temperature: T.
        pictures: how many there were.
        epoch: checkpoint that they were scored with; None = the one that the run was tested with.
        nll: negative log-likelihood per picture with T, in nats.
        nll_before: with T = 1.
        ece: expected calibration error with T, in percent, 15 bins.
        ece_before: with T = 1.
    """

    temperature: float
    pictures: int
    epoch: int | None
    nll: float
    nll_before: float
    ece: float
    ece_before: float


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the T in [0.01, 100] with the least negative log-likelihood of labels (N,) under softmax(logits (N, C) / T).

    The likelihood has one minimum in 1 / T, so that halving the interval of its slope finds it.
    """
    scores = logits.double()
    right = scores.gather(1, labels[:, None].long()).squeeze(1)

    def slope(beta: float) -> float:
        expected = ((scores * beta).softmax(dim=1) * scores).sum(dim=1)
        return float((expected - right).mean())

    low, high = 1 / _HIGH, 1 / _LOW
    for _ in range(100):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    return 1 / math.sqrt(low * high)


def expected_error(probabilities: Tensor, labels: Tensor) -> float:
    """Return the expected calibration error of probabilities (N, C) in percent: |accuracy - confidence| over 15 bins."""
    sure, guess = probabilities.max(dim=1)
    right = (guess == labels).double()
    bins = (sure * _BINS).ceil().long().clamp(1, _BINS)
    gaps = [(right[bins == i].sum() - sure[bins == i].double().sum()).abs() for i in range(1, _BINS + 1)]
    return 100 * float(torch.stack(gaps).sum() / max(len(labels), 1))


def calibrate(trainer: Any, folder: str | Path, epoch: int | None = None) -> Calibration | None:  # a PromptTrainer
    """Fit T on the trainer's validation pictures and write it to the run's folder.

    Returns:
        What was measured; None, and no file, where the pictures can't tell: all are classified rightly, so that no T is too
        small, or no T is too large.

    Args:
        trainer: with the learned tensors that the run is tested with.
        folder: of the run.
        epoch: which checkpoint that is; None = the one that the run was tested with.

    Raises:
        UserError: there are no validation pictures, or the method gives no scores.
    """
    if getattr(trainer, "val_loader", None) is None:
        raise UserError(
            f"{folder}: its data has no val part to calibrate on; add val pictures, or train with a part split off (SPLIT_RATIO)"
        )
    if not hasattr(trainer, "scores"):
        raise UserError(f"{folder}: {type(trainer).__name__} is not a PromptTrainer, so it gives no scores to calibrate")
    logits, labels = trainer.scores("val")
    temperature = fit_temperature(logits, labels)
    if not 1.01 * _LOW < temperature < _HIGH / 1.01:
        if group.writes():
            Path(folder, FILE).unlink(missing_ok=True)
        return None
    numbers = [
        (float(F.cross_entropy(logits / t, labels)), expected_error((logits / t).softmax(dim=1), labels))
        for t in (temperature, 1.0)
    ]
    found = Calibration(temperature, len(labels), epoch, numbers[0][0], numbers[1][0], numbers[0][1], numbers[1][1])
    if group.writes():
        write_json(asdict(found), Path(folder, FILE))
    return found


def read(folder: str | Path) -> Calibration | None:
    """Return what was measured for the run in ``folder``, or None.

    Raises:
        DataError: the file holds something else.
    """
    path = Path(folder, FILE)
    if not path.is_file():
        return None
    tree = read_json(path)
    try:
        found = Calibration(**{entry.name: tree[entry.name] for entry in fields(Calibration)})
        if not _LOW / 2 < float(found.temperature) < _HIGH * 2 or not (found.epoch is None or type(found.epoch) is int):
            raise ValueError(f"temperature {found.temperature}, epoch {found.epoch}")
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is not a calibration ({error}); make one with `promptmix eval {folder} --calibrate`") from error
    return found


def in_words(found: Calibration | None) -> str:
    """Return a line that says what the temperature does."""
    if found is None:
        return "no temperature: the val pictures can't tell how sure the model may be (all right, or no better than chance)"
    if abs(found.nll_before - found.nll) < _NO_GAIN:
        return (
            f"temperature {found.temperature:.3f} from {found.pictures:,} val pictures changes next to nothing: "
            f"expected calibration error there {found.ece_before:.1f}%"
        )
    return (
        f"temperature {found.temperature:.3f} from {found.pictures:,} val pictures: expected calibration error there "
        f"{found.ece_before:.1f}% -> {found.ece:.1f}%, log-likelihood loss {found.nll_before:.3f} -> {found.nll:.3f}"
    )
