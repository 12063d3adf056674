"""Tables from runs: grouped by method, data set, protocol and shots; mean and spread over seeds; H of base and new.

How the field reports, and so do we:

* mean and population standard deviation (``numpy.std``) over seeds, as Dassl's ``parse_test_res.py``; on demand half a 95%
  interval, which is Student's here (see ``spread.py``), where Dassl's script takes 1.96 * std / sqrt(n) for any n;
* the average over data sets is the mean of their means;
* H is the harmonic mean of the two MEANS, ``2 * base * new / (base + new)``, over the seeds that have both. The spread
  beside it is that of the H of each seed.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import numpy as np
from tabulate import tabulate, tabulate_formats

from promptmix.engine.league import note_on, rank
from promptmix.errors import UserError
from promptmix.files.text import csv_cell, json_text, one_line, table_cell
from promptmix.registry import closest
from promptmix.runs.results import RunResult
from promptmix.tables import origins
from promptmix.tables.groups import MORE, PARTS, TRANSFER, columns_of, group_of, joined, part_of, title_of
from promptmix.tables.rows import Cell, Row
from promptmix.tables.spread import CI95, STD, spread_of

FORMATS = [*tabulate_formats, "csv", "json"]
SORTS = ("name", "time", "base", "new", "h", "test")
DEFAULT_METRICS = ("accuracy", "macro_accuracy")
_LABELS = {"accuracy": "", "macro_accuracy": " (class-balanced)"}


def aggregate(
    runs: list[RunResult], metrics: Iterable[str] | None = None, split: str = "test", ci95: bool = False
) -> tuple[list[Row], list[str], list[str]]:
    """Group runs and compute mean and spread over seeds.

    Args:
        runs: what ``promptmix.runs.results.find`` returns.
        metrics: which numbers; None = accuracy and class-balanced accuracy, as far as the runs have them.
        split: which evaluation of each run.
        ci95: half a 95% t-interval in place of the standard deviation.

    Returns:
        The rows in order of names, the metrics that stand in them, and notes on what was left out and why.

    Raises:
        UserError: no run has an evaluation of this split, or a metric of this name.
    """
    runs = joined(origins.resolve(runs))
    chosen = _known_metrics(runs, metrics, split)
    groups: dict[tuple[str, ...], list[RunResult]] = defaultdict(list)
    for run in runs:
        groups[group_of(run)].append(run)
    rows: list[Row] = []
    notes: list[str] = []
    for key, members in sorted(groups.items()):
        for settings, same in _by_settings(members).items():
            protocol, dataset, shots, method, backbone = key
            row = Row(method, dataset, protocol, shots, backbone, settings, started=min(run.started for run in same))
            row.trained_on, row.league = same[0].trained_on, same[0].league
            notes += _fill(row, same, [*chosen, *_more(protocol, metrics)], split, ci95)
            rows.append(row)
    return rows, chosen, [*notes, *note_on(row.league for row in rows)]


def averages(rows: list[Row], metrics: list[str], ci95: bool = False) -> list[Row]:
    """Return a row for each method that has several data sets, with the mean of their means.

    H is the harmonic mean of the averaged base and new numbers, as papers report it. The spread is that of each seed's own
    average, over the seeds that every data set has. Where prompts were tested on other data sets or domains than they were
    trained on, the average is over those.

    Args:
        rows: what ``aggregate`` returns.
        metrics: the metrics that stand in them.
        ci95: half a 95% t-interval in place of the standard deviation.
    """
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        if row.trained_on or row.protocol not in TRANSFER.values():
            groups[row.method, row.protocol, row.shots, row.backbone, row.settings, row.trained_on].append(row)
    found: list[Row] = []
    for (method, protocol, shots, backbone, settings, trained_on), same in groups.items():
        names = tuple(sorted({row.dataset for row in same}))
        if len(names) < 2:
            continue
        label = f"{trained_on} → average of {len(names)}" if trained_on else f"average of {len(names)}"
        mean = Row(method, label, protocol, shots, backbone, settings, min(row.started for row in same))
        mean.trained_on, mean.averages, mean.league = trained_on, names, same[0].league
        mean.approximations = tuple(sorted({text for row in same for text in row.approximations}))
        mean.seeds = sorted(set.intersection(*(set(row.seeds) for row in same)))
        for metric in metrics:
            _average(mean, same, metric, ci95)
        found.append(mean)
    return found


def _average(mean: Row, rows: list[Row], metric: str, ci95: bool) -> None:
    """Fill one metric of an average row."""
    each: dict[str, dict[Any, float]] = {}
    for part in sorted({part for row in rows for _, part in row.cells if part != "h"}):
        if all((metric, part) in row.cells for row in rows):
            values = [row.values[metric, part] for row in rows]
            each[part] = {
                seed: float(np.mean([one[seed] for one in values])) for seed in values[0] if all(seed in v for v in values)
            }
            whole = float(np.mean([row.cells[metric, part].mean for row in rows]))
            mean.cells[metric, part] = _cell(list(each[part].values()), ci95, whole)
    if "base" in each and "new" in each:
        h = [harmonic(each["base"][seed], each["new"][seed]) for seed in each["base"] if seed in each["new"]]
        mean.cells[metric, "h"] = _cell(h, ci95, harmonic(mean.cells[metric, "base"].mean, mean.cells[metric, "new"].mean))


def render(rows: list[Row], metrics: list[str], fmt: str = "github", sort: str = "name", cost: bool = False) -> str:
    """Return the table(s) as text: one per protocol, or every number on a line of its own for ``csv`` and ``json``.

    A line at the end says what ± is, where there is one.

    Args:
        rows: what ``aggregate`` and ``averages`` return.
        metrics: the metrics that stand in them.
        fmt: one of ``FORMATS``.
        sort: one of ``SORTS``.
        cost: also show learned parameters, operations of a step and seconds of training.

    Raises:
        UserError: a format or an order that does not exist.
    """
    check_choice("--format", fmt, FORMATS)
    check_choice("--sort", sort, SORTS)
    rows = sorted(rows, key=lambda row: _order(row, sort, metrics))
    if fmt == "json":
        return json_text(json.dumps(_long(rows), indent=2, ensure_ascii=False))
    if fmt == "csv":
        return _csv(_long(rows))
    tables = []
    for protocol in PARTS:
        mine = [row for row in rows if row.protocol == protocol]
        parts = columns_of(protocol, (part for row in mine for _, part in row.cells))
        if mine:  # a column for each round is enough for one metric
            tables.append(_table(mine, metrics[:1] if protocol == "active" else metrics, parts, fmt, cost))
    return "\n\n".join([*tables, *_legend(rows, fmt)])


def spreads_in(rows: Iterable[Row]) -> list[str]:
    """Return what kinds of ± stand in the rows, in words; none where every number is of one seed."""
    return sorted({cell.spread_is for row in rows for cell in row.cells.values() if cell.count > 1})


def _legend(rows: list[Row], fmt: str) -> list[str]:
    """Return the lines that say what ± and stars are, as comments where a format has its own language."""
    kinds = spreads_in(rows)
    texts = [f"± is {' or '.join(kinds)}"] if kinds else []
    texts += [f"* {one_line(text)}" for text in dict.fromkeys(text for row in rows for text in row.approximations)]
    if "latex" in fmt:
        return [f"% {text.replace('%', ' percent')}" for text in texts]
    return [f"<!-- {re.sub('-(?=-)', '- ', text)} -->" for text in texts] if "html" in fmt else texts


def harmonic(base: float, new: float) -> float:
    """Return the harmonic mean of two percentages; 0 where both are 0."""
    return 2 * base * new / (base + new) if base + new else 0.0


def _more(protocol: str, metrics: Iterable[str] | None) -> list[str]:
    """Return what a kind of table shows besides the default metrics."""
    return [] if metrics else [metric for metric, _, _ in MORE.get(protocol, ())]


def _known_metrics(runs: list[RunResult], metrics: Iterable[str] | None, split: str) -> list[str]:
    splits = sorted({name for run in runs for name in run.metrics})
    known = sorted({name for run in runs for name in run.metrics.get(split, {})})
    if not known:
        raise UserError(f"--split {split}: no run was evaluated on it; evaluated splits: {', '.join(splits) or 'none'}")
    for name in metrics or ():
        check_choice("--metric", name, known)
    return list(metrics or [name for name in DEFAULT_METRICS if name in known] or known[:1])


def check_choice(flag: str, value: str, choices: Iterable[str]) -> None:
    """Refuse a value that is not among the choices.

    Raises:
        UserError: it is not; the message suggests the nearest one.
    """
    names = list(choices)
    if value not in names:
        raise UserError(f"{flag} {value}: unknown{closest(value, names)} (choices: {', '.join(names)})")


def _by_settings(runs: list[RunResult]) -> dict[str, list[RunResult]]:
    """Part runs whose configs differ in anything that could move a number, so that they are never averaged together."""
    flat = [_settings(run, runs) for run in runs]
    values: dict[str, set[str]] = defaultdict(set)
    for one in flat:
        for key, value in one.items():
            values[key].add(value)
    # A plugin's keys are in a config only if it was loaded: what a run does not state it does not contradict.
    differing = sorted(key for key, found in values.items() if len(found) > 1)
    texts = [{key: one[key] for key in differing if key in one} for one in flat]
    complete = [text for text in texts if len(text) == len(differing)]
    parts: dict[str, list[RunResult]] = defaultdict(list)
    for run, text in zip(runs, texts, strict=True):
        # An evaluation of unknown training, or a record that says less, belongs to the only one that it can belong to.
        fitting = {tuple(other.items()) for other in complete if text.items() <= other.items()}
        found = dict(next(iter(fitting))) if len(fitting) == 1 else text
        parts[" ".join(f"{key}={value}" for key, value in found.items())].append(run)
    return dict(sorted(by_folder for key, same in _by_variant(parts).items() for by_folder in _by_folder(key, same)))


def _by_variant(parts: dict[str, list[RunResult]]) -> dict[str, list[RunResult]]:
    """Call settings by the names that a sweep gave them, where each has one name of its own; two names are never one row."""
    split: dict[str, list[RunResult]] = defaultdict(list)
    for key, same in parts.items():
        several = len({run.variant for run in same} - {""}) > 1
        for run in same:
            split[" ".join(filter(None, (key, f"variant={run.variant}" if several and run.variant else "")))].append(run)
    names = {key: {run.variant for run in same} for key, same in split.items()}
    called = [next(iter(own)) for own in names.values() if len(own) == 1]
    if len(set(called)) < len(split) or not any(called):
        return split
    return dict(zip(called, split.values(), strict=True))


def _settings(run: RunResult, runs: list[RunResult]) -> dict[str, str]:
    """Return a run's settings; those of training are, for an evaluation, the evaluated run's, or unknown."""
    own = run.settings() | _classes(run)
    if run.checkpoint is None:
        return own
    trained = origins.partner(run, runs)
    theirs = trained.settings() if trained is not None else {}
    own = {key: value for key, value in own.items() if not key.startswith(origins.TRAINING_KEYS)}
    if run.checkpoint.get("epoch") is not None:
        own["--load-epoch"] = str(run.checkpoint["epoch"])
    return own | {key: value for key, value in theirs.items() if key.startswith(origins.TRAINING_KEYS)}


def _classes(run: RunResult) -> dict[str, str]:
    """Tell two folders of own pictures apart, which one data set reads: by the classes in them."""
    names = sorted(run.vocabulary.get("all_classnames") or ())
    if not names:
        return {}
    digest = hashlib.sha256(json.dumps(names).encode()).hexdigest()[:6]
    return {"classes": f"{', '.join(names[:2])}{', ...' * (len(names) > 2)} ({len(names)}, {digest})"}


def _by_folder(settings: str, runs: list[RunResult]) -> list[tuple[str, list[RunResult]]]:
    """Part runs that are alike but for the folder that was evaluated, where one seed has several of them."""
    seen: dict[tuple[str, int], RunResult] = {}
    for run in (run for run in runs if run.checkpoint is not None and run.seed >= 0):
        other = seen.setdefault((run.subsample_classes, run.seed), run)
        if not origins.same_training(run, other):
            break
    else:
        return [(settings, runs)]
    parts: list[list[RunResult]] = []
    for run in sorted(runs, key=lambda run: -len(origins.label(run))):
        known = next((part for part in parts if origins.same_training(run, part[0])), None)
        parts.append([run]) if known is None else known.append(run)
    return [(f"{settings} --model-dir={origins.label(part[0])}".strip(), part) for part in parts]


def _fill(row: Row, runs: list[RunResult], metrics: list[str], split: str, ci95: bool) -> list[str]:
    """Fill the row's cells and seeds; return notes on duplicates and on seeds without a partner."""
    by_part: dict[str, dict[Any, RunResult]] = defaultdict(dict)
    notes: list[str] = []
    name = f"{row.method} on {row.dataset}"
    for run in sorted(runs, key=lambda run: (run.finished, run.source)):
        part = by_part[part_of(run)]
        # Runs without a seed are different draws, never repetitions of each other.
        seed = run.seed if run.seed >= 0 else f"unseeded {len(part)}"
        if seed in part:
            notes.append(f"{name}, {run.subsample_classes}, seed {seed}: the newest of several runs ({run.source})")
        part[seed] = run
    row.runs = dict(by_part)
    row.approximations = tuple(
        sorted({text for part in by_part.values() for run in part.values() for text in run.approximations})
    )
    row.seeds = sorted({run.seed for part in by_part.values() for run in part.values()})
    row.learned = runs[0].learned_parameters
    row.gflops = next((run.step_gflops for run in runs if run.step_gflops is not None), None)
    trained = [run.seconds["train"] for part in by_part.values() for run in part.values() if run.seconds.get("train")]
    row.train_seconds = _cell(trained, ci95) if trained else None
    for metric in metrics:
        values = {part: _numbers(found, metric, split) for part, found in by_part.items()}
        for name_of_part, numbers in values.items():
            if numbers:
                row.cells[metric, name_of_part] = _cell(list(numbers.values()), ci95)
                row.values[metric, name_of_part] = numbers
        both = sorted(values.get("base", {}).keys() & values.get("new", {}).keys(), key=str)
        if both:
            row.cells[metric, "h"] = _h_cell(values, both, ci95)
    base, new = by_part.get("base", {}).keys(), by_part.get("new", {}).keys()
    if base and new and base ^ new:
        alone = ", ".join(sorted(str(seed) for seed in base ^ new))
        notes.append(f"{name}: seed {alone} has only one of base and new, so H leaves it out")
    return list(dict.fromkeys(notes))


