"""A selector for promptmix."""

from __future__ import annotations

import numpy as np

from promptmix import register
from promptmix.runs.selection import Draws, Pool, Selector


@register
class MyPart(Selector):
    """The pictures between whose two best classes the model wavers most."""

    def select(self, pool: Pool, count: int, draws: Draws) -> list[int]:
        """Return the indices of ``count`` unlabelled pictures, smallest margin first."""
        best = np.sort(pool.probabilities[pool.unlabelled], axis=1)
        margin = best[:, -1] - best[:, -2]
        return [pool.unlabelled[place] for place in np.argsort(margin, kind="stable")[:count]]
