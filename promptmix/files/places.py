"""Which places on disk a run's record may name: its own folder, and those that hold what promptmix ships or downloaded."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from promptmix.errors import OutputError

__all__ = ["is_own_place", "refuse_unwritable"]


def refuse_unwritable(folder: str | os.PathLike[str], what: str, remedy: str) -> None:
    """Refuse a folder that can't be made or written to; nothing of the trial stays. Permissions alone don't tell.

    Args:
        folder: it need not be there.
        what: the key or flag that names it, for the message.
        remedy: what to do otherwise.

    Raises:
        OutputError: it can't.
    """
    path = Path(os.path.abspath(folder))
    made: list[Path] = []
    try:
        made = [above for above in (path, *path.parents) if not above.exists()]
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise OutputError(f"{what} {folder}: {error.strerror or error}; {remedy}") from error
    finally:
        for above in made:
            with contextlib.suppress(OSError):  # it was not made
                above.rmdir()


def is_own_place(path: str | os.PathLike[str]) -> bool:
    """Tell whether a file, links followed, lies among the embedded models or in the caches of open_clip and the hub."""
    from huggingface_hub.constants import HF_HUB_CACHE

    from promptmix.assets import asset_path

    try:
        file = Path(path).resolve()
        own = [asset_path("models/tiny-en.json").parent, Path(HF_HUB_CACHE), Path("~/.cache/clip").expanduser()]
        return any(file.is_relative_to(place.resolve()) for place in own)
    except (OSError, RuntimeError, ValueError):  # no home, a circle of links, NUL in the path
        return False
