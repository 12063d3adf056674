"""Sentences about classes, as language models write them: one JSON file for a data set, ``{"class name": ["sentence", ...]}``.

``DATASET.DESCRIPTIONS`` names the file, or a folder that holds ``<name of the data set>.json`` for each data set. A class is
looked up by its name; capitals, underscores in place of spaces and repeated spaces don't matter. The file may hold other classes
too.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from promptmix.config.declare import shown
from promptmix.errors import DataError
from promptmix.files.text import parse_json
from promptmix.registry import closest
from promptmix.utils import read_text

__all__ = ["Descriptions", "parse_descriptions", "read_descriptions"]

_FORM = 'it must be one JSON object, {"class name": ["sentence", ...], ...}'


class Descriptions:
    """Sentences about classes.

    Args:
        sentences: class name -> its sentences.
        source: where they are from, for messages; "" where there are none at all.

    Attributes:
        were_read: whether somebody asked for sentences; a file that nobody reads is refused.

    Raises:
        DataError: two names are the same but for capitals, underscores and spaces, with other sentences.
    """

    def __init__(self, sentences: Mapping[str, Sequence[str]], source: str = "") -> None:
        self.source, self.were_read = source, False
        self._names: dict[str, str] = {}
        self._sentences: dict[str, tuple[str, ...]] = {}
        for name, given in sentences.items():
            key, rows = _plain(name), tuple(given)
            if self._sentences.setdefault(key, rows) != rows:
                raise DataError(
                    f"{source} describes {self._names[key]!r} and {name!r}, which are one class here (capitals, underscores and "
                    "spaces don't matter), with different sentences; leave one of them out"
                )
            self._names.setdefault(key, name)

    def of(self, names: Sequence[str], *, same_number: bool = False) -> tuple[tuple[str, ...], ...]:
        """Return the sentences of each of C classes, in the order of the file.

        Args:
            names: C class names as the data set writes them.
            same_number: refuse classes with more sentences than others, for methods that draw one index for all classes.

        Raises:
            DataError: there are no descriptions, a class has none, or their numbers differ.
        """
        self.were_read = True
        if not self._sentences:
            by = f"{self.source} has none" if self.source else "there are none"
            raise DataError(
                f"this method reads sentences about each class, but {by}; set DATASET.DESCRIPTIONS to a JSON file "
                "(class name -> list of sentences), or to a folder with <data set>.json"
            )
        missing = [name for name in names if _plain(name) not in self._sentences]
        if missing:
            listed = ", ".join(shown(name) for name in missing[:5]) + (", ..." if len(missing) > 5 else "")
            near = closest(missing[0].replace("_", " "), list(self._names.values())) if len(missing) == 1 else ""
            raise DataError(
                f"{self.source} has no sentences for {len(missing)} of {len(names)} classes: {listed}{near}; add them, or name "
                "another file in DATASET.DESCRIPTIONS"
            )
        found = tuple(self._sentences[_plain(name)] for name in names)
        first = len(found[0]) if found else 0
        other = next((i for i, rows in enumerate(found) if len(rows) != first), None)
        if same_number and other is not None:
            raise DataError(
                f"{self.source} has {first} sentences for {names[0]!r} but {len(found[other])} for {names[other]!r}; this method "
                "draws one number for all classes, so give every class as many"
            )
        return found

    def as_lists(self, names: Sequence[str]) -> dict[str, list[str]]:
        """Return what is known of ``names`` as a table for JSON."""
        return {name: list(self._sentences[_plain(name)]) for name in names if _plain(name) in self._sentences}


def read_descriptions(path: str, dataset: str) -> Descriptions:
    """Read the file ``path``, or ``<dataset>.json`` in the folder ``path``.

    Raises:
        DataError: it is missing, no JSON or of another form; the message names the file and what is wrong.
    """
    file = Path(os.path.expanduser(path))
    file = file / f"{dataset}.json" if file.is_dir() else file
    try:
        text = read_text(file)
    except DataError as error:
        raise DataError(
            f"DATASET.DESCRIPTIONS {error}; give a JSON file (class name -> list of sentences), or a folder with <data set>.json"
        ) from error
    try:
        content = parse_json(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"DATASET.DESCRIPTIONS {file} is not valid JSON ({error}); {_FORM}") from error
    if not content:
        raise DataError(f"DATASET.DESCRIPTIONS {file} holds no classes; {_FORM}")
    return parse_descriptions(content, f"DATASET.DESCRIPTIONS {file}")


def parse_descriptions(content: Any, source: str) -> Descriptions:  # whatever a file or a plugin holds
    """Return a table of sentences that somebody else made.

    Raises:
        DataError: it is of another form; the message names ``source`` and what is wrong.
    """
    if not isinstance(content, dict):
        raise DataError(f"{source}: {shown(content)} is not a table of classes; {_FORM}")
    for name, rows in content.items():
        fault = _fault(name, rows)
        if fault:
            raise DataError(f"{source}: {fault}; {_FORM}")
    return Descriptions(content, source)


def _fault(name: Any, rows: Any) -> str:
    """Return what is wrong with one class, "" where nothing is."""
    if not _is_text(name):
        return f"the class name {shown(name)} is not readable text"
    if not isinstance(rows, (list, tuple)) or not rows:
        return f"class {shown(name)} has {shown(rows)} where a list of sentences is wanted"
    bad = [row for row in rows if not _is_text(row)]
    return f"class {shown(name)} has {shown(bad[0])} among its sentences" if bad else ""


def _is_text(text: Any) -> bool:
    """Tell whether ``text`` says something and can be written: JSON may hold halves of characters."""
    try:
        return isinstance(text, str) and bool(text.strip()) and bool(text.encode())
    except UnicodeEncodeError:
        return False


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").split()).casefold()
