"""Pictures of an insight: experts by class, what each way of choosing them scores, and how far classes moved."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from promptmix.errors import UserError
from promptmix.files.text import harmless
from promptmix.files.whole import whole
from promptmix.interpret.look import Insight
from promptmix.interpret.mixture import BEST, TRAINED, Findings

__all__ = ["figures", "write"]

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#8a8f98"  # of Okabe and Ito
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "text.parse_math": False,  # a dollar sign in a name is not a formula
    "savefig.dpi": 150,
    "savefig.bbox": "tight",
    "svg.fonttype": "none",  # small, and text stays text
    "svg.hashsalt": "promptmix",  # the same picture, byte for byte
}


def write(found: Insight, folder: Path, formats: Sequence[str], name: str = "") -> list[Path]:
    """Draw everything that there is to draw.

    Args:
        found: what a run learned.
        folder: where the files go.
        formats: endings of the files: svg, pdf, png.
        name: beginning of their names.

    Raises:
        UserError: matplotlib is not installed, or the folder can't be written.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("--pictures needs matplotlib; install it with: pip install 'promptmix[plot]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with pyplot.rc_context(_STYLE):
            for title, figure in figures(found):
                for ending in formats:
                    path = folder / f"{name}{title}.{ending}"
                    with whole(path) as part:
                        figure.savefig(part, metadata={"Date": None} if ending == "svg" else None)
                    written.append(path)
                pyplot.close(figure)
    except OSError as error:
        raise UserError(f"--pictures {folder}: {error.strerror or error}; choose another folder") from error
    return written


def figures(found: Insight) -> Iterator[tuple[str, Any]]:
    """Yield name and matplotlib figure of each picture."""
    for place, mixture in enumerate(found.mixtures):
        tail = f"-{place + 1}" if len(found.mixtures) > 1 else ""
        if mixture.routed:
            yield f"routing{tail}", _heat_map(found, mixture)
        yield f"experts{tail}", _accuracies(found, mixture)
    if found.moved:
        yield "moved", _moved(found)


def _short(text: str, width: int) -> str:
    return textwrap.shorten(harmless(text), width, placeholder="…") or harmless(text)[:width]


def _heat_map(found: Insight, mixture: Findings) -> Any:  # matplotlib's objects
    """Mean weight of each expert by class."""
    from matplotlib import pyplot

    rows = [(name, own) for name, own in zip(found.classnames, mixture.by_class, strict=True) if own]
    size = (2.6 + 0.62 * len(mixture.experts), 1.3 + 0.21 * len(rows))
    figure, ax = pyplot.subplots(figsize=size, layout="constrained")
    most = max(1e-9, *(max(own) for _, own in rows))
    edges = [[at - 0.5 for at in range(count + 1)] for count in (len(mixture.experts), len(rows))]
    ax.pcolormesh(*edges, [own for _, own in rows], cmap="Blues", vmin=0, vmax=most)  # no raster, so that SVG stays sharp
    ax.invert_yaxis()
    ax.set_yticks(range(len(rows)), [_short(name, 28) for name, _ in rows])
    ax.set_xticks(range(len(mixture.experts)), [_short(name, 24) for name in mixture.experts], rotation=40, ha="left")
    ax.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    for y, (_, own) in enumerate(rows):
        for x, value in enumerate(own):
            dark = value > 0.6 * most
            ax.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=7, color="white" if dark else "#333333")
    return figure


def _accuracies(found: Insight, mixture: Findings) -> Any:
    """Bars: what is scored under each way of choosing the experts, the mixture as trained as a line."""
    from matplotlib import pyplot

    ways = mixture.ways[::-1]
    trained = next(way.accuracy for way in ways if way.name == TRAINED)
    figure, ax = pyplot.subplots(figsize=(6.4, 0.8 + 0.27 * len(ways)), layout="constrained")
    colours = [BLUE if way.name == TRAINED else ORANGE if way.name.endswith("alone") else GREY for way in ways]
    faint = ["#c9cdd3" if way.name == BEST else colour for way, colour in zip(ways, colours, strict=True)]
    errors = [way.spread or 0 for way in ways]
    ax.barh(range(len(ways)), [way.accuracy for way in ways], xerr=errors, color=faint, height=0.7, error_kw={"elinewidth": 1})
    ax.axvline(trained, color=BLUE, linewidth=1, linestyle="--")
    for y, way in enumerate(ways):
        box = {"facecolor": pyplot.rcParams["figure.facecolor"], "edgecolor": "none", "pad": 0.8}  # over the line
        ax.text(way.accuracy + (way.spread or 0) + 0.6, y, f"{way.accuracy:.1f}", va="center", fontsize=8, bbox=box)
    ax.set_yticks(range(len(ways)), [_short(way.name, 48) for way in ways])
    ax.set_xlim(0, min(112.0, 1.12 * max(way.accuracy for way in ways) + 1))
    ax.set_xlabel(f"accuracy (%), {_short(found.trainer, 30)} on {_short(found.dataset, 50)}")
    ax.tick_params(axis="y", length=0)
    return figure


def _moved(found: Insight) -> Any:
    """Dots with ranges: angle of each class to its hard prompt, over the experts."""
    from matplotlib import pyplot

    ordered = sorted(found.moved, key=lambda one: one.degrees)
    figure, ax = pyplot.subplots(figsize=(6.0, 0.8 + 0.2 * len(ordered)), layout="constrained")
    for y, one in enumerate(ordered):
        ax.plot([one.least, one.most], [y, y], color="#b9c7d6", linewidth=3, solid_capstyle="round")
    ax.plot([one.degrees for one in ordered], range(len(ordered)), "o", color=BLUE, markersize=4)
    ax.set_yticks(range(len(ordered)), [_short(one.classname, 34) for one in ordered])
    ax.set_ylim(-0.7, len(ordered) - 0.3)
    ax.set_xlim(left=0)
    ax.set_xlabel(
        f"degrees from {_short(found.template, 50)!r}"
        + ("; bar: from nearest to furthest expert" if len(found.experts) > 1 else "")
    )
    ax.tick_params(axis="y", length=0)
    return figure