def _numbers(found: dict[Any, RunResult], metric: str, split: str) -> dict[Any, float]:
    """Return the metric of each seed that has it (a log may lack what ``results.json`` holds)."""
    return {seed: run.metrics[split][metric] for seed, run in found.items() if metric in run.metrics.get(split, {})}


def _cell(values: list[float], ci95: bool, mean: float | None = None) -> Cell:
    return Cell(float(np.mean(values)) if mean is None else mean, spread_of(values, ci95), len(values), CI95 if ci95 else STD)


def _h_cell(values: dict[str, dict[Any, float]], seeds: list[Any], ci95: bool) -> Cell:
    base = [values["base"][seed] for seed in seeds]
    new = [values["new"][seed] for seed in seeds]
    each = [harmonic(b, n) for b, n in zip(base, new, strict=True)]
    return _cell(each, ci95, mean=harmonic(float(np.mean(base)), float(np.mean(new))))


def _order(row: Row, sort: str, metrics: list[str]) -> tuple[Any, ...]:
    place = (row.protocol, bool(row.averages), row.dataset, row.shots.rjust(6), rank(row.league))
    if sort == "time":
        return (*place, row.started)
    if sort == "name":
        return (*place, row.method.lower(), row.settings)
    cell = row.cells.get((metrics[0], sort))
    return (*place, -cell.mean if cell else float("inf"))  # best first, rows without the number last


