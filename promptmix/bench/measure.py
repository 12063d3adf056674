"""Timing several ways of the same work in turn, with their memory and their counted operations."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from promptmix.cost.count import Count, count
from promptmix.cost.memory import peak_mb, reset_peak, resident_mb


@dataclass(frozen=True)
class Cost:
    """What one way of doing a piece of work costs.

    Attributes:
        seconds: the fastest of the timed rounds; None where only operations were counted.
        memory_mb: peak resident memory above what was there before, in MiB; on a GPU, peak of allocations. None as above.
        gflops: counted floating-point operations in 10^9.
        live_mb: peak of live tensors in MiB, counted (see ``promptmix.cost.count``).
        cpu_seconds: of the processor, of all threads of this process but not of others, in the round that took fewest; None as
            above, and where it was not taken.
    """

    seconds: float | None
    memory_mb: float | None
    gflops: float
    live_mb: float
    cpu_seconds: float | None = None


@dataclass(frozen=True)
class Row:
    """One piece of work done in several ways.

    Attributes:
        work: what is done, with its sizes.
        ways: name to cost; the first is what the others are compared with.
        minimum_gflops: operations that no way can do without: image tower and the unique text tokens through the linear
            layers, forward and, where something is learned, backward. None where it has no meaning.
        pictures: that each way handles; None where it is something else.
    """

    work: str
    ways: dict[str, Cost] = field(default_factory=dict)
    minimum_gflops: float | None = None
    pictures: int | None = None


def measure(ways: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, Cost]:
    """Measure several ways of the same work.

    Args:
        ways: name to a function that does the work once.
        repeats: timed rounds, in the order A B A B; a round before them counts operations and memory. 0 only counts.

    Returns:
        The cost of each way.
    """
    counted: dict[str, tuple[Count, float]] = {}
    for name, way in ways.items():
        reset_peak()
        before = resident_mb() or 0.0
        numbers = count(way)
        peak = peak_mb()
        counted[name] = (numbers, peak["cuda"] or (peak["rss"] or 0.0) - before)
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            begin = time.process_time()
            seconds = timed(way)
            rounds[name].append((seconds, time.process_time() - begin))
    found = {}
    for name, (numbers, memory) in counted.items():
        if not repeats:
            found[name] = Cost(None, None, numbers.gflops, numbers.live_mb)
            continue
        seconds, processor = (min(column) for column in zip(*rounds[name], strict=True))
        found[name] = Cost(seconds, memory, numbers.gflops, numbers.live_mb, processor)
    return found


def timed(work: Callable[[], object]) -> float:
    """Return the seconds that ``work`` takes, with what it left running on a GPU."""
    begin = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin
