"""The page: its sections from runs, and the HTML."""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from promptmix.errors import UserError
from promptmix.files.text import counted, harmless
from promptmix.report import figures, gather
from promptmix.report.gather import Detail
from promptmix.report.parts import Block, Cell, Figure, Section, table
from promptmix.report.reliability import Reliability, reliability_of
from promptmix.report.thumbnails import Album
from promptmix.runs.results import RunResult
from promptmix.tables import paired, plots, tables
from promptmix.tables.rows import Row
from promptmix.version import __version__

__all__ = ["Wish", "page"]

#: Methods that are told in depth, in each place; of the others the tables.
MOST = 6
_LARGE_CONFUSION = 60  # classes; beyond them a matrix can't be read
_LABELS = {"base": "base", "new": "new", "h": "H", "test": "test"}


@dataclass(frozen=True)
class Wish:
    """What the caller wants.

    Attributes:
        title: of the page; "" = what it is about.
        root: folder below which pictures may be opened.
        baseline: method that the others are compared with; "" = every pair.
        insights: what ``promptmix.interpret`` found, by what the run is called.
        metric: the number that methods are ranked by.
    """

    title: str = ""
    root: str = ""
    baseline: str = ""
    insights: dict[str, Any] = field(default_factory=dict)
    metric: str = "accuracy"


def page(runs: list[RunResult], wish: Wish, notes: list[str]) -> str:
    """Return the page.

    Args:
        runs: what ``gather.find`` returns.
        wish: what the caller wants.
        notes: gets what was left out, and why; they stand at the page's end.

    Raises:
        UserError: matplotlib or Jinja is not installed, or the runs have no evaluation.
    """
    if importlib.util.find_spec("jinja2") is None:
        raise UserError("a report needs jinja2; install it with: pip install 'promptmix[report]'")
    import jinja2

    metrics = [wish.metric, *(["macro_accuracy"] if wish.metric == "accuracy" else [])]
    known = {name for run in runs for name in run.metrics.get("test", {})}
    rows, metrics, more = tables.aggregate(runs, [name for name in metrics if name in known] or None)
    rows += tables.averages(rows, metrics)
    rows.sort(key=lambda row: (row.dataset, math.inf if row.shots == "all" else float(row.shots)))
    notes += more
    with figures.drawing():
        sections = [section for section in _sections(rows, metrics, runs, wish, notes) if section.blocks]
    methods = list(dict.fromkeys(row.method for row in rows))
    datasets = list(dict.fromkeys(row.dataset for row in rows if not row.averages))
    undefined = jinja2.StrictUndefined
    environment = jinja2.Environment(autoescape=True, finalize=_shown, trim_blocks=True, undefined=undefined)
    template = environment.from_string(files("promptmix.report").joinpath("page.html").read_text(encoding="utf-8"))
    for section in sections:
        for figure in (figure for block in section.blocks for figure in block.figures):
            figure.svg = jinja2.filters.Markup(figure.svg)  # ours; names in it are escaped where it is made
    dates = sorted(run.finished[:10] for run in runs if run.finished)
    seeds = sorted({run.seed for run in runs})
    about = f"{', '.join(datasets)}. Seeds {', '.join(map(str, seeds))}."
    if dates:
        about += f" Runs of {dates[0]}" + (f" to {dates[-1]}." if dates[-1] != dates[0] else ".")
    return template.render(
        title=wish.title or ", ".join(methods[:5]) + (f" and {len(methods) - 5} more" if len(methods) > 5 else ""),
        about=about,
        sections=sections,
        notes=list(dict.fromkeys(notes)),
        version=__version__,
        count=len(runs),
    )


def _shown(value: Any) -> Any:  # whatever the template shows
    """Write out the control characters of any text of the page; markup is ours."""
    return value if hasattr(value, "__html__") else harmless(value)


def _sections(rows: list[Row], metrics: list[str], runs: list[RunResult], wish: Wish, notes: list[str]) -> Iterator[Section]:
    details = _chosen(gather.details(rows, notes), notes)
    by_place = {place: list(same) for place, same in itertools.groupby(sorted(details, key=lambda d: d.place), lambda d: d.place)}
    yield Section("result", "What came out", "", [*_headline(rows, metrics), *_tests(rows, wish, notes)])
    yield Section("charts", "Charts", "", _charts(rows, metrics))
    yield Section("classes", "Class by class", "", [block for place, same in by_place.items() for block in _classes(place, same)])
    yield Section("pictures", "Who was wrong", "The first seed of each method.", _albums(details, wish, notes))
    text = (
        "Is a confidence of 80% right in 80% of the cases? T is fitted on one half of the test pictures and judged on the other."
    )
    yield Section("reliability", "How sure it is", text, _reliability(by_place))
    told = {detail.name for detail in details}
    yield Section("learning", "How it learned", "", _learning(rows, told))
    yield Section(
        "inside", "What was learned", "", [block for name, one in wish.insights.items() for block in _inside(name, one)]
    )
    yield Section("cost", "What it cost", "", _cost(rows))
    yield Section("settings", "Where the settings differ", "", _settings(runs))
    yield Section("again", "Where it comes from, and how to do it again", "", _provenance(runs))


def _chosen(details: list[Detail], notes: list[str]) -> list[Detail]:
    """Keep the best methods of each place where there are many, in the order of the tables."""
    found: list[Detail] = []
    for place in dict.fromkeys(detail.place for detail in details):
        same = [detail for detail in details if detail.place == place]
        best = sorted(same, key=lambda detail: -sum(float(test.correct.mean()) for test in detail.tests) / len(detail.tests))[
            :MOST
        ]
        found += [detail for detail in same if detail in best]
        if len(same) > MOST:
            notes.append(f"{place}: classes, pictures and reliability of the best {MOST} of {len(same)} methods")
    return found


def _headline(rows: list[Row], metrics: list[str]) -> list[Block]:
    blocks = []
    for protocol in dict.fromkeys(row.protocol for row in rows):
        mine = [row for row in rows if row.protocol == protocol]
        parts = [part for part in _LABELS if any((metrics[0], part) in row.cells for row in mine)]
        for dataset in dict.fromkeys(row.dataset for row in mine):
            same = [row for row in mine if row.dataset == dataset]
            many = len(same) > plots.MANY
            if many:
                same.sort(
                    key=lambda row: (
                        -max((cell.mean for c, cell in row.cells.items() if c == (metrics[0], parts[-1])), default=0.0)
                    )
                )
            columns = [(metric, part) for metric in metrics for part in parts]
            best = {c: max((row.cells[c].mean for row in same if c in row.cells), default=0.0) for c in columns}
            lines = []
            for row in same:
                cells = [row.cells.get(c) for c in columns]
                shown = [
                    Cell(
                        str(cell) if cell else "-",
                        best=cell is not None and len(same) > 1 and cell.mean == best[c],
                        share=cell.mean if cell is not None and many else None,
                    )
                    for cell, c in zip(cells, columns, strict=True)
                ]
                lines.append([_name(row), row.shots, str(len(row.seeds)), *shown])
            head = ["Method", "Shots", "Seeds", *(_title(metric, part) for metric, part in columns)]
            spread = "; ".join(tables.spreads_in(same))
            caption = f"{dataset}, {protocol}" + (f"; ± is {spread}" if spread else "")
            caption += f"; by {_title(metrics[0], parts[-1])}, the best first" if many else ""
            blocks.append(Block(tables=[table(caption, head, lines)]))
    return blocks


def _name(row: Row) -> str:
    return row.method + (f" ({row.settings})" if row.settings else "")


def _title(metric: str, part: str) -> str:
    label = {"h": "H", "test": "Test"}.get(part, part.capitalize())
    return label + {"accuracy": "", "macro_accuracy": ", balanced"}.get(metric, f" ({metric})")


