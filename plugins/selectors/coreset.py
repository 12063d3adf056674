"""Pictures far from all labelled ones: Active Learning for CNNs: A Core-Set Approach (Sener, Savarese, arXiv 1708.00489)."""

from __future__ import annotations

import numpy as np

from promptmix import register
from promptmix.runs.selection import Draws, Pool, Selector


@register(name="coreset")
class CoreSet(Selector):
    """k-centre greedy: again and again the picture whose nearest labelled or chosen one is farthest, the first of ties."""

    def select(self, pool: Pool, count: int, draws: Draws) -> list[int]:
        """Return ``count`` pictures, farthest first."""
        features = np.asarray(pool.features, dtype=np.float64)
        free = features[pool.unlabelled]
        nearest = np.full(len(free), np.inf)
        for index in pool.labelled:
            nearest = np.minimum(nearest, np.linalg.norm(free - features[index], axis=1))
        chosen: list[int] = []
        for _ in range(count):
            place = int(nearest.argmax())
            chosen.append(place)
            nearest = np.minimum(nearest, np.linalg.norm(free - free[place], axis=1))
            nearest[chosen] = -np.inf  # never twice, also where all are alike
        return [pool.unlabelled[place] for place in chosen]
