"""Decoded training pictures on disk (``INPUT.PICTURE_CACHE``): read, turned and resized once, mapped from then on.

A file holds the pictures of one split as bytes of red, green and blue, after what is done to them without chance: decoding,
``INPUT.READING``, and the resizing and cropping that a transform begins with. What is random comes after it and draws the same
numbers, so that batches are bit for bit those of a run without the cache. All processes that read a file share its memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image, features
from PIL import __version__ as pil_version
from safetensors.torch import load_file
from torch import Tensor
from torchvision import transforms as T
from yacs.config import CfgNode

from promptmix.data.base import reading_of
from promptmix.data.datum import Datum
from promptmix.data.features.cache import FeatureCache, cache_folder, content_digest, items_hash
from promptmix.data.reading.fast import FastTransform
from promptmix.data.reading.images import read_image
from promptmix.errors import DataError
from promptmix.parallel import group
from promptmix.utils import get_logger

__all__ = ["KeptPictures", "PictureCache", "kept_pictures", "picture_folder", "split_transform"]

Transform = Callable[[Any], Any]

#: Raised when a file's meaning changes, so that old files are passed over.
_VERSION = 1
#: Steps of a transform that draw no random numbers and make a picture of a picture.
_STEADY = (T.Resize, T.CenterCrop)
_HEAD = 4096  # bytes before the pixels: length and text of safetensors' header, filled up with blanks
_AT_ONCE = 256  # pictures that are decoded before they are written


class _TooLargeError(Exception):
    """The pictures need more room than the limit."""


def picture_folder(chosen: str = "") -> Path:
    """Return the folder of the decoded pictures, inside that of the features (see ``cache_folder``)."""
    return cache_folder(chosen) / "pictures"


class PictureCache(FeatureCache):
    """A folder of decoded pictures under hashed keys, with the rules of ``FeatureCache``."""

    what = "pictures"
    limit_key = "INPUT.PICTURE_CACHE_GB"

    def fill(self, key: str, pictures: Iterator[np.ndarray], about: str) -> None:
        """Write pictures one after the other under ``key``; there are never more than a few in memory.

        Args:
            key: what tells them from all others.
            pictures: of any sizes, (height, width, 3), uint8.
            about: what they are, for ``promptmix cache list``.

        Raises:
            DataError: a picture can't be read.
        """
        try:
            self.write(key, lambda path: self._write(path, key, pictures, about))
        except _TooLargeError:
            get_logger().info("Decoded pictures exceed %s (%.1f GB) and are not kept", self.limit_key, self.limit / 1e9)

    def _write(self, path: Path, key: str, pictures: Iterator[np.ndarray], about: str) -> None:
        sizes: list[tuple[int, int]] = []
        with open(path, "wb") as file:
            file.write(bytes(_HEAD))
            for picture in pictures:
                sizes.append((picture.shape[0], picture.shape[1]))
                file.write(np.ascontiguousarray(picture).data)
                if self.limit and file.tell() > self.limit:
                    raise _TooLargeError
            file.write(bytes(-file.tell() % 8))  # the sizes begin at a whole number
            end = file.tell() - _HEAD
            file.write(np.array(sizes, dtype="<i8").tobytes())
            self._head(file, end, len(sizes), about, "0" * 64)
            file.flush()
            digest = content_digest(key, load_file(path))
            self._head(file, end, len(sizes), about, digest)

    def _head(self, file: Any, end: int, count: int, about: str, digest: str) -> None:
        """Write the header of safetensors: ``end`` bytes of pixels, then the sizes of ``count`` pictures."""
        entries = {
            "__metadata__": {"about": about, "digest": digest},
            "pixels": {"dtype": "U8", "shape": [end], "data_offsets": [0, end]},
            "sizes": {"dtype": "I64", "shape": [count, 2], "data_offsets": [end, end + 16 * count]},
        }
        text = json.dumps(entries).encode()
        file.seek(0)
        file.write((_HEAD - 8).to_bytes(8, "little") + text.ljust(_HEAD - 8))


class KeptPictures:
    """The decoded pictures of one split.

    Args:
        cache: where they lie.
        items: the pictures; one that is named twice is kept once.
        reading: see ``promptmix.data.reading.images``.
        steps: what is done to a picture before it is kept.
        rest: what is left to do to it, after ``steps``.
        threads: that decode.
        name: of the data set, for people.
        fast: reads pictures instead of the exact way.
    """

    def __init__(
        self,
        cache: PictureCache,
        items: Sequence[Datum],
        reading: str,
        steps: Sequence[Transform],
        rest: Any,  # whatever a data set takes for a transform
        threads: int,
        name: str,
        fast: FastTransform | None = None,
    ) -> None:
        self.cache, self.reading, self.steps, self.rest = cache, reading, tuple(steps), rest
        self.threads, self.name, self.fast = threads, name, fast
        self.items = list({item.impath: item for item in items}.values())
        self.places: dict[str, tuple[int, int, int]] = {}  # path -> first byte, height, width
        self._key = ""
        self._pixels: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pixels": None}  # another process maps the file itself

    def open(self) -> None:
        """Map the pictures, decoding them first where nobody has; does nothing the second time.

        Raises:
            UserError: a picture is missing or can't be read.
        """
        if self._key:
            return
        self._key = self._make_key()
        with group.one_first():
            if self._map():
                get_logger().info("Found %d decoded pictures", len(self.items))
                return
            get_logger().info("Decoding %d training pictures, for all epochs, methods and seeds that read them", len(self.items))
            self.cache.fill(self._key, self._decoded(), f"{self.name}, {len(self.items)} training pictures")
            self._map()

    def picture(self, path: str) -> Image.Image | None:
        """Return a picture after ``steps``, or None where it is not kept."""
        pixels = self.pixels(path)
        if pixels is None:
            return None
        return Image.frombuffer("RGB", pixels.shape[1::-1], pixels, "raw", "RGB", 0, 1)

    def pixels(self, path: str) -> np.ndarray | None:
        """Return a picture's bytes (height, width, 3), which nobody may write to, or None where it is not kept."""
        place = self.places.get(path)
        if place is None:
            return None
        if self._pixels is None and not self._map():  # in a process that was not forked, and gone meanwhile
            return None
        begin, height, width = place
        found: np.ndarray = self._pixels[begin : begin + height * width * 3].reshape(height, width, 3)
        return found

    def _map(self) -> bool:
        stored = self.cache.get(self._key, {"sizes": (len(self.items), 2)})
        places = _places(stored, self.items) if stored else None
        if not stored or places is None:
            self.places = {}
            return False
        self.places, self._pixels = places, stored["pixels"].numpy()
        return True

    def _decoded(self) -> Iterator[np.ndarray]:
        with ThreadPoolExecutor(self.threads) as pool:
            for start in range(0, len(self.items), _AT_ONCE):
                yield from pool.map(self._decode, self.items[start : start + _AT_ONCE])

    def _decode(self, item: Datum) -> np.ndarray:
        if self.fast:
            return self.fast.read(item.impath, self.reading).permute(1, 2, 0).numpy()
        picture: Any = read_image(item.impath, self.reading)
        for step in self.steps:
            picture = step(picture)
        return np.asarray(picture)

    def _make_key(self) -> str:
        decoders = [pil_version, *(features.version(name) for name in ("jpg", "webp", "libtiff")), torchvision.__version__]
        parts = [_VERSION, items_hash(self.items), self.reading, [repr(step) for step in self.steps], decoders]
        parts += [self.fast.reads] if self.fast else []
        return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:40]