def _table(rows: list[Row], metrics: list[str], parts: tuple[str, ...], fmt: str, cost: bool) -> str:
    columns: dict[str, list[str]] = {"Method": [_marked(row) for row in rows], "Data set": [row.dataset for row in rows]}
    several = {"Backbone": "backbone", "League": "league", "Settings": "settings"}
    for title, values in ((title, [getattr(row, name) for row in rows]) for title, name in several.items()):
        if len(set(values)) > 1:
            columns[title] = values
    columns["Shots"] = [row.shots for row in rows]
    columns["Seeds"] = [" ".join("none" if seed < 0 else str(seed) for seed in row.seeds) for row in rows]
    words = len(columns)
    for metric in metrics:
        for part in parts:
            label = title_of(part)
            title = label + _LABELS.get(metric, f" ({metric})")
            columns[title] = [str(row.cells.get((metric, part), "-")) for row in rows]
            if metric == "accuracy" and any(part in row.published for row in rows):
                columns[f"{label}, published"] = [_published(row, part) for row in rows]
    for metric, part, title in MORE.get(rows[0].protocol, ()):
        if metric not in metrics and any((metric, part) in row.cells for row in rows):
            columns[title] = [str(row.cells.get((metric, part), "-")) for row in rows]
    if cost:
        columns["Learned"] = ["-" if row.learned is None else f"{row.learned:,}" for row in rows]
        columns["GFLOP a step"] = ["-" if row.gflops is None else f"{row.gflops:,.1f}" for row in rows]
        columns["Train s"] = ["-" if row.train_seconds is None else f"{row.train_seconds.mean:.1f}" for row in rows]
    align = ("left",) * words + ("right",) * (len(columns) - words)
    safe = {table_cell(name, fmt): [table_cell(cell, fmt) for cell in cells] for name, cells in columns.items()}
    return tabulate(safe, headers="keys", tablefmt=fmt, disable_numparse=True, colalign=align)


