"""Reading pictures from files and from zip packs."""

from __future__ import annotations

import os
import zipfile
from functools import lru_cache

from PIL import Image, UnidentifiedImageError

from promptmix.errors import DataError

__all__ = ["read_image"]


def read_image(path: str) -> Image.Image:
    """Read a picture as RGB.

    Args:
        path: a file, or ``pack.zip::member`` for one inside a zip.

    Raises:
        DataError: the file or member is missing, or is not a picture; the message names it.
    """
    pack, inside, member = path.partition("::")
    try:
        if not inside:
            with Image.open(path) as img:
                return img.convert("RGB")
        with _zip(os.path.abspath(pack), os.getpid()).open(member) as file, Image.open(file) as img:
            return img.convert("RGB")
    except FileNotFoundError as error:
        raise DataError(f"no picture {path}; check DATASET.ROOT, or get the data set again") from error
    except KeyError as error:
        raise DataError(f"no picture {member!r} in {pack}; get the pack again") from error
    except (UnidentifiedImageError, zipfile.BadZipFile, OSError) as error:
        raise DataError(f"can't read picture {path} ({error}); it is damaged or no picture") from error


@lru_cache(maxsize=32)
def _zip(pack: str, pid: int) -> zipfile.ZipFile:
    """Open a pack once per process: two workers that share a handle would read at each other's positions.

    Args:
        pack: path of the zip.
        pid: this process; part of the cache key, so that a forked worker opens its own.
    """
    del pid
    return zipfile.ZipFile(pack)
