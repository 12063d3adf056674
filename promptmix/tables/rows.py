"""The lines of a table and their cells."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from promptmix.engine.league import LABELLED
from promptmix.runs.results import RunResult
from promptmix.tables.spread import STD

__all__ = ["Cell", "Row", "name_among"]


@dataclass
class Cell:
    """One number of a table.

    Attributes:
        mean: over the seeds.
        spread: what stands behind its ±; None = there is none (an interval of one seed).
        count: number of seeds.
        spread_is: what kind of spread it is, in words.
    """

    mean: float
    spread: float | None
    count: int
    spread_is: str = STD

    @property
    def bar(self) -> float:
        """Half the length of an error bar; 0 where there is no spread."""
        return self.spread or 0.0

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.bar:.2f}" if self.count > 1 else f"{self.mean:.2f}"


@dataclass
class Row:
    """One line of a table: the runs of one method on one data set, protocol and setting.

    Attributes:
        method: trainer name.
        dataset: data set name, with its domains where it has any, and the data set that the prompts were trained on.
        protocol: ``base to new``, ``all classes``, ``cross data set`` or ``domain generalization``.
        shots: training pictures per class, ``all`` below 1.
        backbone: backbone name.
        settings: keys in which this row's configs differ from its neighbours', empty where there is one setting only.
        started: start of the earliest run.
        seeds: seeds that stand in any cell.
        cells: (metric, part) to number; parts are ``base``, ``new``, ``h`` or ``test``.
        values: (metric, part) to the number of each seed.
        trained_on: data set that the prompts were trained on, where this row is a target of a protocol.
        averages: data sets that this row is the average of; empty for a row of one data set.
        published: part to the number in the papers, in accuracy (see ``promptmix.tables.published``).
        origin: where the published numbers were read.
        learned: number of learned parameters.
        train_seconds: seconds of training, over the runs that trained.
        gflops: operations of a training step, in 10^9.
        league: what the method sees, see ``promptmix.engine.league``.
        approximations: what some of its runs did otherwise than the method says (see ``RunResult``).
        runs: ``base``, ``new`` or ``test`` to the run of each seed.
    """

    method: str
    dataset: str
    protocol: str
    shots: str
    backbone: str
    settings: str
    started: str = ""
    seeds: list[int] = field(default_factory=list)
    cells: dict[tuple[str, str], Cell] = field(default_factory=dict)
    values: dict[tuple[str, str], dict[Any, float]] = field(default_factory=dict)
    trained_on: str = ""
    averages: tuple[str, ...] = ()
    published: dict[str, float] = field(default_factory=dict)
    origin: str = ""
    learned: int | None = None
    train_seconds: Cell | None = None
    gflops: float | None = None
    league: str = LABELLED
    approximations: tuple[str, ...] = ()
    runs: dict[str, dict[Any, RunResult]] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, str]:
        """Method, backbone and settings: what is one series in pictures."""
        return self.method, self.backbone, self.settings


def name_among(key: tuple[str, str, str], keys: Iterable[tuple[str, str, str]]) -> str:
    """Return what a series is called among others: its method, with the backbone and settings that tell it from its namesakes."""
    alike = [other for other in keys if other[0] == key[0]]
    told = dict.fromkeys(key[i] for i in (1, 2) if key[i] and len({other[i] for other in alike}) > 1)
    return f"{key[0]} ({', '.join(told)})" if told else key[0]
