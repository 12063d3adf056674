"""Which pictures are labelled next: what a selector sees, and the balance of classes that can be put on top of any."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np

from promptmix.errors import ConfigError
from promptmix.registry import SELECTOR_REGISTRY, Registry

__all__ = ["Draws", "Pool", "Selector", "balanced"]


class Draws:
    """The random numbers of one round, of python's and numpy's kind, as the authors draw them; nobody else draws from these.

    Args:
        seed: of both, from 0 to 2^32 - 1; None = not seeded.
    """

    def __init__(self, seed: int | None) -> None:
        self.python, self.numpy = random.Random(seed), np.random.RandomState(seed)


@dataclass(frozen=True)
class Pool:
    """All N pictures that may be labelled, as the model of the last round sees them.

    Attributes:
        features: (N, D) normalised image features.
        logits: (N, C) class scores.
        labelled: indices of those that have a label.
    """

    features: np.ndarray
    logits: np.ndarray
    labelled: Sequence[int] = ()

    @cached_property
    def unlabelled(self) -> list[int]:
        """Indices of those without a label, ascending."""
        known = set(self.labelled)
        return [index for index in range(len(self.logits)) if index not in known]

    @cached_property
    def probabilities(self) -> np.ndarray:
        """Softmax of the class scores (N, C), in float64."""
        scores = np.asarray(self.logits, dtype=np.float64)
        found: np.ndarray = np.exp(scores - scores.max(axis=1, keepdims=True))
        return found / found.sum(axis=1, keepdims=True)

    @cached_property
    def predicted(self) -> np.ndarray:
        """Class with the largest score (N,), the first of ties."""
        return np.asarray(self.logits).argmax(axis=1)


class Selector(ABC):
    """Proposes unlabelled pictures, best first."""

    registry: ClassVar[Registry] = SELECTOR_REGISTRY

    #: Whether it is asked for more pictures than are labelled where the classes are balanced afterwards; one that looks at
    #: nothing is not, so that balancing only puts its picks in another order.
    proposes_more: ClassVar[bool] = True

    @abstractmethod
    def select(self, pool: Pool, count: int, draws: Draws) -> list[int]:
        """Return the indices of ``count`` unlabelled pictures of the pool."""


def balanced(
    candidates: Sequence[int],
    predicted: Sequence[int] | np.ndarray,
    counts: Sequence[int] | np.ndarray,
    number: int,
    draws: random.Random,
    *,
    count_missing: bool = False,
) -> tuple[list[int], list[int]]:
    """Pick ``number`` of the candidates so that the classes get as many labels each (PCB, arXiv 2311.11178, algorithm 1).

    Again and again: of the class with the fewest labels (the first of ties), a random candidate predicted as it, else any.

    Args:
        candidates: indices into the pool, in the selector's order.
        predicted: (N,) predicted class of each picture of the pool.
        counts: (C,) labels of each class so far.
        number: how many to pick.
        draws: python's generator.
        count_missing: count a pick for the class that lacked a candidate, so that the next pick turns to the next class. In the
            authors' code it stays the rarest, and every further pick of the round is random.

    Returns:
        The picks in their order, and the counts afterwards, as predicted.

    Raises:
        ConfigError: there are fewer candidates than picks.
    """
    if len(candidates) < number:
        raise ConfigError(f"{number} pictures are to be picked of {len(candidates)} candidates; propose more, or pick fewer")
    found: list[int] = []
    taken: set[int] = set()
    totals = [int(count) for count in counts]
    for _ in range(number):
        rarest = totals.index(min(totals))
        places = [place for place, index in enumerate(candidates) if predicted[index] == rarest]
        draws.shuffle(places)
        place = next((place for place in places if place not in taken), None)
        if place is not None or count_missing:
            totals[rarest] += 1
        while place is None or place in taken:
            place = draws.randint(0, len(candidates) - 1)
        taken.add(place)
        found.append(int(candidates[place]))
    return found, totals