def _tests(rows: list[Row], wish: Wish, notes: list[str]) -> list[Block]:
    baseline = wish.baseline
    methods = {row.method for row in rows}
    if not baseline and len(methods) > plots.MANY:
        baseline = "ZeroshotCLIP" if "ZeroshotCLIP" in methods else _best(rows, wish.metric)
        notes.append(f"of {len(methods)} methods, {baseline} is compared with each other one; --compare METHOD chooses another")
    found, more = paired.compare(rows, baseline)
    notes += more
    if not found:
        return []
    several, shots = len({one.dataset for one in found}) > 1, len({one.shots for one in found}) > 1
    lines = [
        [
            f"{one.first} − {one.second}",
            (f"{one.dataset}, " if several else "") + _LABELS[one.part] + (f", {one.shots} shots" if shots else ""),
            Cell(f"{one.difference:+.2f}", best=one.holm < 0.05),
            f"{one.low:+.2f} to {one.high:+.2f}",
            *(paired.shown_p(one.p), paired.shown_p(one.holm)),
            one.test.partition(" ")[0].rstrip(",")
            + (f" {one.only_first}:{one.only_second}" if one.only_first is not None else ""),
        ]
        for one in found
    ]
    head = ["Difference", "Where", "Points", "95% interval", "p", "p (Holm)", "Test"]
    text = "Paired on the same test pictures: McNemar's exact test for two runs, else a bootstrap over pictures and seeds. "
    count = counted(len(found), "comparison")
    text += f"{count}; in colour where p after Holm's correction is below 0.05."
    one = table("Differences in accuracy", head, lines, lead=2)
    return [Block("Which differences hold", text, [one], closed="" if len(found) <= 12 else count)]


def _best(rows: list[Row], metric: str) -> str:
    """Return the method with the best H or test accuracy."""
    part = "h" if any((metric, "h") in row.cells for row in rows) else "test"
    cells = [(row.cells[metric, part].mean, row.method) for row in rows if (metric, part) in row.cells]
    return max(cells)[1] if cells else rows[0].method


def _charts(rows: list[Row], metrics: list[str]) -> list[Block]:
    if sum(not row.averages for row in rows) < 2:
        return []
    drawn = [(name, Figure("", figures.svg(figure, f"chart {name}"))) for name, figure in plots.figures(rows, metrics[0])]
    wide = [figure for name, figure in drawn if name.startswith("ranking")]
    others = [figure for name, figure in drawn if not name.startswith("ranking")]
    return [Block(figures=some, size=size) for some, size in ((others, "large"), (wide, "full")) if some]


def _classes(place: str, same: Sequence[Detail]) -> list[Block]:
    lines = []
    for line in gather.per_class(same):
        values = line["values"]
        best = max((value for value in values if value is not None), default=None)
        cells = [
            Cell("-")
            if value is None
            else Cell(f"{value:.0f}%", best=len(values) > 1 and value == best and values.count(best) < len(values), share=value)
            for value in values
        ]
        lines.append([line["name"], str(line["count"]), *cells])
    caption = f"Accuracy by class, {place}; mean over seeds"
    blocks = [Block(place, tables=[table(caption, ["Class", "Pictures", *(detail.name for detail in same)], lines)])]
    drawn = []
    for detail in same:
        pairs = [[f"{one['is']} → {one['said']}", str(one["count"]), str(one["of"])] for one in gather.top_confusions(detail)]
        if pairs:
            title = f"{detail.name}: taken for another most often, {place}"
            blocks.append(Block(tables=[table(title, ["Is → said", "Times", "Of"], pairs)], closed=title))
        if len(detail.classnames) <= _LARGE_CONFUSION:
            name = f"Confusion matrix of {detail.name}, {place}; rows are true classes, numbers are pictures, all seeds"
            drawn.append(Figure(name, figures.confusion(detail.counts, detail.classnames, name)))
    if drawn:
        blocks.append(Block(figures=drawn, size="full", closed=f"Confusion matrices, {place}" if len(drawn) > 1 else ""))
    return blocks


def _albums(details: Sequence[Detail], wish: Wish, notes: list[str]) -> list[Block]:
    album, blocks = Album(wish.root), []
    titles = {"worst": "surely wrong", "doubtful": "hardly decided"}
    for detail in details:
        found = gather.pictures(detail, album)
        for which, words in titles.items():
            if found[which]:
                blocks.append(Block(f"{detail.name}, {detail.place}: {words}", album=found[which]))
    if album.refused:
        where = "unreadable below --root" if wish.root else "outside the embedded data (--root DIR says where they may be read)"
        count = counted(album.refused, "picture is", "pictures are")
        notes.append(f"{count} not shown: {where}, or the page would have grown too large")
    return blocks


