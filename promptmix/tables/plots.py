"""Pictures of a table: curves over shots, base against new accuracy, and bars per data set.

matplotlib is an optional dependency, imported when something is drawn, and needs no display.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from promptmix.errors import UserError
from promptmix.files.text import harmless
from promptmix.files.whole import whole
from promptmix.tables.rows import Cell, Row, name_among
from promptmix.tables.tables import spreads_in

#: Okabe and Ito's colours, told apart with any colour vision and in grey; with the markers, 40 methods differ.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#999999")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_HATCHES = ("", "//", "..", "xx", "--")
#: From how many methods on bars become a ranking, and how many of them keep a colour and a name in curves and scatters.
MANY, _NAMED = 12, 7
_PARTS = {"base": "Base", "new": "New", "h": "H", "test": "Test"}
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "text.parse_math": False,  # a dollar sign in a name is not a formula
    "savefig.dpi": 150,
    "savefig.bbox": "tight",
    "pdf.fonttype": 42,  # TrueType, which conferences ask for
    "svg.hashsalt": "promptmix",  # the same picture is the same file
}
#: Formats by suffix, with what a file must not say of itself so that the same picture is the same file.
_FORMATS: dict[str, dict[str, Any]] = {".png": {}, ".pdf": {"CreationDate": None}, ".svg": {"Date": None}}


@dataclass(frozen=True)
class _Series:
    """How one method looks in every picture."""

    label: str
    colour: str
    marker: str
    hatch: str


_OTHERS = _Series("others", "#b5b5b5", "o", "")


def write(rows: list[Row], metric: str, place: Path) -> list[Path]:
    """Draw what the rows have: curves need two numbers of shots, the scatter base and new, bars always come.

    Args:
        rows: rows of a table, averages included.
        metric: the number that is drawn, in percent.
        place: the folder of the PNG files; or a file name that ends with .png, .pdf or .svg, which the files' names begin with.

    Returns:
        The files.

    Raises:
        UserError: matplotlib is not installed, the suffix is of no format, or the folder can't be written.
    """
    folder, start, suffix = _place(place)
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("--plot needs matplotlib; install it with: pip install 'promptmix[plot]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    found: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with pyplot.rc_context(_STYLE):
            for name, figure in figures(rows, metric):
                path = folder / f"{start}{name}{suffix}"
                with whole(path) as part:
                    figure.savefig(part, format=suffix[1:], metadata=_FORMATS[suffix])
                pyplot.close(figure)
                found.append(path)
    except OSError as error:
        raise UserError(f"--plot {folder}: {error.strerror or error}; choose another folder") from error
    return found


def _place(place: Path) -> tuple[Path, str, str]:
    """Return the folder of the files, what their names begin with, and their suffix.

    Raises:
        UserError: the suffix is of no format.
    """
    if not place.suffix or place.is_dir():
        return place, "", ".png"
    if place.suffix.lower() not in _FORMATS:
        raise UserError(f"--plot {place}: give a folder, or a file name that ends with {', '.join(_FORMATS)}")
    return place.parent, f"{place.stem}-", place.suffix.lower()


def figures(rows: list[Row], metric: str) -> Iterator[tuple[str, Any]]:
    """Yield name and matplotlib figure of each picture that the rows give."""
    styles = _styles(rows)
    for protocol in dict.fromkeys(row.protocol for row in rows):
        mine = [row for row in rows if row.protocol == protocol]
        slug = re.sub(r"\W+", "-", protocol)
        shots = sorted({row.shots for row in mine}, key=_number)
        parts = [part for part in _PARTS if any((metric, part) in row.cells for row in mine)]
        if not parts:  # classes of another program's name
            continue
        if len([shot for shot in shots if shot != "all"]) > 1:
            for part in parts:
                yield f"shots-{slug}-{part}", _curves(mine, metric, part, styles, protocol)
        for shot in shots:
            same = [row for row in mine if row.shots == shot]
            tail = f"{slug}-{shot}-shots"
            if any((metric, "base") in row.cells and (metric, "new") in row.cells for row in same):
                yield f"base-new-{tail}", _scatter(same, metric, styles, shot)
            title = f"{protocol}, {shot} shots"
            if len({row.key for row in same}) > MANY:
                yield f"ranking-{tail}", _ranking(same, metric, parts, styles, title)
            else:
                yield f"bars-{tail}", _bars(same, metric, parts, styles, title)


def _styles(rows: list[Row]) -> dict[tuple[str, str, str], _Series]:
    """Return the look of each method, backbone and setting; the label names what differs among those of one method."""
    keys = sorted({row.key for row in rows}, key=lambda key: (key[0] != "ZeroshotCLIP", *key))
    found = {}
    for place, key in enumerate(keys):
        label = "\n".join(textwrap.wrap(harmless(name_among(key, keys)), 40))
        again = place // len(_COLOURS)
        marker = _MARKERS[(place + again) % len(_MARKERS)]
        found[key] = _Series(label, _COLOURS[place % len(_COLOURS)], marker, _HATCHES[again % len(_HATCHES)])
    return found


def _ranked(rows: list[Row], metric: str) -> list[tuple[str, str, str]]:
    """Return methods, the best first: by H or test accuracy of the average over data sets; then those that have none."""
    part = "h" if any((metric, "h") in row.cells for row in rows) else "test"
    scores: dict[tuple[str, str, str], list[tuple[bool, float]]] = {}
    for row in rows:
        cell = row.cells.get((metric, part))
        scores.setdefault(row.key, []).append((bool(row.averages), cell.mean if cell is not None else 0.0))

    def place(key: tuple[str, str, str]) -> tuple[bool, float]:
        averaged = [value for is_average, value in scores[key] if is_average]
        found = averaged or [value for _, value in scores[key]]
        return not averaged, -sum(found) / len(found)

    return sorted(scores, key=lambda key: (*place(key), key))


def _named(rows: list[Row], metric: str, styles: dict[Any, _Series]) -> dict[Any, _Series]:
    """Return the looks in one picture: of many methods, all but the best look alike and stand behind them."""
    keys = _ranked(rows, metric)
    if len(keys) <= MANY:
        return styles
    best = zip(keys[:_NAMED], _COLOURS, _MARKERS, strict=False)
    found = dict.fromkeys(keys[_NAMED:], _OTHERS)
    return found | {key: replace(styles[key], colour=colour, marker=marker) for key, colour, marker in best}


def _number(shots: str) -> float:
    return math.inf if shots == "all" else float(shots)


def _panels(rows: list[Row]) -> list[str]:
    """Return data sets in order, averages first."""
    names = {row.dataset: bool(row.averages) for row in rows}
    return sorted(names, key=lambda name: (not names[name], name))


def _words(metric: str) -> str:
    return harmless(metric.replace("_", " "))


def _wrapped(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(harmless(text), width, break_long_words=False))


def _legend(figure: Any, axes: Iterable[Any], rows: list[Row]) -> None:  # matplotlib's objects
    """Put one legend for all panels below them, where it covers nothing, with what the bars or bands are."""
    handles = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    columns = min(len(handles), max(1, int(figure.get_figwidth() / (0.55 + 0.085 * max(map(len, handles))))))
    figure.legend(
        handles.values(), handles.keys(), loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=columns, title=_bars_are(rows)
    )


def _bars_are(rows: list[Row]) -> str | None:
    kinds = spreads_in(rows)
    return f"±: {' or '.join(kinds)}" if kinds else None


def _curves(rows: list[Row], metric: str, part: str, styles: dict[Any, _Series], protocol: str) -> Any:
    """Accuracy over shots, a panel for each data set."""
    from matplotlib import pyplot

    styles = _named(rows, metric, styles)
    panels = _panels([row for row in rows if (metric, part) in row.cells])
    across = min(len(panels), 4)
    down = math.ceil(len(panels) / across)
    figure, grid = pyplot.subplots(
        down, across, figsize=(max(4.2, 3.1 * across), 2.9 * down), squeeze=False, layout="constrained"
    )
    axes = list(grid.flat)
    ticks = sorted({int(row.shots) for row in rows if row.shots != "all"})
    for ax, name in zip(axes, panels, strict=False):
        for key, style in styles.items():
            points = sorted(
                (int(row.shots), row.cells[metric, part])
                for row in rows
                if row.dataset == name and row.key == key and row.shots != "all" and (metric, part) in row.cells
            )
            if points:
                x, y = [shots for shots, _ in points], [cell.mean for _, cell in points]
                spread = [cell.bar for _, cell in points]
                ax.plot(x, y, color=style.colour, marker=style.marker, markersize=5, linewidth=1.6, label=style.label)
                low, high = zip(*((m - s, m + s) for m, s in zip(y, spread, strict=True)), strict=True)
                ax.fill_between(x, low, high, color=style.colour, alpha=0.15, linewidth=0)
        ax.set_xscale("log", base=2)
        ax.set_xticks(ticks, [str(tick) for tick in ticks])
        ax.minorticks_off()
        ax.set_title(_wrapped(name, 28), fontsize=10)
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    figure.suptitle(f"{_PARTS[part]}, {protocol}", fontsize=11)
    figure.supxlabel("shots per class", fontsize=10)
    figure.supylabel(f"{_words(metric)} (%)", fontsize=10)
    _legend(figure, axes[: len(panels)], rows)
    return figure


def _scatter(rows: list[Row], metric: str, styles: dict[Any, _Series], shots: str) -> Any:
    """Base against new: each data set small and pale, the average large; grey curves of equal H behind them."""
    from matplotlib import pyplot

    drawn = [row for row in rows if (metric, "base") in row.cells and (metric, "new") in row.cells]
    averaged = any(row.averages for row in drawn)
    styles = _named(drawn, metric, styles)
    figure, ax = pyplot.subplots(figsize=(5.6, 5.2), layout="constrained")
    for row in sorted(drawn, key=lambda row: list(styles).index(row.key)):
        style = styles[row.key]
        base, new = row.cells[metric, "base"], row.cells[metric, "new"]
        large = bool(row.averages) or not averaged
        ax.errorbar(
            base.mean,
            new.mean,
            xerr=base.bar if large else None,
            yerr=new.bar if large else None,
            color=style.colour,
            marker=style.marker,
            markersize=10 if large else 5,
            markeredgecolor="white" if large else style.colour,
            alpha=1.0 if large else 0.45,
            linestyle="none",
            elinewidth=1.2,
            zorder=3 if large else 2,
            label=style.label if large else None,
        )
    _square(ax, [row.cells[metric, part] for row in drawn for part in ("base", "new")])
    ax.set_xlabel(f"base {_words(metric)} (%)")
    ax.set_ylabel(f"new {_words(metric)} (%)")
    ax.set_title(f"base to new, {shots} shots" + ("; large: average over data sets" if averaged else ""), fontsize=11)
    _legend(figure, [ax], drawn)
    return figure


def _square(ax: Any, cells: list[Cell]) -> None:
    """Give both axes the same limits around the points, and draw curves of equal H with their values at the edge."""
    low = max(0.0, min(cell.mean - cell.bar for cell in cells))
    high = min(100.0, max(cell.mean + cell.bar for cell in cells))
    margin = max(2.0, 0.08 * (high - low))
    low, high = max(0.0, low - margin), min(102.0, high + margin)
    ax.set(xlim=(low, high), ylim=(low, high), aspect="equal")
    step = next(step for step in (1, 2, 5, 10, 20) if (high - low) / step <= 8)
    ax.set_xticks(range(math.ceil(low / step) * step, math.floor(min(high, 100)) + 1, step))
    ax.set_yticks(range(math.ceil(low / step) * step, math.floor(min(high, 100)) + 1, step))
    for h in range(math.ceil(max(low, 1) / step) * step, math.floor(min(high, 99)) + 1, step):
        start = max(low, h * high / (2 * high - h) if 2 * high > h else low)  # where the curve enters at the top
        xs = [start + (high - start) * i / 100 for i in range(101)]
        points = [(x, h * x / (2 * x - h)) for x in xs if 2 * x > h and low <= h * x / (2 * x - h) <= high + 1e-6]
        if len(points) > 1:
            ax.plot(*zip(*points, strict=True), color="#bbbbbb", linewidth=0.8, linestyle=":", zorder=1)
            x, y = points[-1]
            if x < high - 1e-6:
                continue  # it leaves at the bottom, where the axis has its numbers
            ax.annotate(f"H {h}", (x, y), xytext=(3, 0), textcoords="offset points", fontsize=8, color="#777777", va="center")


def _ranking(rows: list[Row], metric: str, parts: list[str], styles: dict[Any, _Series], title: str) -> Any:
    """A line for each of many methods, the best on top: a point for each of base, new and H, pale ones for each data set."""
    from matplotlib import pyplot

    keys = _ranked(rows, metric)[::-1]
    shown = [part for part in parts if any((metric, part) in row.cells for row in rows)]
    averaged = any(row.averages for row in rows)
    size = (2.2 + 2.4 * len(shown), 1.0 + 0.21 * len(keys))
    figure, grid = pyplot.subplots(1, len(shown), figsize=size, squeeze=False, layout="constrained", sharey=True)
    for ax, part in zip(grid.flat, shown, strict=True):
        for row in (row for row in rows if (metric, part) in row.cells):
            cell, large = row.cells[metric, part], bool(row.averages) or not averaged
            colour = _COLOURS[0] if large else "#b5b5b5"
            bar = cell.bar if large and cell.bar else None
            ax.errorbar(cell.mean, keys.index(row.key), xerr=bar, fmt="o", color=colour, markersize=5 if large else 3)
            if row.method == "ZeroshotCLIP" and large:
                ax.axvline(cell.mean, color="#888888", linestyle=":", linewidth=1, zorder=0)
        ax.set_title(f"{_PARTS[part]} (%)", fontsize=10)
        ax.set_ylim(-0.7, len(keys) - 0.3)
    grid[0, 0].set_yticks(range(len(keys)), [styles[key].label.replace("\n", " ") for key in keys], fontsize=8.5)
    told = ["dotted: ZeroshotCLIP"] if any(row.method == "ZeroshotCLIP" for row in rows) else []
    told += ["pale: each data set"] if averaged else []
    figure.suptitle("; ".join([f"{_words(metric)}, {title}", *told, *filter(None, [_bars_are(rows)])]), fontsize=9)
    return figure


def _bars(rows: list[Row], metric: str, parts: list[str], styles: dict[Any, _Series], title: str) -> Any:
    """Bars of each method, side by side for each data set; a panel for each of base, new and H."""
    from matplotlib import pyplot

    panels = _panels(rows)
    keys = [key for key in styles if any(row.key == key for row in rows)]
    shown = [part for part in parts if any((metric, part) in row.cells for row in rows)]
    width = 0.8 / len(keys)
    long = max(len(name) for name in panels) > 24  # such as data sets with their domains: wrapped, and given room
    size = (max(4.2, 1.0 + len(panels) * max(1.7 if long else 0.9, 0.24 * len(keys))), 0.9 + 2.1 * len(shown))
    figure, grid = pyplot.subplots(len(shown), 1, figsize=size, squeeze=False, layout="constrained", sharex=True, sharey=True)
    top = 0.0
    for ax, part in zip(grid.flat, shown, strict=True):
        for place, key in enumerate(keys):
            style = styles[key]
            cells = {row.dataset: row.cells[metric, part] for row in rows if row.key == key and (metric, part) in row.cells}
            at = [i for i, name in enumerate(panels) if name in cells]
            means, spreads = [cells[panels[i]].mean for i in at], [cells[panels[i]].bar for i in at]
            ax.bar(
                [i + (place - (len(keys) - 1) / 2) * width for i in at],
                means,
                width * 0.92,
                yerr=spreads if any(spreads) else None,
                color=style.colour,
                hatch=style.hatch,
                edgecolor="white",
                linewidth=0.4,
                error_kw={"elinewidth": 0.9, "ecolor": "#333333"},
                label=style.label,
            )
            top = max([top, *(m + s for m, s in zip(means, spreads, strict=True))])
        ax.set_ylim(0, min(102.0, top * 1.05 + 1))
        ax.set_ylabel(f"{_PARTS[part]} (%)")
        ax.grid(axis="x", visible=False)
    grid[-1, 0].margins(x=0.02)
    grid[-1, 0].set_xticks(range(len(panels)), [_wrapped(name, 20) if long else harmless(name) for name in panels])
    if not long and len(panels) > 2 and max(len(name) for name in panels) > 9:
        for label in grid[-1, 0].get_xticklabels():
            label.set(ha="right", rotation=35, rotation_mode="anchor")
    figure.suptitle(f"{_words(metric)}, {title}", fontsize=11)
    _legend(figure, grid.flat, rows)
    return figure