def _marked(row: Row) -> str:
    """Return the method's name, with a star where some of its runs did otherwise than it says (the legend tells what)."""
    return f"{row.method} *" if row.approximations else row.method


def _published(row: Row, part: str) -> str:
    """Return the published number and how far ours is from it."""
    if part not in row.published:
        return "-"
    cell = row.cells.get(("accuracy", part))
    number = row.published[part]
    return f"{number:.2f} ({cell.mean - number:+.2f})" if cell else f"{number:.2f}"


def _long(rows: list[Row]) -> list[dict[str, Any]]:
    keys = ("method", "dataset", "protocol", "shots", "backbone", "league", "settings", "seeds")
    compared = any(row.published for row in rows)

    def papers(row: Row, metric: str, part: str, cell: Cell) -> dict[str, Any]:
        number = row.published.get(part) if metric == "accuracy" else None
        difference = None if number is None else cell.mean - number
        origin = "" if number is None else row.origin
        return {"published": number, "difference": difference, "origin": origin} if compared else {}

    marked = any(row.approximations for row in rows)
    return [
        {key: getattr(row, key) for key in keys}
        | {"metric": metric, "part": part}
        | asdict(cell)
        | papers(row, metric, part, cell)
        | ({"approximations": "; ".join(row.approximations)} if marked else {})
        for row in rows
        for (metric, part), cell in row.cells.items()
    ]


def _csv(lines: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(lines[0]), lineterminator="\n")
    writer.writeheader()
    texts = (line | {"seeds": " ".join(map(str, line["seeds"]))} for line in lines)
    writer.writerows({key: csv_cell(value) for key, value in line.items()} for line in texts)
    return text.getvalue().rstrip("\n")
