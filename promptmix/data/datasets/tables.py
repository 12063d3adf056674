"""Tables that name pictures and their classes: CSV, TSV, JSON and JSON Lines, with the columns that tools write."""

from __future__ import annotations

import csv
import io
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from promptmix.config.declare import shown
from promptmix.errors import DataError
from promptmix.files.text import parse_json
from promptmix.utils import read_text

__all__ = ["SUFFIXES", "Cells", "picture_paths", "read_table", "table_of"]

#: What a file is called that is a table and no picture.
SUFFIXES = (".csv", ".tsv", ".json", ".jsonl")
#: The tables of Hugging Face's ImageFolder, which lie beside the pictures.
_METADATA = ("metadata.csv", "metadata.jsonl")
#: Our column -> what it may be called.
_COLUMNS = {"path": ("path", "file_name"), "label": ("label", "class"), "split": ("split",), "domain": ("domain",)}

_EXAMPLE = 'write {"path": "a.jpg", "label": "cat"} for each picture, in a list (.json) or in a line each (.jsonl)'

#: A row: its line (or number in a JSON list), our columns -> text, and whether it is to be refused: too few cells, or no text.
Cells = tuple[int, dict[str, str], bool]


def table_of(pictures: str | os.PathLike[str]) -> Path | None:
    """Return the table that says the classes of ``pictures``, or None where folders do.

    That is the file itself, or Hugging Face's metadata with a column for labels in the folder or its folder ``train``; the latter
    is named as if it lay in the folder, since each part has its own.
    """
    path = Path(pictures)
    if path.is_file():
        return path
    for name in _METADATA:
        for file in (path / name, path / "train" / name):
            if file.is_file() and "label" in _first(_text(file), file):
                return path / name
    return None


def read_table(text: str, where: Path) -> list[Cells]:
    """Read a table that has to name a path and a label in each row.

    Args:
        text: what stands in it.
        where: its file, for its format and for messages.

    Raises:
        DataError: it is no such table.
    """
    rows = list(_rows(text, where))
    missing = [column for column in ("path", "label") if column not in _first(text, where)]
    if missing and (rows or not _is_json(where)):
        names = " or ".join(map(repr, _COLUMNS[missing[0]]))
        example = _EXAMPLE if _is_json(where) else "its first line must be path,label[,split,domain]"
        raise DataError(f"{where} has no column {names}; {example}")
    return rows


def picture_paths(where: Path) -> Iterator[str]:
    """Yield the pictures that a table names, with or without labels.

    Raises:
        DataError: it has no column for them.
    """
    text = _text(where)
    if "path" not in _first(text, where):
        raise DataError(f"{where} has no column 'path' or 'file_name'; its first line must name the columns, such as path,label")
    yield from (os.path.normpath(where.parent / row["path"]) for _, row, _ in _rows(text, where) if row["path"])


def _is_json(where: Path) -> bool:
    return where.suffix.lower() in (".json", ".jsonl")


def _first(text: str, where: Path) -> set[str]:
    """Return which of our columns a table has, as its first line or entry says."""
    if _is_json(where):
        return next((set(_ours(entry)) for _, entry in _entries(text, where)), set())
    return set(_ours(dict.fromkeys(_reader(text, where).fieldnames or ())))


def _ours(row: dict[Any, Any]) -> dict[str, Any]:
    """Return a row by our names for its columns."""
    return {column: row[name] for column, names in _COLUMNS.items() for name in reversed(names) if name in row}


def _rows(text: str, where: Path) -> Iterator[Cells]:
    if _is_json(where):
        for number, entry in _entries(text, where):
            cells = {column: value for column, value in _ours(entry).items() if value is not None}
            odd = any(not isinstance(value, str | int) or isinstance(value, bool) for value in cells.values())
            yield number, {column: str(value).strip() for column, value in cells.items()}, odd
        return
    table = _reader(text, where)
    twice = [name for name, count in Counter(table.fieldnames or ()).items() if count > 1 and name]
    if twice:
        raise DataError(f"{where} has the column {twice[0]!r} twice; remove one")
    try:
        for number, row in enumerate(table, start=2):
            odd = None in row or None in row.values()  # more or fewer cells than columns
            yield number, {key: (value or "").strip() for key, value in _ours(row).items()}, odd
    except csv.Error as error:
        raise DataError(f"{where}, line {table.line_num}: {error}; write path,label[,split,domain] in each line") from error


def _reader(text: str, where: Path) -> csv.DictReader[str]:
    # Lines end where CSV says: a quoted name may hold a line end, and one of Unicode's others.
    delimiter = "\t" if where.suffix.lower() == ".tsv" else ","
    table = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    try:
        _ = table.fieldnames  # the first line is read
    except csv.Error as error:
        raise DataError(f"{where}, line 1: {error}; its first line must name the columns, such as path,label") from error
    return table


def _text(where: Path) -> str:
    """Return what stands in a table.

    Raises:
        DataError: it can't be read.
    """
    try:
        return read_text(where)
    except DataError as error:
        raise DataError(f"{error}; give a table in UTF-8, with the columns path and label") from error


def _entries(text: str, where: Path) -> Iterator[tuple[int, dict[Any, Any]]]:
    """Yield the objects of JSON Lines with their lines, or those of a list in JSON with their numbers."""
    try:
        if where.suffix.lower() == ".json":
            found = parse_json(text)
            numbered = list(enumerate(found if isinstance(found, list) else [found], start=1))
        else:
            numbered = [(number, parse_json(line)) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: {' '.join(str(error).split())}; {_EXAMPLE}") from error
    for number, entry in numbered:
        if not isinstance(entry, dict):
            raise DataError(f"{where}, line {number}: {shown(entry)} is not an object; {_EXAMPLE}")
        yield number, entry