def _reliability(by_place: dict[str, list[Detail]]) -> list[Block]:
    blocks = []
    for place, same in by_place.items():
        found: list[tuple[str, Reliability]] = [(detail.name, reliability_of(detail.tests)) for detail in same]
        lines = [[name, f"{one.error:.1f}%", f"{one.temperature:.2f}", f"{one.calibrated:.1f}%"] for name, one in found]
        head = ["Method", "ECE", "Temperature that calibrates it", "ECE with it"]
        drawn = [Figure(name, figures.reliability(one, f"Reliability of {name}, {place}")) for name, one in found]
        blocks.append(Block(place, tables=[table(f"Expected calibration error (15 bins), {place}", head, lines)], figures=drawn))
    return blocks


def _learning(rows: list[Row], told: set[str]) -> list[Block]:
    drawn = []
    for title, every in gather.learning(rows).items():
        lines = every if len(every) <= MOST else {name: line for name, line in every.items() if name in told}
        if not lines:
            continue
        label = "loss / that of the first epoch" if title.startswith("loss") else "accuracy of batches (%)"
        drawn.append(Figure(f"Training {title}", figures.curves(lines, label, f"Training {title}")))
    text = "Means over each epoch's batches and over the runs. Losses of different terms don't compare, so each begins at 1."
    return [Block(text=text, figures=drawn)] if drawn else []


def _inside(name: str, insight: Any) -> list[Block]:  # an Insight
    from promptmix.interpret import pictures, show

    drawn = [Figure(title, figures.svg(figure, f"{name} {title}")) for title, figure in pictures.figures(insight)]
    found = [table(title, head, rows, lead=lead, words=not lead) for title, head, rows, lead in show.grids(insight)]
    blocks = [Block(name, text=". ".join(insight.notes), figures=drawn, size="large")]
    first = [one for one in found if one.caption.startswith(("Who does it", "Routing"))]
    rest = [one for one in found if one not in first]
    return [*blocks, Block(tables=first), *(Block(tables=[one], closed=one.caption) for one in rest)]


def _cost(rows: list[Row]) -> list[Block]:
    lines = []
    for row in rows:
        runs = [run for part in row.runs.values() for run in part.values()]
        trained = [run for run in runs if run.checkpoint is None] or runs
        if row.averages or not runs:
            continue

        def mean(values: list[float | None]) -> str:
            known = [value for value in values if value is not None]
            return f"{sum(known) / len(known):,.1f}" if known else "-"

        learned = trained[0].learned_parameters
        cells = [
            "-" if learned is None else f"{learned:,}",
            mean([run.seconds.get("train") for run in trained]),
            mean([run.seconds.get("test") for run in runs]),
            mean([run.peak_memory_mb.get("rss") for run in runs]),
            mean([run.peak_memory_mb.get("cuda") for run in runs]),
        ]
        lines.append([_name(row), row.dataset, row.shots, *cells])
    head = ["Method", "Data set", "Shots", "Learned numbers", "Training, s", "Test, s", "Memory, MiB", "GPU, MiB"]
    closed = f"{len(lines)} rows" if len(lines) > plots.MANY else ""
    return [Block(tables=[table("Means over the runs", head, lines, lead=2)], closed=closed)] if lines else []


def _settings(runs: list[RunResult]) -> list[Block]:
    names, lines = gather.differences(runs)
    if not lines:
        return []
    cells = [[key, *(Cell(value or "-", code=True) for value in values)] for key, values in lines]
    one = table("Settings that are not the same in all runs", ["Key", *names], cells, words=True)
    return [Block(tables=[one], closed=f"{len(lines)} keys")]


def _provenance(runs: list[RunResult]) -> list[Block]:
    lines = [
        [
            one["folder"],
            one["method"],
            one["classes"],
            str(one["seed"]),
            one["finished"],
            one["commit"],
            Cell(one["again"], code=True),
        ]
        for one in gather.provenance(runs)
    ]
    head = ["Folder", "Method", "Classes", "Seed", "Finished (UTC)", "Commit", "Again"]
    versions = " / ".join(dict.fromkeys(one["versions"] for one in gather.provenance(runs)))
    told = "; ".join(dict.fromkeys(one["approximations"] for one in gather.provenance(runs) if one["approximations"]))
    text = f"Made with {versions}." + (f" Approximations: {told}." if told else "")
    return [
        Block(text=text, tables=[table("Runs", head, lines, words=True)], closed=f"{len(lines)} runs" if len(lines) > 12 else "")
    ]