def _places(stored: dict[str, Tensor], items: Sequence[Datum]) -> dict[str, tuple[int, int, int]] | None:
    """Return where each picture begins and its size; None where the sizes can't be those of the pixels."""
    sizes, room = stored["sizes"], len(stored.get("pixels", ()))
    if sizes.dtype != torch.int64 or bool((sizes < 1).any()) or bool((sizes > room).any()):
        return None
    places, begin = {}, 0
    for item, (height, width) in zip(items, sizes.tolist(), strict=True):
        places[item.impath] = begin, height, width
        begin += height * width * 3
    return places if begin <= room < begin + 8 else None


def split_transform(transform: Any) -> tuple[tuple[Transform, ...], Any]:
    """Split a transform into the steps without chance that it begins with, and the rest."""
    if type(transform) is not T.Compose:
        return (), transform
    steps = list(transform.transforms)
    count = next((place for place, step in enumerate(steps) if type(step) not in _STEADY), len(steps))
    return tuple(steps[:count]), T.Compose(steps[count:])


def kept_pictures(cfg: CfgNode, items: Sequence[Datum], transform: Any) -> KeptPictures | None:
    """Return the kept pictures that ``cfg.INPUT`` asks for, or None where the cache is off, or has no place.

    Args:
        cfg: the whole config tree.
        items: a split for training.
        transform: what a data set does to them; without one, nothing is kept, since pictures carry more than pixels.
    """
    if transform is None or not cfg.INPUT.get("PICTURE_CACHE", False):  # a real Dassl's tree lacks it
        return None
    try:
        cache = PictureCache(picture_folder(cfg.INPUT.FEATURE_CACHE_DIR), cfg.INPUT.PICTURE_CACHE_GB)
    except DataError as error:
        get_logger().info("Pictures are not kept: %s", error)
        return None
    # The picture without augmentation is made of the whole one.
    steps, rest = ((), transform) if cfg.DATALOADER.RETURN_IMG0 else split_transform(transform)
    threads = max(1, cfg.DATALOADER.NUM_WORKERS)
    fast = transform if isinstance(transform, FastTransform) and not cfg.DATALOADER.RETURN_IMG0 else None
    return KeptPictures(cache, items, reading_of(cfg), steps, rest, threads, cfg.DATASET.NAME, fast)
