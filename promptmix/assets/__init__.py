"""The embedded default: two tiny CLIP models and emoji pictures. ``README.md`` beside this file is the model card."""

from __future__ import annotations

from pathlib import Path

from promptmix.errors import DataError

__all__ = ["asset_path"]

_FOLDER = Path(__file__).resolve().parent


def asset_path(name: str) -> Path:
    """Return the path of an embedded file.

    Args:
        name: Its path below ``promptmix/assets``, with forward slashes (``models/tiny-en.json``).

    Raises:
        DataError: The name leads out of the folder, or there is no such file; reinstall promptmix if it should be there.
    """
    path = (_FOLDER / name).resolve()
    if not path.is_relative_to(_FOLDER):
        raise DataError(f"embedded file {name!r}: leads out of promptmix/assets; give a path below it")
    if not path.is_file():
        folder = path.parent if path.parent.is_dir() else _FOLDER
        there = ", ".join(sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("_")))
        raise DataError(f"embedded file {name!r}: not there (choices: {there}); reinstall promptmix if it should be")
    return path
