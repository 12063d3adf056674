"""Pictures at random, the comparison that every selector needs."""

from __future__ import annotations

from promptmix import register
from promptmix.runs.selection import Draws, Pool, Selector


@register(name="random")
class Chance(Selector):
    """Draws without looking."""

    proposes_more = False

    def select(self, pool: Pool, count: int, draws: Draws) -> list[int]:
        """Return ``count`` of the unlabelled pictures."""
        return draws.python.sample(pool.unlabelled, count)
