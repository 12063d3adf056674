"""What a report tells of runs, read from their folders: predictions, logs, settings, costs."""

from __future__ import annotations

import re
import shlex
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from promptmix.errors import DataError, UserError
from promptmix.report.thumbnails import Album
from promptmix.runs import results, samples
from promptmix.runs.results import RunResult
from promptmix.runs.samples import Samples
from promptmix.tables.rows import Row
from promptmix.utils import read_text

__all__ = [
    "Detail",
    "details",
    "differences",
    "find",
    "learning",
    "name_of",
    "per_class",
    "pictures",
    "provenance",
    "top_confusions",
]

_EPOCH = re.compile(r"^epoch \[(\d+)/\d+\] batch .*? loss \S+ \(([\d.einf+-]+)\)(?: acc \S+ \(([\d.]+)\))?")


@dataclass(eq=False)
class Detail:
    """One method on one part of one data set, with the predictions of its seeds.

    Attributes:
        name: of the method, as tables call it.
        place: data set and part.
        runs: by seed.
        tests: their predictions.
    """

    name: str
    place: str
    runs: list[RunResult]
    tests: list[Samples]

    @property
    def classnames(self) -> list[str]:
        """Names by label."""
        return list(map(str, self.tests[0].classname))

    @property
    def counts(self) -> np.ndarray:
        """Confusion matrix (C, C) over all seeds."""
        return np.sum([test.confusion() for test in self.tests], axis=0)


def find(folders: Sequence[str]) -> tuple[list[RunResult], list[str]]:
    """Return every run below the folders, each once, and notes.

    Raises:
        UserError: a folder has none.
    """
    found: dict[Path, RunResult] = {}
    notes: list[str] = []
    for folder in folders:
        runs, more = results.find(folder)
        found |= {Path(run.source).resolve(): run for run in runs}
        notes += more
    return list(found.values()), notes


def name_of(row: Row, rows: Sequence[Row]) -> str:
    """Return what a row is called among others: its method, with settings and shots where they tell it from them."""
    shots = f", {row.shots} shots" if len({other.shots for other in rows}) > 1 else ""
    return row.method + (f" ({row.settings})" if row.settings else "") + shots


def details(rows: Sequence[Row], notes: list[str]) -> list[Detail]:
    """Return what can be told picture by picture; what can't is noted."""
    found = []
    for row in rows:
        name = name_of(row, rows)
        for part, runs in row.runs.items() if not row.averages else ():
            tests = []
            for run in runs.values():
                try:
                    test = samples.of_run(run)
                except DataError as error:
                    notes.append(str(error))
                    continue
                if test is not None:
                    tests.append(test)
            same = [test for test in tests if list(test.classname) == list(tests[0].classname)]
            if same:
                place = row.dataset if part == "test" else f"{row.dataset}, {part} classes"
                found.append(Detail(name, place, list(runs.values()), same))
            else:
                notes.append(
                    f"{name} on {row.dataset}, {part}: no predictions.npz, so nothing is told of its classes and pictures"
                )
    return found


def per_class(same: Sequence[Detail]) -> list[dict[str, Any]]:
    """Return a line for each class of one place: name, number of test pictures, and each method's accuracy in percent."""
    lines = []
    for label, name in enumerate(same[0].classnames):
        count = int((same[0].tests[0].label == label).sum())
        values = []
        for detail in same:
            own = [test.correct[test.label == label] for test in detail.tests]
            values.append(100 * float(np.concatenate(own).mean()) if sum(map(len, own)) else None)
        lines.append({"name": name, "count": count, "values": values})
    return lines


def top_confusions(detail: Detail, most: int = 8) -> list[dict[str, Any]]:
    """Return the pairs of classes that are taken for one another most often: what it is, what is said, how often, of how many."""
    counts = detail.counts
    wrong = counts - np.diag(counts.diagonal())
    names, totals = detail.classnames, counts.sum(axis=1)
    order = np.argsort(-wrong, axis=None, kind="stable")[:most]
    pairs = [divmod(int(place), len(names)) for place in order]
    return [{"is": names[a], "said": names[b], "count": int(wrong[a, b]), "of": int(totals[a])} for a, b in pairs if wrong[a, b]]


