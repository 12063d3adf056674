"""An insight as tables: for one run, and over several runs of one method."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
from tabulate import tabulate

from promptmix.files.text import harmless, table_cell
from promptmix.interpret.look import Insight
from promptmix.interpret.mixture import Findings
from promptmix.interpret.words import Position
from promptmix.tables.paired import shown_p

__all__ = ["Grid", "grids", "over_runs", "sections"]


class Grid(NamedTuple):
    """A table before it is written: ``lead`` columns of words in front of numbers, 0 where all are words."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    lead: int = 0


def sections(found: Insight, fmt: str = "github") -> list[tuple[str, str]]:
    """Return title and table of everything that was found."""
    return [(grid.title, _table(grid, fmt)) for grid in grids(found)]


def grids(found: Insight) -> list[Grid]:
    """Return everything that was found as tables yet to be written."""
    parts: list[Grid] = []
    if found.words:
        usual = {one.layer: one.usual for one in found.words}
        apart = (f"{value:.2f}" + (f" in layer {layer}" if len(usual) > 1 else "") for layer, value in usual.items())
        title = f"Nearest words, with distances (a word's nearest other word is at {', '.join(apart)})"
        parts.append(Grid(title, ("Expert", "Layer", "Place", "Nearest words"), _words(found)))
    if found.templates:
        rows = [
            (name, ", ".join(f"{template} {value:.3f}" for template, value in best))
            for name, best in zip(found.experts, found.templates, strict=True)
        ]
        parts.append(
            Grid("Hard templates that each expert is most like (mean cosine over the classes)", ("Expert", "Templates"), rows)
        )
    if found.moved:
        ordered = sorted(found.moved, key=lambda one: -one.degrees)
        angles = [(one.classname, f"{one.degrees:.1f}", f"{one.least:.1f}", f"{one.most:.1f}") for one in ordered]
        title = f"How far each class's text feature is from {found.template!r}, in degrees"
        if len(found.experts) > 1:
            parts.append(Grid(title, ("Class", "Mean", "Nearest expert", "Furthest expert"), angles, 1))
        else:
            parts.append(Grid(title, ("Class", "Degrees"), [row[:2] for row in angles], 1))
    for mixture in found.mixtures:
        parts += _of_mixture(found, mixture)
    return parts


def _of_mixture(found: Insight, mixture: Findings) -> list[Grid]:
    rows: list[tuple[str, ...]] = [
        (name, f"{100 * share:.1f}%", f"{100 * first:.1f}%", f"{weight:.3f}")
        for name, share, first, weight in zip(mixture.experts, mixture.share, mixture.first, mixture.weight, strict=True)
    ]
    title = f"Routing of {mixture.title}, {mixture.pictures} test pictures"
    if mixture.routed:
        title += f"; entropy of the router's scores {100 * mixture.entropy:.1f}% of uniform"
    if mixture.weight_entropy is not None:
        title += f", of the weights in use {100 * mixture.weight_entropy:.1f}%"
    title = title if mixture.routed else f"{title}: no router, all equally"
    parts = [Grid(title, ("Expert", "Chosen for", "Largest weight for", "Mean weight"), rows, 1)]
    head = ("Experts", "Accuracy", "p", "Only this : only trained")
    parts.append(Grid(f"Who does it ({mixture.title})", head, _ways(mixture), 1))
    if mixture.routed:
        rows = [
            (name, *(f"{value:.2f}" for value in own))
            for name, own in zip(found.classnames, mixture.by_class, strict=True)
            if own
        ]
        parts.append(Grid(f"Mean weight of each expert by class ({mixture.title})", ("Class", *mixture.experts), rows, 1))
    matrices = {
        "Same answer of two experts alone": mixture.agreement,
        "Cosine of two experts' text features": mixture.text_cosine,
    }
    for title, matrix in matrices.items():
        if matrix:
            rows = [(name, *(f"{value:.2f}" for value in own)) for name, own in zip(mixture.experts, matrix, strict=True)]
            parts.append(Grid(f"{title} ({mixture.title})", ("", *mixture.experts), rows, 1))
    return parts


def _ways(mixture: Findings) -> list[tuple[str, ...]]:
    return [
        (
            way.name,
            f"{way.accuracy:.2f}" + ("" if way.spread is None else f" ± {way.spread:.2f}"),
            "" if way.p is None else shown_p(way.p),
            "" if way.only_this is None else f"{way.only_this} : {way.only_trained}",
        )
        for way in mixture.ways
    ]


def _words(found: Insight) -> list[tuple[str, ...]]:
    def key(one: Position) -> tuple[str, int, int]:
        return one.classname, one.expert, one.layer

    lines: list[tuple[str, ...]] = []
    for (classname, expert, layer), positions in groupby(found.words, key):
        for one in positions:
            name = found.experts[expert] if expert < len(found.experts) else str(expert + 1)
            place = str(one.place) if one.place > 0 else f"end {one.place}"
            lines.append((f"{name} {classname}".strip(), str(layer), place, ", ".join(f"{w} {d:.2f}" for w, d in one.words)))
    return lines


def over_runs(found: Sequence[Insight], fmt: str = "github") -> list[tuple[str, str]]:
    """Return the accuracies of each way of choosing the experts over several runs, for each method and part of the classes."""
    groups: dict[tuple[str, str, str], list[Findings]] = {}
    for one in found:
        for mixture in one.mixtures:
            groups.setdefault((one.trainer, one.dataset, mixture.title), []).append(mixture)
    parts = []
    for (trainer, dataset, title), mixtures in groups.items():
        if len(mixtures) < 2 or len({tuple(mixture.experts) for mixture in mixtures}) > 1:
            continue
        lines = []
        for position, way in enumerate(mixtures[0].ways):
            values = [mixture.ways[position].accuracy for mixture in mixtures]
            apart = [mixture.ways[position].accuracy - mixture.ways[0].accuracy for mixture in mixtures]
            lines.append((way.name, *(f"{np.mean(v):{sign}.2f} ± {np.std(v):.2f}" for v, sign in ((values, ""), (apart, "+")))))
        entropy = np.mean([mixture.entropy for mixture in mixtures])
        shares = ", ".join(
            f"{name} {min(values):.0f}-{max(values):.0f}%"
            for name, values in zip(
                mixtures[0].experts, np.transpose([[100 * v for v in m.share] for m in mixtures]), strict=True
            )
        )
        head = f"{trainer} on {dataset}, {title}, {len(mixtures)} runs"
        head += f": router's entropy {100 * entropy:.1f}% of uniform; chosen for: {shares}"
        parts.append((head, _table(Grid(head, ("Experts", "Accuracy", "Minus as trained"), lines, 1), fmt)))
    return parts


def _table(grid: Grid, fmt: str) -> str:
    head, *safe = ([table_cell(cell, fmt) for cell in row] for row in (grid.head, *grid.rows))
    lead = grid.lead or len(head)
    align = ["left"] * lead + ["right"] * (len(head) - lead)
    return harmless(tabulate(safe, headers=head, tablefmt=fmt, disable_numparse=True, colalign=align if safe else None))
