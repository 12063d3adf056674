"""Names from other people's files in our output: terminals, spreadsheets and tables take them for text and nothing else."""

from __future__ import annotations

import html
import json
import math
import re
import unicodedata
from typing import Any

__all__ = ["counted", "csv_cell", "harmless", "is_name", "json_text", "one_line", "parse_json", "real", "table_cell", "whole"]

#: Control characters but tab and newline, those that turn the direction of what follows, and halves of characters.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "|")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
#: Formats of tabulate whose cells end at a bar.
_BARRED = {"orgtbl", "jira", "presto", "psql", "pretty", "textile", "youtrack", "moinmoin", "mediawiki", "asciidoc"}


def harmless(text: object) -> str:
    r"""Return text with control characters written out (``\x1b``), but for tabs and line ends; UTF-8 can write it."""
    return _CONTROL.sub(_written, str(text))


def one_line(text: object) -> str:
    """Return ``harmless`` text on one line, so that a name can't begin a line of its own."""
    return " ".join(harmless(text).split())


def counted(count: int, one: str, many: str = "") -> str:
    """Return ``count`` with its noun, or with the words that begin with it; ``many`` is ``one`` with an s where it isn't said."""
    return f"{count:,} {one if count == 1 else many or f'{one}s'}"


def whole(text: str) -> int:
    """Return the whole number that a flag or key gives; as in Python and YAML, ``1_000`` is a thousand.

    Raises:
        ValueError: it is none, or is written with another script's digits, which are digits to Python, but to no config.
    """
    return int(text.encode("ascii"))


def real(text: str) -> float:
    """Return the number that a flag or key gives, written as ``whole`` takes it.

    Raises:
        ValueError: it is none.
    """
    return float(text.encode("ascii"))


def is_name(text: str) -> bool:
    """Tell whether something can be called so: a part of it can be seen, and UTF-8 writes it, without NUL."""
    kinds = {unicodedata.category(letter) for letter in text}
    return any(kind[0] not in "CZ" for kind in kinds) and "Cs" not in kinds and "\0" not in text


def json_text(text: str) -> str:
    """Return JSON with control characters inside its strings as escapes of JSON."""
    return _CONTROL.sub(lambda found: f"\\u{ord(found.group()):04x}", text)


def parse_json(text: str) -> Any:
    """Return what JSON says, which can be understood in one way only.

    Raises:
        ValueError: it is not JSON, an object has a name twice, of which readers keep either, or a number is none.
        RecursionError: it is nested too deep.
    """
    return json.loads(text, object_pairs_hook=_once, parse_constant=_no_number, parse_float=_number)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r:.60} stands in it twice")
    return found


def _number(word: str) -> float:
    number = float(word)
    return number if abs(number) < math.inf else _no_number(word)


def _no_number(word: str) -> float:
    raise ValueError(f"{word} is not a number of JSON")


def csv_cell(value: object) -> object:
    """Return a value for a cell of CSV: text that a spreadsheet would take for a formula gets an apostrophe before it."""
    if not isinstance(value, str):
        return value
    text = harmless(value)
    # Spreadsheets read full-width signs as the plain ones, and pass over blanks.
    start = unicodedata.normalize("NFKC", text.lstrip(" ")[:1])
    return f"'{text}" if start in _FORMULA and start and not _NUMBER.fullmatch(text) else text


def table_cell(text: object, form: str) -> str:
    """Return text for a cell of a table on one line, in which a bar doesn't end the cell.

    Args:
        text: what the cell says.
        form: one of tabulate's formats.
    """
    plain = one_line(text) if any(end in str(text) for end in "\t\n") else harmless(text)
    if form in ("github", "pipe"):
        return plain.replace("\\", "\\\\").replace("|", "\\|") if "|" in plain else plain
    if form == "unsafehtml":  # tabulate escapes in its other formats of these kinds
        return html.escape(plain)
    if form == "latex_raw":
        from tabulate import LATEX_ESCAPE_RULES

        return "".join(LATEX_ESCAPE_RULES.get(letter, letter) for letter in plain)
    return plain.replace("|", "¦") if form in _BARRED else plain


def _written(found: re.Match[str]) -> str:
    number = ord(found.group())
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}"
