"""Reading pictures from files and from zip packs, as the benchmark's code does or as people see them.

The benchmark's code opens a file and calls ``convert("RGB")``: pictures of phones lie on their side, what is transparent shows
the colour that happens to be stored there (mostly black), and 16-bit grey is white. Numbers of the 15 benchmark data sets depend
on it, so it is kept for them bit for bit (``INPUT.READING benchmark``). ``upright`` turns a picture as its EXIF or XMP
orientation says, puts what is transparent on white, as a web page shows it, and scales 16-bit grey to 8 bits. Both read the first
frame of what moves and take CMYK and palettes as Pillow converts them; colour profiles are not applied.
"""

from __future__ import annotations

import io
import os
import warnings
import zipfile
from functools import lru_cache
from typing import IO

import numpy as np
from PIL import Image, UnidentifiedImageError

from promptmix.config.core import READINGS
from promptmix.errors import DataError, said

__all__ = ["READINGS", "as_rgb", "member_size", "open_member", "read_bytes", "read_image"]

# Of what Pillow can't make sense of in EXIF it warns; what matters it raises.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

_ORIENTATION = 0x0112  # EXIF's tag
#: How many times its short side a picture's long side may be; of more the middle is taken.
_MOST_RATIO = 200
#: What undoes each orientation but 1.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(path: str, reading: str = "benchmark") -> Image.Image:
    """Read a picture as RGB.

    Args:
        path: a file, or ``pack.zip::member`` for one inside a zip.
        reading: ``benchmark`` or ``upright``, see above.

    Raises:
        DataError: the file or member is missing, or is not a picture; the message names it.
    """
    pack, inside, member = path.partition("::")
    try:
        if os.path.exists(pack) and not os.path.isfile(pack):  # a named pipe would be waited for
            raise DataError(f"can't read picture {path}: it is not a file; remove it")
        if not inside:
            with Image.open(path) as img:
                return as_rgb(img, reading)
        with open_member(path) as file, Image.open(file) as img:
            return as_rgb(img, reading)
    except FileNotFoundError as error:
        raise DataError(f"no picture {path}; check the path, or DATASET.ROOT where a data set names it") from error
    except PermissionError as error:
        raise DataError(f"can't read picture {path}: {said(error, '')}") from error
    except KeyError as error:
        raise DataError(f"no picture {member!r} in {pack}; get the pack again") from error
    except (DataError, MemoryError):
        raise
    except Exception as error:  # decoders raise many kinds, also for more pixels than Pillow takes for harmless
        raise DataError(
            f"can't read picture {path} ({error}); it is damaged or no picture: take another copy, or leave it out"
        ) from error


def read_bytes(content: bytes, reading: str = "benchmark") -> Image.Image:
    """Read a picture as RGB from the content of its file, as a web page gets it.

    Args:
        content: JPEG, PNG or whatever else Pillow reads.
        reading: ``benchmark`` or ``upright``, see above.

    Raises:
        DataError: it is not a picture, a damaged one, or one with more pixels than Pillow takes for harmless.
    """
    try:
        with Image.open(io.BytesIO(content)) as img:
            return as_rgb(img, reading)
    except MemoryError:
        raise
    except Exception as error:  # as above
        why = "no format that Pillow knows" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(
            f"can't read a picture of {len(content):,} bytes ({why}); it is damaged or no picture: take another"
        ) from error


def as_rgb(image: Image.Image, reading: str = "benchmark") -> Image.Image:
    """Return an opened picture as RGB.

    Args:
        image: in any of Pillow's modes.
        reading: ``benchmark`` or ``upright``, see above.

    Raises:
        DataError: it was closed, is damaged, or has no pixels.
    """
    if not all(image.size):
        raise DataError(f"a picture of {image.width} x {image.height} pixels shows nothing; leave it out")
    try:
        return _without_ends(_read(image, reading))
    except ValueError as error:
        raise DataError(f"can't read a picture ({error}); open it anew") from error


def _without_ends(image: Image.Image) -> Image.Image:
    """Return the middle of a strip: with its short side resized to that of the input, the whole would fill the memory."""
    width, height = image.size
    most = _MOST_RATIO * min(width, height)
    if max(width, height) <= most:
        return image
    left, top = max(0, (width - most) // 2), max(0, (height - most) // 2)
    return image.crop((left, top, left + min(width, most), top + min(height, most)))


def _read(image: Image.Image, reading: str) -> Image.Image:
    """Return an opened picture as RGB, whatever its shape."""
    if reading == "benchmark":
        return image.convert("RGB")
    image.load()  # some formats hold the orientation behind the pixels, and TIFF turns itself
    turn = _TURNS.get(_orientation(image))
    if turn is not None:
        image = image.transpose(turn)
    if image.mode[0] in "IF":
        return _eight_bits(image).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    seen = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")


def _orientation(image: Image.Image) -> int:
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF raises many kinds, and the pixels are fine without it
        return 1
    return found if isinstance(found, int) else 1


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return grey of 16 bits, whole numbers or fractions as 8 bits; the largest value says which of these it is."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0.0, neginf=0.0)
    high = float(values.max(initial=0.0))
    if image.mode.startswith("I;16") or 255 < high <= 65535:
        top = 65535.0
    else:
        top = 1.0 if image.mode == "F" and high <= 1 else max(high, 255.0)
    return Image.fromarray(np.clip(values * (255 / top) + 0.5, 0, 255).astype(np.uint8))


def open_member(path: str) -> IO[bytes]:
    """Open ``pack.zip::member`` for reading; what is wrong comes as the zip module says it."""
    pack, _, member = path.partition("::")
    return _zip(os.path.abspath(pack), os.getpid()).open(member)


def member_size(path: str) -> int:
    """Return how many bytes ``pack.zip::member`` has, unpacked."""
    pack, _, member = path.partition("::")
    return _zip(os.path.abspath(pack), os.getpid()).getinfo(member).file_size


@lru_cache(maxsize=32)
def _zip(pack: str, pid: int) -> zipfile.ZipFile:
    """Open a pack once per process: two workers that share a handle would read at each other's positions.

    Args:
        pack: path of the zip.
        pid: this process; part of the cache key, so that a forked worker opens its own.
    """
    del pid
    return zipfile.ZipFile(pack)
