"""Which places on disk a run's record may name: its own folder, and those that hold what promptmix ships or downloaded."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["is_own_place"]


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
