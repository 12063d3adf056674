"""What a page is made of: sections of blocks, each with tables, figures, or thumbnails."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Block", "Cell", "Figure", "Section", "Table", "table"]


@dataclass
class Cell:
    """One cell: its text, whether it is the best of its column, a share in percent drawn as a bar, and whether it is code."""

    text: str
    best: bool = False
    share: float | None = None
    code: bool = False


@dataclass
class Table:
    """A table whose first column names its rows, and whose first ``lead`` columns are words; all of them with ``words``."""

    caption: str
    head: list[str]
    rows: list[list[Cell]]
    lead: int = 1
    words: bool = False


@dataclass
class Figure:
    """A chart with its caption, "" where the drawing has a title; ``svg`` is markup that ``promptmix.report.figures`` made."""

    caption: str
    svg: Any


@dataclass
class Block:
    """A part of a section; with ``closed`` it is folded behind these words; its figures are small, ``large`` or ``full``."""

    title: str = ""
    text: str = ""
    tables: list[Table] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    album: list[dict[str, Any]] = field(default_factory=list)
    size: str = ""
    closed: str = ""


@dataclass
class Section:
    """A section of the page."""

    id: str
    title: str
    text: str = ""
    blocks: list[Block] = field(default_factory=list)


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[Any]], lead: int = 1, words: bool = False) -> Table:
    """Return a table of cells or of anything that has a text."""
    cells = [[cell if isinstance(cell, Cell) else Cell(str(cell)) for cell in row] for row in rows]
    return Table(caption, list(head), cells, lead, words)
