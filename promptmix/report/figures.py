"""Charts as SVG that stands inside a page: text stays text, and what is black follows the page's own colour."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from promptmix.errors import UserError
from promptmix.files.text import harmless
from promptmix.report.reliability import Reliability

__all__ = ["COLOURS", "confusion", "curves", "drawing", "reliability", "svg"]

#: Okabe and Ito's colours, told apart with any colour vision, without black and yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
#: Stand for the page's own colours, whatever they are.
_INK, _FAINT = "#010203", "#040506"
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "font.family": ["DejaVu Sans"],
    "text.color": _INK,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _FAINT,
    "grid.linewidth": 0.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
    "text.parse_math": False,  # a dollar sign in a name is not a formula
    "svg.fonttype": "none",
    "savefig.bbox": "tight",
}


@contextmanager
def drawing() -> Iterator[None]:
    """Draw without a display, in the style of a page.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("a report needs matplotlib; install it with: pip install 'promptmix[report]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(_STYLE):
        yield


def svg(figure: Any, name: str) -> str:  # matplotlib's figure
    """Return a figure as an element of HTML, and close it.

    Args:
        figure: to be drawn.
        name: told to those who can't see it, and unique in the page, since the clips inside are called by it.
    """
    from matplotlib import pyplot

    file = io.StringIO()
    # Its clips must not be another figure's; letters that matplotlib has no shape of are the browser's to draw.
    with pyplot.rc_context({"svg.hashsalt": harmless(name)}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure.savefig(file, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    text = harmless(file.getvalue())  # names of axes and bars too
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
    text = re.sub(r' id="[A-Za-z.\d]+_\d+"', "", text)  # names that every figure gives
    text = text.replace(_INK, "currentColor").replace(_FAINT, "var(--faint)").replace("#000000", "currentColor")
    text = re.sub(r"font: ([\d.]+)px '?DejaVu Sans'?[^;\"]*", r"font: \1px system-ui, 'DejaVu Sans', sans-serif", text)
    label = harmless(name).replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def reliability(found: Reliability, title: str) -> str:
    """Accuracy over confidence, before and after mending, with the share of the pictures as bars below."""
    from matplotlib import pyplot

    figure, ax = pyplot.subplots(figsize=(3.5, 3.2), layout="constrained")
    ax.plot([0, 1], [0, 1], color=_FAINT, linewidth=1, linestyle="--")
    ax.bar(found.confidence, found.share, width=0.05, color=COLOURS[6], alpha=0.4, label="share of pictures")
    ax.plot(found.confidence, found.accuracy, "o-", color=COLOURS[1], markersize=4, label=f"as it is, ECE {found.error:.1f}%")
    label = f"T = {found.temperature:.2f}, ECE {found.calibrated:.1f}%"
    ax.plot(*zip(*found.curve, strict=True), "s-", color=COLOURS[0], markersize=3.5, linewidth=1, label=label)
    ax.set(xlim=(0, 1.02), ylim=(0, 1.02), xlabel="confidence", ylabel="share that is right", aspect="equal")
    ax.legend(loc="upper left", fontsize=7.5)
    return svg(figure, title)


def confusion(counts: np.ndarray, names: Sequence[str], title: str) -> str:
    """Shares of each true class (rows) by what was said of its pictures."""
    from matplotlib import pyplot

    size = max(3.4, 0.24 * len(names) + 1.6)
    figure, ax = pyplot.subplots(figsize=(size, size), layout="constrained")
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    ax.set(xlim=(-0.5, len(names) - 0.5), ylim=(len(names) - 0.5, -0.5), aspect="equal")
    for y, x in zip(*np.nonzero(counts), strict=True):
        right, share = y == x, float(shares[y, x])
        colour = COLOURS[0] if right else COLOURS[1]
        ax.add_patch(pyplot.Rectangle((x - 0.5, y - 0.5), 1, 1, color=colour, alpha=0.12 + 0.88 * share, linewidth=0))
        ink = "white" if share > 0.5 else _INK
        ax.text(x, y, str(int(counts[y, x])), ha="center", va="center", fontsize=6.5, color=ink)
    shown = [_short(name, 22) for name in names]
    ax.set_xticks(range(len(names)), shown, rotation=60, ha="right", rotation_mode="anchor", fontsize=7.5)
    ax.set_yticks(range(len(names)), shown, fontsize=7.5)
    ax.set(xlabel="said", ylabel="is")
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    return svg(figure, title)


def curves(lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], label: str, title: str) -> str:
    """One line for each method, over epochs."""
    from matplotlib import pyplot

    figure, ax = pyplot.subplots(figsize=(3.9, 2.7), layout="constrained")
    for place, (name, (x, y)) in enumerate(lines.items()):
        style = ("-", "--", ":", "-.")[place // len(COLOURS) % 4]
        mark = "o" if len(x) < 3 else ""
        ax.plot(x, y, color=COLOURS[place % len(COLOURS)], linestyle=style, marker=mark, linewidth=1.5, label=_short(name, 28))
    ax.set(xlabel="epoch", ylabel=label)
    ax.grid(True)
    ax.legend(fontsize=7.5)
    return svg(figure, title)


def _short(text: str, width: int) -> str:
    plain = " ".join(harmless(text).split())
    return plain if len(plain) <= width else plain[: width - 1] + "…"
