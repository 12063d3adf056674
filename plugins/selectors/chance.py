"""Pictures at random, the comparison that every selector needs."""

from __future__ import annotations

from promptmix import hookimpl
from promptmix.registry import Registry
from promptmix.runs.selection import Draws, Pool, Selector


class Chance(Selector):
    """Draws without looking."""

    proposes_more = False

    def select(self, pool: Pool, count: int, draws: Draws) -> list[int]:
        """Return ``count`` of the unlabelled pictures."""
        return draws.python.sample(pool.unlabelled, count)


@hookimpl
def register_selectors(registry: Registry) -> None:
    """Add the selector."""
    registry.register(Chance, name="random")
