"""Draws the pictures of README and the site into ``docs/img``: ``python docs/_figures.py``.

The second one reads the runs of ``promptmix quickstart`` from ``output/quickstart``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from promptmix.runs import results

IMAGES = Path(__file__).parent / "img"
#: Colours that can be told apart by everyone (Okabe and Ito); on white and on dark pages alike.
SHARED, NAME, WASTE, ROUTER, INK = "#0072B2", "#E69F00", "#D5DADF", "#009E73", "#222222"
CLASSES = (("cat",), ("red", "fox"), ("bus",), ("tea", "cup"))
plt.rcParams.update({"svg.hashsalt": "promptmix", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9})


def box(axes: Axes, x: float, y: float, text: str, colour: str, width: float = 0.9, height: float = 0.62) -> None:
    """Draw a token at column ``x`` and row ``y``."""
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.12", fc=colour, ec="none"))
    ink = INK if colour in (WASTE, NAME) else "white"
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", color=ink, fontsize=7)


def prompts(axes: Axes, shared: bool) -> None:
    """Draw the tokens that are encoded for four classes: all 77 of each, or the prefix once and each class's own."""
    prefix = ["SOT", "v1", "v2", "v3", "v4"]
    for row, name in enumerate(CLASSES):
        y = 3 - row
        for column, word in enumerate(prefix):
            if not shared:
                box(axes, column, y, word, SHARED)
        tail = [*name, ".", "EOT"]
        for column, word in enumerate(tail):
            box(axes, 5 + column + 0.9 * shared, y, word, NAME)
        if not shared:
            for column in range(5 + len(tail), 11):
                box(axes, column, y, "", WASTE)
            axes.text(11.1, y + 0.3, "... 77", color="#777777", va="center", fontsize=8)
    if shared:
        for column, word in enumerate(prefix):
            box(axes, column, 1.5, word, SHARED)
        for row in range(4):
            arrow = FancyArrowPatch((4.95, 1.81), (5.85, 3.31 - row), arrowstyle="-", color=SHARED, lw=1.1)
            axes.add_patch(arrow)
    axes.set(xlim=(-0.2, 12.3), ylim=(-0.3, 4.4))
    axes.axis("off")


def mixture(axes: Axes) -> None:
    """Draw a router that weighs experts for a picture."""
    box(axes, 0, 1.5, "picture", "#777777", 2.0)
    box(axes, 3.0, 1.5, "router", ROUTER, 1.8)
    axes.add_patch(FancyArrowPatch((2.05, 1.81), (2.95, 1.81), arrowstyle="-|>", mutation_scale=9, color="#777777"))
    for row, (weight, label) in enumerate(((0.72, "expert 1: 0.72"), (0.28, "expert 2: 0.28"), (0.0, "expert 3: 0"))):
        y = 2.9 - 1.4 * row
        box(axes, 6.0, y, label, SHARED if weight else WASTE, 3.1)
        colour = ROUTER if weight else WASTE
        start, end = (4.85, 1.81), (5.95, y + 0.31)
        axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-", color=colour, lw=0.8 + 4 * weight))
        if weight:
            axes.add_patch(FancyArrowPatch((9.15, y + 0.31), (10.0, 1.81), arrowstyle="-", color=SHARED, lw=0.8 + 4 * weight))
    box(axes, 10.0, 1.5, "class scores", NAME, 3.0)
    axes.set(xlim=(-0.2, 13.2), ylim=(-0.3, 4.4))
    axes.axis("off")


def idea() -> None:
    """Write the picture of the idea."""
    figure, places = plt.subplots(1, 3, figsize=(12.5, 1.6), gridspec_kw={"width_ratios": [1, 0.85, 1]})
    titles = ("usual: every token of every class", "here: shared tokens once, no padding", "a mixture: prompts as experts")
    for axes, title, draw in zip(places, titles, (lambda a: prompts(a, False), lambda a: prompts(a, True), mixture), strict=True):
        draw(axes)
        axes.set_title(title, fontsize=10, color="#555555", loc="left")
    places[1].set_xlim(-0.2, 10.6)
    save(figure, "idea.svg")


def quickstart(folder: Path) -> None:
    """Write the picture of the quick start's accuracies."""
    found: dict[tuple[str, str], list[float]] = {}
    for path in sorted(folder.rglob("results.json")):
        run = results.load(path)
        found.setdefault((run.trainer, run.subsample_classes), []).append(run.metrics["test"]["accuracy"])
    methods = [name for name in ("ZeroshotCLIP", "CoOp", "MoCoOp") if (name, "base") in found]
    figure, axes = plt.subplots(figsize=(6.2, 1.9))
    for row, name in enumerate(reversed(methods)):
        for offset, part, colour in ((0.17, "base", SHARED), (-0.17, "new", NAME)):
            values = found[name, part]
            mean = sum(values) / len(values)
            axes.barh(row + offset, mean, 0.3, color=colour, label=part if row == 0 else None)
            axes.plot(values, [row + offset] * len(values), "|", color=INK, markersize=7)
            axes.text(max(values) + 1.2, row + offset, f"{mean:.1f}", va="center", fontsize=8, color="#777777")
    axes.set_yticks(range(len(methods)), list(reversed(methods)))
    axes.set(xlim=(0, 68), xlabel="accuracy in percent; bars: mean, ticks: each seed")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False, colors="#777777")
    axes.xaxis.label.set_color("#777777")
    axes.legend(frameon=False, loc="upper right", labelcolor="#777777")
    save(figure, "quickstart.svg")


def save(figure: plt.Figure, name: str) -> None:
    """Write a figure with a transparent ground, the same bytes for the same picture."""
    IMAGES.mkdir(exist_ok=True)
    figure.savefig(IMAGES / name, transparent=True, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    idea()
    quickstart(Path(sys.argv[1] if len(sys.argv) > 1 else "output/quickstart"))
