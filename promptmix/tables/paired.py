"""Paired tests: whether two methods differ, judged on the same test pictures.

Two runs, one of each method: McNemar's exact test on the pictures that only one of them gets right. Several seeds, H and averages
over data sets: the difference of the means with a bootstrap over pictures and seeds. A replicate draws the pictures (the same
for both methods and all seeds, since they are the same pictures), and the seeds (the same for both methods where both have them,
and for base and new, which are one training); data sets are drawn apart. With few seeds the part of the seeds is underestimated:
three seeds can't show more spread than they have. A p that too few replicates speak for is that of a normal distribution with
the replicates' deviation, so that it isn't bound by their number. Beside p stands Holm's correction for the number of
comparisons in the table.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import re
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from tabulate import tabulate

from promptmix.errors import DataError, UserError
from promptmix.files.text import csv_cell, json_text, table_cell
from promptmix.registry import closest
from promptmix.runs import samples
from promptmix.tables.groups import title_of
from promptmix.tables.rows import Row, name_among

__all__ = ["Comparison", "compare", "mcnemar", "render"]

REPLICATES = 4000
#: So many replicates beyond zero give p by their share; fewer say too little of it.
_ENOUGH = 20
_SEED = 0  # the same numbers each time
MCNEMAR, BOOTSTRAP = "McNemar, exact", "bootstrap over pictures"
_LABELS = {"base": "base", "new": "new", "h": "H", "test": "test"}
_ROUND = re.compile(r"round\d{1,9}")


@dataclass
class Comparison:
    """What is known of the difference of two methods in one place of the table.

    Attributes:
        dataset: where.
        shots: training pictures per class, as tables say it.
        part: ``base``, ``new``, ``h`` or ``test``, or a round of labelling (``round1``).
        first: a method, with backbone and settings where those differ.
        second: the other.
        difference: accuracy of the first minus that of the second, in points of percent.
        low: lower end of its 95% interval.
        high: upper end.
        p: two-sided, of no difference.
        test: how p was found.
        seeds: runs of each of the two.
        pictures: test pictures, over all data sets.
        only_first: for McNemar, pictures that only the first gets right.
        only_second: the same of the second.
        holm: p, corrected for the number of comparisons.
    """

    dataset: str
    shots: str
    part: str
    first: str
    second: str
    difference: float
    low: float
    high: float
    p: float
    test: str
    seeds: tuple[int, int]
    pictures: int
    only_first: int | None = None
    only_second: int | None = None
    holm: float = 1.0


@dataclass
class _Place:
    """Both methods on one part of one data set: hits (S, N) of S seeds on the same N pictures, in the same order."""

    part: str
    first: np.ndarray
    second: np.ndarray
    shared_seeds: bool

    @property
    def means(self) -> tuple[float, float]:
        """Accuracy of both, as shares."""
        return float(self.first.mean()), float(self.second.mean())


@dataclass
class _Reader:
    """Reads each run's predictions once; notes say why a pair was left out."""

    notes: list[str] = field(default_factory=list)
    _hits: dict[str, tuple[np.ndarray, np.ndarray] | None] = field(default_factory=dict)

    def hits(self, run: Any) -> tuple[np.ndarray, np.ndarray] | None:
        """Return the pictures of a run, in order of their names, and whether each was told right; None where it kept none."""
        if run.source not in self._hits:
            try:
                found = samples.of_run(run)
            except DataError as error:
                self.notes.append(str(error))
                found = None
            order = None if found is None else np.lexsort((found.label, found.path))
            self._hits[run.source] = None if found is None else (found.path[order], found.correct[order])
        return self._hits[run.source]

    def matrix(self, runs: dict[Any, Any], name: str) -> tuple[np.ndarray, np.ndarray] | None:
        """Return pictures (N,) and hits (S, N) of a method's runs."""
        read = [self.hits(run) for run in runs.values()]
        found = [one for one in read if one is not None]
        if len(found) < len(read) or not found:
            self.notes.append(f"{name}: no predictions.npz beside some of its runs; test them again with --eval-only to compare")
            return None
        if any(not np.array_equal(one[0], found[0][0]) for one in found):
            self.notes.append(f"{name}: its test pictures differ from seed to seed, so nothing is compared")
            return None
        return found[0][0], np.stack([one[1] for one in found])

    def place(self, part: str, first: Row, second: Row) -> _Place | None:
        """Return both methods' hits on one part of a data set."""
        one, other = (self.matrix(row.runs[part], f"{row.method} on {row.dataset}, {part}") for row in (first, second))
        if one is None or other is None:
            return None
        if not np.array_equal(one[0], other[0]):
            self.notes.append(f"{first.method} and {second.method} on {first.dataset}, {part}: tested on different pictures")
            return None
        return _Place(part, one[1], other[1], list(first.runs[part]) == list(second.runs[part]))


