"""Jobs through a backend, wave after wave: what comes in pieces (clients of a federated round) is spread like any other job."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from statistics import fmean

from promptmix.data.features.reuse import Reuse
from promptmix.runs.backends import Backend, Options, Outcome, Started
from promptmix.runs.clusters import ray_stays
from promptmix.runs.protocols import Job, pieces

Wave = list[tuple[int, Job]]


def in_waves(
    backend: Backend, jobs: Sequence[Job], options: Options, started: Started
) -> Generator[tuple[int, Outcome], None, None]:
    """Run jobs; those in pieces take part in each wave with what can run now, the others end with the first.

    Args:
        backend: runs the jobs and pieces of a wave.
        jobs: what to run.
        options: how jobs are spread.
        started: told of a job whenever it, or a piece of it, was given to the backend.

    Yields:
        Index and outcome of each job; of one in pieces after its last wave, with the mean of that wave's numbers.
    """
    with ray_stays():
        yield from _waves(backend, jobs, options, started)


def _waves(
    backend: Backend, jobs: Sequence[Job], options: Options, started: Started
) -> Generator[tuple[int, Outcome], None, None]:
    left, ran = list(range(len(jobs))), set[tuple[int, str]]()
    sums = dict.fromkeys(left, 0.0)
    reuses: dict[int, Reuse] = {}
    last: dict[int, dict[str, float]] = {}
    while left:
        wave = [(index, piece) for index in left for piece in pieces(jobs[index])]
        for index in set(left) - {index for index, _ in wave}:
            yield index, Outcome(numbers=last.get(index, {}), seconds=sums[index], reuse=reuses.get(index))
        left = sorted({index for index, piece in wave if piece.piece})
        found: dict[int, list[float]] = {index: [] for index in left}
        errors = {i: f"{p.piece} ran, but does not count; remove its folder" for i, p in wave if (i, p.piece) in ran}
        wave = [(index, piece) for index, piece in wave if index not in errors]
        with contextlib.closing(_run(backend, wave, options, started)) as outcomes:
            for place, outcome in outcomes:
                index, piece = wave[place]
                if not piece.piece:
                    yield index, outcome
                    continue
                ran.add((index, piece.piece))
                sums[index] += outcome.seconds
                if outcome.reuse is not None:
                    reuses[index] = reuses.get(index, Reuse()) + outcome.reuse
                found[index] += outcome.numbers.values()
                if outcome.error:
                    errors.setdefault(index, f"{piece.piece}: {outcome.error}")
        for index, error in errors.items():
            yield index, Outcome(error, seconds=sums[index], reuse=reuses.get(index))
        left = [index for index in left if index not in errors]
        last = {index: {"mean of the last round": fmean(found[index])} for index in left if found[index]}


def _run(backend: Backend, wave: Wave, options: Options, started: Started) -> Generator[tuple[int, Outcome], None, None]:
    """Give a wave to the backend; an empty one to nobody, since some start a cluster first."""
    if wave:
        yield from backend([piece for _, piece in wave], options, lambda place: started(wave[place][0]))
