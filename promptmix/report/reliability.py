"""How much the probabilities of a test mean: reliability curve, expected calibration error, and what a temperature does to it.

As Guo et al. (ICML 2017, arXiv 1706.04599), with 15 bins of equal width. A temperature that was fitted and judged on the same
pictures would flatter itself, so the pictures are parted by turns in two halves, each calibrated by the other's temperature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from promptmix.runs.samples import Samples

__all__ = ["Reliability", "reliability_of"]

BINS = 15


@dataclass(frozen=True)
class Reliability:
    """What was found.

    Attributes:
        confidence: mean confidence of each bin that has pictures.
        accuracy: share of right answers in it.
        share: share of the pictures that lie in it.
        error: expected calibration error in percent.
        temperature: geometric mean of the two halves' temperatures.
        calibrated: expected calibration error in percent, each half calibrated by the temperature of the other.
        curve: (confidence, accuracy) by bin after mending.
    """

    confidence: list[float]
    accuracy: list[float]
    share: list[float]
    error: float
    temperature: float
    calibrated: float
    curve: list[tuple[float, float]]


def reliability_of(tests: Sequence[Samples]) -> Reliability:
    """Return the reliability of one method over the tests of its seeds, taken together."""
    sure = np.concatenate([test.confidence for test in tests]).astype(float)
    right = np.concatenate([test.correct for test in tests])
    halves = [[np.arange(len(test)) % 2 == half for test in tests] for half in (0, 1)]
    temperatures = [_best(tests, half) for half in halves]
    calibrated = []
    for place, test in enumerate(tests):
        own = np.exp(-test.log_norm_at(temperatures[1]))  # pictures of the first half take the second's
        other = np.exp(-test.log_norm_at(temperatures[0]))
        calibrated.append(np.where(halves[0][place], own, other))
    before, after = _binned(sure, right), _binned(np.concatenate(calibrated), right)
    return Reliability(
        [c for c, _, _ in before],
        [a for _, a, _ in before],
        [s for _, _, s in before],
        _error(before),
        float(np.exp(np.mean(np.log(temperatures)))),
        _error(after),
        [(c, a) for c, a, _ in after],
    )


def _best(tests: Sequence[Samples], chosen: Sequence[np.ndarray]) -> float:
    """Return the temperature with the least negative log-likelihood on chosen pictures, to a percent."""
    grid = np.geomspace(tests[0].temperature[0], tests[0].temperature[-1], 400)
    losses = []
    for temperature in grid:
        parts = [
            test.log_norm_at(temperature)[own] - test.own_gap[own] / temperature for test, own in zip(tests, chosen, strict=True)
        ]
        losses.append(np.mean(np.concatenate(parts)))
    return float(grid[int(np.argmin(losses))])


def _binned(sure: np.ndarray, right: np.ndarray) -> list[tuple[float, float, float]]:
    """Return confidence, accuracy and share of the pictures of each bin that has any."""
    place = np.clip(np.ceil(sure * BINS).astype(int), 1, BINS)
    return [
        (float(sure[place == i].mean()), float(right[place == i].mean()), float((place == i).mean()))
        for i in range(1, BINS + 1)
        if (place == i).any()
    ]


def _error(bins: list[tuple[float, float, float]]) -> float:
    return 100 * sum(share * abs(accuracy - confidence) for confidence, accuracy, share in bins)