def compare(rows: list[Row], baseline: str = "") -> tuple[list[Comparison], list[str]]:
    """Compare methods wherever several stand on the same data set, protocol and shots, and over the averages of data sets.

    Args:
        rows: what ``aggregate`` and ``averages`` return.
        baseline: a method, or one of its rows by the name that it has here (``PCB (random)``), that all others are compared with;
            "" = every pair.

    Returns:
        The comparisons, and notes on what could not be compared.

    Raises:
        UserError: no row is of the method ``baseline``.
    """
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.dataset, row.protocol, row.shots, row.trained_on].append(row)
    methods = sorted({row.method for row in rows}.union(*(_names(same).values() for same in groups.values())))
    if baseline and baseline not in methods:
        raise UserError(f"--compare {baseline}: no run of it{closest(baseline, methods)} (there are: {', '.join(methods)})")
    reader = _Reader()
    found: list[Comparison] = []
    for same in groups.values():
        names = _names(same)
        for first, second in itertools.combinations(same, 2):
            is_it = [baseline in (row.method, names[id(row)]) for row in (first, second)]
            if baseline and not any(is_it):
                continue
            if is_it[0]:
                first, second = second, first
            found += _of_pair(first, second, _members(rows, first, second), (names[id(first)], names[id(second)]), reader)
    for rank, one in enumerate(sorted(found, key=lambda one: one.p)):
        one.holm = min(1.0, one.p * (len(found) - rank))
    for before, after in itertools.pairwise(sorted(found, key=lambda one: one.p)):
        after.holm = max(after.holm, before.holm)
    return found, list(dict.fromkeys(reader.notes))


def _members(rows: list[Row], first: Row, second: Row) -> list[tuple[Row, Row]]:
    """Return the pairs of rows that two rows are made of: themselves, or those of each averaged data set."""
    if not first.averages:
        return [(first, second)]

    def own(row: Row) -> dict[str, Row]:
        def key(r: Row) -> tuple[str, ...]:
            return *r.key, r.protocol, r.shots, r.trained_on

        return {r.dataset: r for r in rows if not r.averages and key(r) == key(row)}

    theirs = own(second) if first.averages == second.averages else {}
    return [(row, theirs[name]) for name, row in own(first).items() if name in theirs]


def _names(rows: list[Row]) -> dict[int, str]:
    """Return what each row (by ``id``) is called among others: its method, with the backbone and settings that tell it apart."""
    return {id(row): name_among(row.key, [other.key for other in rows]) for row in rows}


def _of_pair(
    first: Row, second: Row, members: list[tuple[Row, Row]], names: tuple[str, str], reader: _Reader
) -> list[Comparison]:
    shared = set.intersection(*(set(row.runs) for pair in members for row in pair)) if members else set()
    parts: list[str] = [part for part in ("base", "new", "test") if part in shared]
    parts += sorted(filter(_ROUND.fullmatch, shared), key=lambda part: (len(part), part))
    read = [[reader.place(part, a, b) for part in parts] for a, b in members]
    places = [[place for place in one if place is not None] for one in read]
    if not parts or any(len(one) < len(parts) for one in places):
        return []
    draw = np.random.default_rng(_SEED)
    replicates = [_bootstrap(one, draw) for one in places]  # per data set, per part: (2, R), of the first and the second
    found = []
    exact = {part: np.mean([one[i].means for one in places], axis=0) for i, part in enumerate(parts)}
    drawn = {part: np.mean([one[i] for one in replicates], axis=0) for i, part in enumerate(parts)}
    for i, part in enumerate(parts):
        found.append(_comparison(first, part, names, exact[part], drawn[part], [one[i] for one in places]))
    if "base" in parts and "new" in parts:
        h = [_harmonic(values["base"], values["new"]) for values in (exact, drawn)]
        found.append(_comparison(first, "h", names, h[0], h[1], [place for one in places for place in one]))
    return found


def _harmonic(base: np.ndarray, new: np.ndarray) -> np.ndarray:
    return 2 * base * new / np.maximum(base + new, 1e-12)


