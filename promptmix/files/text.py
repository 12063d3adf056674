"""Names from other people's files in our output: terminals, spreadsheets and tables take them for text and nothing else."""

from __future__ import annotations

import re
import unicodedata

__all__ = ["csv_cell", "harmless", "json_text", "table_cell"]

#: Control characters but tab and newline, and those that turn the direction of what follows.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "|")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
#: Formats of tabulate whose cells end at a bar.
_BARRED = {"github", "pipe", "orgtbl", "jira", "presto", "psql", "pretty", "textile", "youtrack", "moinmoin", "mediawiki"}


def harmless(text: object) -> str:
    r"""Return text with control characters written out (``\x1b``), but for tabs and line ends."""
    return _CONTROL.sub(_written, str(text))


def json_text(text: str) -> str:
    """Return JSON with control characters inside its strings as escapes of JSON."""
    return _CONTROL.sub(lambda found: f"\\u{ord(found.group()):04x}", text)


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
    plain = " ".join(harmless(text).split()) if any(end in str(text) for end in "\t\n") else harmless(text)
    if form in ("github", "pipe"):
        return plain.replace("\\", "\\\\").replace("|", "\\|") if "|" in plain else plain
    return plain.replace("|", "¦") if form in _BARRED else plain


def _written(found: re.Match[str]) -> str:
    number = ord(found.group())
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}"
