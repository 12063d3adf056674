"""Counts without computing: steps of the methods at full size on device ``meta``, and the check that none became dearer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from promptmix.bench.world import World, learn, minimum
from promptmix.clip.reference import plain_towers
from promptmix.cost.count import Count, count
from promptmix.errors import UserError
from promptmix.utils import read_json

#: What CI looks at: method, batch, classes.
CASES = ("CoOp:4:100", "CoOp:32:100", "CoOp:4:1000", "CoCoOp:4:50", "MoCoOp:4:100", "MaPLe:4:100", "PromptSRC:4:100")
#: Growth of a count that fails.
TOLERANCE = 0.05


def count_step(
    world: World, name: str, batch: int, classes: int, *opts: object, experts: int = 5, compare: bool = False
) -> dict[str, float]:
    """Count a step of a method: GFLOP, live MiB, operations, the least GFLOP any way needs, and (``compare``) the plain way's."""
    trainer = world.trainer(name, classes, *opts, experts=experts)
    images = world.batch(trainer, batch)

    def step() -> None:
        learn(trainer, images)

    ours: list[Count] = []
    count(step)  # references are built once, in the first step
    least = minimum(trainer, lambda: ours.append(count(step)))
    counts = {
        "gflops": round(ours[0].gflops, 3),
        "live_mb": round(ours[0].live_mb, 1),
        "operations": ours[0].operations.all,
        "launches": ours[0].operations.launches,
        "minimum_gflops": round(least, 3),
    }
    if not compare:
        return counts
    with plain_towers(trainer.clip):
        full = count(step)
    return counts | {"plain_gflops": round(full.gflops, 3), "plain_live_mb": round(full.live_mb, 1)}


def count_cases(world: World) -> dict[str, dict[str, float]]:
    """Count every case."""
    counted = {}
    for case in CASES:
        name, batch, classes = case.split(":")
        counted[case] = count_step(world, name, int(batch), int(classes))
    return counted


def regressions(now: Mapping[str, Mapping[str, float]], recorded: str | Path) -> list[str]:
    """Return a line for each count that is more than 5% above the recorded one.

    Raises:
        UserError: a case, or one of its counts, was never recorded.
    """
    before = read_json(recorded)
    lines = []
    if not isinstance(before, dict):
        raise UserError(f"{recorded} is not a record of `promptmix bench ci`; make it anew with --update")
    for case, counts in now.items():
        for key in ("gflops", "live_mb", "operations", "launches"):
            old, new = (before.get(case) or {}).get(key), counts[key]
            if not isinstance(old, int | float):
                raise UserError(f"{recorded} has no {key} of case {case}; record it with `promptmix bench ci --update`")
            if new > old * (1 + TOLERANCE):
                lines.append(f"{case}: {key} {new:.1f}, recorded {old:.1f} ({100 * (new / old - 1):+.1f}%)")
    return lines