def _bootstrap(places: list[_Place], draw: np.random.Generator) -> list[np.ndarray]:
    """Return, for each part of one data set, accuracies (2, R) of both methods in R replicates."""
    sizes = len(places[0].first), len(places[0].second)
    weights = [_weights(size, draw) for size in sizes]
    found = []
    for place in places:
        of_first, of_second = (
            own if len(own[0]) == len(hits) else _weights(len(hits), draw)
            for own, hits in zip(weights, (place.first, place.second), strict=True)
        )
        if place.shared_seeds:
            of_second = of_first
        means = [of_first @ place.first, of_second @ place.second] if len(place.first[0]) <= 2000 else None
        drawn = np.empty((2, REPLICATES))
        for start in range(0, REPLICATES, 100):
            part = slice(start, start + 100)
            count = place.first.shape[1]
            pictures = draw.multinomial(count, np.full(count, 1 / count), size=100) / count
            for which, (seeds, hits) in enumerate(((of_first, place.first), (of_second, place.second))):
                own = means[which][part] if means else seeds[part] @ hits
                drawn[which, part] = (own * pictures).sum(axis=1)
        found.append(drawn)
    return found


def _weights(seeds: int, draw: np.random.Generator) -> np.ndarray:
    """Return how much each of S seeds counts in each replicate (R, S)."""
    return np.asarray(draw.multinomial(seeds, np.full(seeds, 1 / seeds), size=REPLICATES) / seeds)


def _comparison(
    row: Row, part: str, names: tuple[str, str], exact: np.ndarray, drawn: np.ndarray, places: list[_Place]
) -> Comparison:
    differences = drawn[0] - drawn[1]
    low, high = np.quantile(differences, (0.025, 0.975))
    one = Comparison(
        row.dataset,
        row.shots,
        part,
        *names,
        difference=100 * float(exact[0] - exact[1]),
        low=100 * float(low),
        high=100 * float(high),
        p=_p_of(float(exact[0] - exact[1]), differences),
        test=BOOTSTRAP + (" and seeds" if max(len(places[0].first), len(places[0].second)) > 1 else ""),
        seeds=(len(places[0].first), len(places[0].second)),
        pictures=sum(place.first.shape[1] for place in places),
    )
    if one.seeds == (1, 1) and len(places) == 1:
        first, second = places[0].first[0], places[0].second[0]
        one.only_first, one.only_second = int((first & ~second).sum()), int((second & ~first).sum())
        one.p, one.test = mcnemar(one.only_first, one.only_second), MCNEMAR
    return one


def _p_of(difference: float, replicates: np.ndarray) -> float:
    """Return the two-sided p of no difference: the share of replicates beyond zero, or, where they are few, a normal tail."""
    beyond = min((replicates <= 0).sum(), (replicates >= 0).sum())
    share = min(1.0, 2 * float(beyond + 1) / (len(replicates) + 1))
    deviation = float(replicates.std(ddof=1))
    if beyond >= _ENOUGH or deviation == 0:
        return share
    return math.erfc(abs(difference) / deviation / math.sqrt(2))


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the exact two-sided p of McNemar's test: a fair coin decides each picture that only one of the two gets right."""
    total, least = only_first + only_second, min(only_first, only_second)
    whole = math.lgamma(total + 1) - total * math.log(2)
    logs = (whole - math.lgamma(k + 1) - math.lgamma(total - k + 1) for k in range(least + 1))
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))


def render(found: list[Comparison], fmt: str) -> str:
    """Return the comparisons as a table, or every field of them for ``csv`` and ``json``."""
    if fmt == "json":
        return json_text(json.dumps([asdict(one) for one in found], indent=2, ensure_ascii=False))
    lines: list[dict[str, Any]] = [asdict(one) | {"seeds": " ".join(map(str, one.seeds))} for one in found]
    if fmt == "csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(lines[0]) if lines else ["dataset"], lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: csv_cell(value) for key, value in line.items()} for line in lines)
        return text.getvalue().rstrip("\n")
    if not found:
        return "nothing to compare: two methods with their predictions on the same test pictures are needed"
    titles = ("Data set", "Shots", "Part", "A", "B", "A - B", "95% interval", "p", "p (Holm)", "Pictures", "Test")
    cells = [
        (
            *(
                one.dataset,
                one.shots,
                _LABELS.get(one.part) or title_of(one.part),
                one.first,
                one.second,
                f"{one.difference:+.2f}",
            ),
            f"{one.low:+.2f} to {one.high:+.2f}",
            *(shown_p(one.p), shown_p(one.holm), str(one.pictures)),
            one.test + (f" ({one.only_first}:{one.only_second})" if one.only_first is not None else ""),
        )
        for one in found
    ]
    safe = [[table_cell(cell, fmt) for cell in line] for line in cells]
    align = ("left",) * 5 + ("right",) * 5 + ("left",)
    return tabulate(safe, headers=titles, tablefmt=fmt, disable_numparse=True, colalign=align)


def shown_p(p: float) -> str:
    """Return p with as many digits as it deserves."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"
