"""Small copies of pictures, inside a page: read safely, limited in size, and only from where the reader of the runs allows."""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path

from PIL import Image

from promptmix.assets import asset_path
from promptmix.data.reading.images import read_image
from promptmix.errors import DataError

__all__ = ["Album"]

SIDE = 96  # pixels
_MOST_BYTES = 2_000_000  # of all thumbnails of a page


class Album:
    """Makes thumbnails until the page would grow too large.

    Args:
        root: folder below which pictures may be opened besides the embedded ones; "" = none. A run may be somebody else's, and a
            page is made to be sent, so that no picture gets into it just because a run names it.
    """

    def __init__(self, root: str = "") -> None:
        self._places = [asset_path("README.md").parent, *([Path(os.path.realpath(os.path.expanduser(root)))] if root else [])]
        self._made: dict[str, str] = {}
        self._bytes = 0
        self.refused = 0

    def thumbnail(self, path: str) -> str:
        """Return a picture as a data URI; "" where it can't be had, which counts as ``refused``."""
        if path not in self._made:
            self._made[path] = self._make(path)
        return self._made[path]

    def _make(self, path: str) -> str:
        found = self._inside(path)
        if found is None or self._bytes > _MOST_BYTES:
            self.refused += 1
            return ""
        try:
            image = read_image(found, "upright")
        except (DataError, MemoryError):
            self.refused += 1
            return ""
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        file = io.BytesIO()
        image.save(file, "WEBP", quality=80)
        self._bytes += file.tell()
        return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode("ascii")

    def _inside(self, path: str) -> str | None:
        """Return where the picture lies, links followed, if that is below one of the places."""
        pack, mark, member = path.partition("::")
        for place in self._places:
            try:
                file = (place / pack).resolve()
                if file.is_relative_to(place) and file.is_file():
                    return f"{file}{mark}{member}"
            except (OSError, ValueError, RuntimeError):
                continue
        return None
