"""Pictures that the model is least sure of."""

from __future__ import annotations

import numpy as np

from promptmix import register
from promptmix.runs.selection import Draws, Pool, Selector


@register(name="entropy")
class Entropy(Selector):
    """Largest entropy of the class probabilities first."""

    def select(self, pool: Pool, count: int, draws: Draws) -> list[int]:
        """Return the ``count`` most uncertain pictures."""
        probabilities = pool.probabilities[pool.unlabelled]
        negative = (probabilities * np.log(probabilities + 1e-6)).sum(axis=1)
        return [pool.unlabelled[place] for place in np.argsort(negative, kind="stable")[:count]]