def pictures(detail: Detail, album: Album, most: int = 8) -> dict[str, list[dict[str, Any]]]:
    """Return the pictures that were most surely told wrong, and those between whose best two classes least lies (first seed)."""
    test = detail.tests[0]
    wrong = np.flatnonzero(~test.correct)
    worst = wrong[np.argsort(-test.confidence[wrong], kind="stable")][:most]
    margins = test.top_probability[:, 0] - (test.top_probability[:, 1] if test.top_probability.shape[1] > 1 else 0)
    doubtful = np.argsort(margins, kind="stable")[:most]

    def told(index: int) -> dict[str, Any]:
        best = [
            (str(test.classname[label]), 100 * float(value))
            for label, value in zip(test.top_class[index][:2], test.top_probability[index][:2], strict=True)
        ]
        path = str(test.path[index])
        own = str(test.classname[test.label[index]])
        return {"path": path, "image": album.thumbnail(path), "is": own, "said": best, "right": bool(test.correct[index])}

    return {"worst": [told(int(i)) for i in worst], "doubtful": [told(int(i)) for i in doubtful]}


def learning(rows: Sequence[Row]) -> dict[str, dict[str, tuple[list[float], list[float]]]]:
    """Return loss over that of the first epoch, and training accuracy, by epoch for each method that trained, by data set."""
    found: dict[str, dict[str, Any]] = defaultdict(dict)
    for row in rows:
        read = [_epochs(run) for runs in row.runs.values() for run in runs.values() if run.checkpoint is None]
        read = [one for one in read if one]
        if row.averages or not read:
            continue
        epochs = sorted(set.intersection(*(set(one) for one in read)))
        name = name_of(row, rows)
        losses = [float(np.mean([one[epoch][0] for one in read])) for epoch in epochs]
        if len(losses) > 1 and losses[0] > 0:
            found[f"loss: {row.dataset}"][name] = (list(map(float, epochs)), [loss / losses[0] for loss in losses])
        told = [[value for value in (one[epoch][1] for one in read) if value is not None] for epoch in epochs]
        if all(told):
            found[f"accuracy: {row.dataset}"][name] = (list(map(float, epochs)), [float(np.mean(values)) for values in told])
    return found


def _epochs(run: RunResult) -> dict[int, tuple[float, float | None]]:
    """Return mean loss and accuracy of each epoch, from the last line of each in the run's log."""
    log = results.newest_log(Path(run.source).parent)
    try:
        text = read_text(log) if log is not None else ""
    except UserError:
        return {}
    matches = (_EPOCH.match(line) for line in text.splitlines())
    found = {}
    for match in filter(None, matches):
        try:
            found[int(match[1])] = (float(match[2]), None if match[3] is None else float(match[3]))
        except ValueError:
            continue
    return found


def differences(runs: Sequence[RunResult]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Return the methods, and each setting that they do not share: key and value of each ("" where a method lacks it)."""
    by_name: dict[str, dict[str, set[str]]] = {}
    for run in runs:
        own = by_name.setdefault(run.trainer, {})
        for key, value in run.settings().items():
            own.setdefault(key, set()).add(value)
    names = list(by_name)
    keys = sorted({key for own in by_name.values() for key in own})
    lines = [(key, [" or ".join(sorted(by_name[name].get(key, ()))) for name in names]) for key in keys]
    return names, [(key, values) for key, values in lines if len(set(values)) > 1 or any(" or " in value for value in values)]


def provenance(runs: Iterable[RunResult]) -> list[dict[str, Any]]:
    """Return for each run where it lies, what made it, and the command that does it again."""
    lines = []
    for run in runs:
        folder = str(Path(run.source).parent)
        known = f"promptmix eval {shlex.quote(folder)}" if run.checkpoint else ""
        again = shlex.join(run.replay) or known or f"promptmix train --from-run {shlex.quote(folder)} --output-dir NEW"
        lines.append(
            {
                "folder": folder,
                "method": run.trainer,
                "classes": run.subsample_classes,
                "seed": run.seed,
                "finished": run.finished[:16].replace("T", " "),
                "commit": (run.commit or "")[:12] + ("-dirty" if (run.commit or "").endswith("-dirty") else ""),
                "versions": ", ".join(f"{name} {value}" for name, value in run.versions.items()),
                "again": again,
                "approximations": "; ".join(run.approximations),
            }
        )
    return lines
