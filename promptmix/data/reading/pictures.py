"""Finds pictures that are missing or damaged before they can stop a run."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from PIL import Image

from promptmix.data.datum import Datum
from promptmix.data.reading.images import member_size, read_image
from promptmix.errors import DataError
from promptmix.files.text import counted
from promptmix.utils import get_logger

__all__ = ["decode_problem", "find_bad", "quick_problem", "without_bad"]

#: What a whole file of a format begins and ends with.
_MARKS = ((b"\xff\xd8", b"\xff\xd9"), (b"\x89PNG", b"IEND\xaeB`\x82"))
_THREADS = 16  # they mostly wait for the disk or the network


def quick_problem(path: str) -> str:
    """Return what is wrong with a picture, "" for nothing found, from its first and last bytes where these tell.

    A JPEG or PNG that ends as it should is taken for whole without decoding it; any other is decoded.
    """
    if "::" in path:  # inside a pack, whose own checksums guard what it has
        try:
            return "" if member_size(path) else "empty file"
        except (FileNotFoundError, KeyError):
            return "missing"
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            return f"unreadable ({getattr(error, 'strerror', None) or error})"
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # a named pipe would be waited for
            return "no file"
        with open(path, "rb") as file:
            start = file.read(24)
            head = start[:8]
            if not head:
                return "empty file"
            file.seek(-min(8, os.fstat(file.fileno()).st_size), os.SEEK_END)
            tail = file.read(8)
    except FileNotFoundError:
        return "missing"
    except (OSError, ValueError) as error:  # ValueError: NUL in the path
        return f"unreadable ({getattr(error, 'strerror', None) or error})"
    width, height = (int.from_bytes(start[place : place + 4], "big") for place in (16, 20))  # PNG's header comes first
    if head.startswith(b"\x89PNG") and width * height > 2 * (Image.MAX_IMAGE_PIXELS or width * height):
        return f"{width} x {height} pixels are more than Pillow takes for harmless"
    if any(head.startswith(begin) and tail.endswith(end) for begin, end in _MARKS):
        return ""
    return decode_problem(path)


def decode_problem(path: str) -> str:
    """Return what is wrong with a picture, "" for nothing, by decoding all of it (JPEGs at an eighth of their size)."""
    if "::" in path:
        try:
            read_image(path)
        except DataError as error:
            return str(error)
        return ""
    if os.path.exists(path) and not os.path.isfile(path):
        return "no file"
    try:
        with Image.open(path) as image:
            image.draft("RGB", (max(1, image.width // 8), max(1, image.height // 8)))
            image.load()
    except FileNotFoundError:
        return "missing"
    except Exception as error:  # decoders raise many kinds
        return f"damaged ({error})" if os.path.getsize(path) else "empty file"
    return ""


def find_bad(paths: Iterable[str], problem: Callable[[str], str] = quick_problem) -> dict[str, str]:
    """Return path -> what is wrong with it, for each of ``paths`` that is missing or damaged, in their order."""
    unique = list(dict.fromkeys(paths))
    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(problem, unique, chunksize=64))
    return {path: wrong for path, wrong in zip(unique, found, strict=True) if wrong}


def without_bad(name: str, splits: Sequence[list[Datum]], skip: bool, remedy: str) -> list[list[Datum]]:
    """Refuse a run whose pictures are not all there, or leave the bad ones out.

    Args:
        name: the data set.
        splits: the items that the run will read.
        skip: leave bad pictures out and say how many (``DATASET.SKIP_BAD``).
        remedy: clause for the message.

    Raises:
        DataError: pictures are bad and ``skip`` is False, or without them a class would have no training picture left.
    """
    bad = find_bad(item.impath for items in splits for item in items)
    if not bad:
        return list(splits)
    shown = ", ".join(f"{path}: {wrong}" for path, wrong in list(bad.items())[:5])
    more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
    if not skip:
        raise DataError(
            f"data set {name}: {counted(len(bad), 'picture')} can't be read ({shown}{more}); {remedy}, "
            "or leave them out with --skip-bad (DATASET.SKIP_BAD True)"
        )
    count = counted(len(bad), "picture is", "pictures are")
    get_logger().warning("%s: %s left out (%s%s)", name, count, shown, more)
    kept = [[item for item in items if item.impath not in bad] for items in splits]
    lost = {item.classname for item in splits[0]} - {item.classname for item in kept[0]}
    if lost:
        raise DataError(f"data set {name}: no training picture of {sorted(lost)[0]!r} can be read; {remedy}")
    return kept
