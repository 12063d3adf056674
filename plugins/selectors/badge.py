"""Uncertain and different pictures: Deep Batch Active Learning by Diverse, Uncertain Gradient Lower Bounds (arXiv 1906.03671).

A picture's gradient embedding is the outer product of its class error (C,) and its feature (D,). It is never written out: lengths
and inner products of outer products are products of those of their factors, so a pool takes N (C + D) numbers and not N C D.
In PCB's code the last, shorter batch lands in rows of earlier ones; here every picture has its own.
"""

from __future__ import annotations

import numpy as np

from promptmix import register
from promptmix.runs.selection import Draws, Pool, Selector


@register(name="badge")
class Badge(Selector):
    """k-means++ on gradient embeddings, the longest one first."""

    def select(self, pool: Pool, count: int, draws: Draws) -> list[int]:
        """Return ``count`` pictures in the order they are drawn."""
        free = pool.unlabelled
        features = np.asarray(pool.features, dtype=np.float64)[free]
        errors = -pool.probabilities[free]
        errors[np.arange(len(free)), pool.predicted[free]] += 1
        square = (errors**2).sum(axis=1) * (features**2).sum(axis=1)
        chosen = [int(square.argmax())] if count else []
        distance = np.full(len(free), np.inf)
        while len(chosen) < count:
            last = chosen[-1]
            inner = (errors @ errors[last]) * (features @ features[last])
            distance = np.minimum(distance, np.maximum(square + square[last] - 2 * inner, 0))
            distance[last] = 0
            chosen.append(_drawn(distance, chosen, draws.numpy))
        return [free[place] for place in chosen]


def _drawn(square: np.ndarray, chosen: list[int], draws: np.random.RandomState) -> int:
    """Draw a place in proportion to its squared distance (N,); where all that are left are alike, return the first free one."""
    if not square.sum():
        return next(place for place in range(len(square)) if place not in chosen)
    cumulative = np.cumsum(square / square.sum())
    while True:
        place = min(int(np.searchsorted(cumulative, draws.random_sample(), side="left")), len(square) - 1)
        if place not in chosen:
            return place
