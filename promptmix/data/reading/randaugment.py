"""RandAugment in the three variants that Dassl offers: the same operations, ranges and random calls.

The tables follow RandAugment (arXiv 1909.13719) and FixMatch (arXiv 2001.07685) in the ranges that Dassl uses.
torchvision's RandAugment has other operations and magnitudes, so it can't stand in.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from promptmix.errors import ConfigError

__all__ = ["RandAugment", "RandAugment2", "RandAugmentFixMatch"]

Picture = Image.Image
Operation = Callable[[Picture, float], Picture]

#: What is painted into holes: the mean colour of ImageNet.
_GREY = (125, 123, 114)


def _signed(value: float) -> float:
    """Return ``value`` with a random sign."""
    return -value if random.random() > 0.5 else value


def _affine(img: Picture, *matrix: float) -> Picture:
    return img.transform(img.size, Image.Transform.AFFINE, matrix)


def _shear_x(img: Picture, v: float) -> Picture:
    return _affine(img, 1, _signed(v), 0, 0, 1, 0)


def _shear_y(img: Picture, v: float) -> Picture:
    return _affine(img, 1, 0, 0, _signed(v), 1, 0)


def _translate_x(img: Picture, v: float) -> Picture:
    return _affine(img, 1, 0, _signed(v) * img.size[0], 0, 1, 0)


def _translate_y(img: Picture, v: float) -> Picture:
    return _affine(img, 1, 0, 0, 0, 1, _signed(v) * img.size[1])


def _translate_x_pixels(img: Picture, v: float) -> Picture:
    return _affine(img, 1, 0, _signed(v), 0, 1, 0)


def _translate_y_pixels(img: Picture, v: float) -> Picture:
    return _affine(img, 1, 0, 0, 0, 1, _signed(v))


def _solarize_add(img: Picture, v: float) -> Picture:
    brighter = np.clip(np.asarray(img).astype(int) + v, 0, 255).astype(np.uint8)
    return ImageOps.solarize(Image.fromarray(brighter), 128)


def _cutout(img: Picture, v: float) -> Picture:
    """Paint a square of ``v`` pixels grey."""
    width, height = img.size
    x, y = np.random.uniform(width), np.random.uniform(height)
    left, top = int(max(0, x - v / 2)), int(max(0, y - v / 2))
    img = img.copy()
    ImageDraw.Draw(img).rectangle((left, top, min(width, left + v), min(height, top + v)), _GREY)
    return img


def _enhance(kind: Callable[[Picture], ImageEnhance._Enhance]) -> Operation:
    return lambda img, v: kind(img).enhance(v)


_OPERATIONS: dict[str, Operation] = {
    "autocontrast": lambda img, _: ImageOps.autocontrast(img),
    "brightness": _enhance(ImageEnhance.Brightness),
    "color": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "cutout": _cutout,
    "equalize": lambda img, _: ImageOps.equalize(img),
    "identity": lambda img, _: img,
    "invert": lambda img, _: ImageOps.invert(img),
    "posterize": lambda img, v: ImageOps.posterize(img, int(v)),
    "rotate": lambda img, v: img.rotate(_signed(v)),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "solarize": lambda img, v: ImageOps.solarize(img, v),  # type: ignore[arg-type]
    "solarize_add": _solarize_add,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
    "translate_x_pixels": _translate_x_pixels,
    "translate_y_pixels": _translate_y_pixels,
}

# Operation, least and greatest magnitude; the order decides which one a random number picks.
Table = tuple[tuple[str, float, float], ...]

_FIXED: Table = (
    ("autocontrast", 0, 1),
    ("equalize", 0, 1),
    ("invert", 0, 1),
    ("rotate", 0, 30),
    ("posterize", 4, 8),
    ("solarize", 0, 256),
    ("solarize_add", 0, 110),
    ("color", 0.1, 1.9),
    ("contrast", 0.1, 1.9),
    ("brightness", 0.1, 1.9),
    ("sharpness", 0.1, 1.9),
    ("shear_x", 0.0, 0.3),
    ("shear_y", 0.0, 0.3),
    ("cutout", 0, 40),
    ("translate_x_pixels", 0.0, 100),
    ("translate_y_pixels", 0.0, 100),
)

_RANDOM: Table = (
    ("autocontrast", 0, 1),
    ("brightness", 0.1, 1.9),
    ("color", 0.1, 1.9),
    ("contrast", 0.1, 1.9),
    ("equalize", 0, 1),
    ("identity", 0, 1),
    ("invert", 0, 1),
    ("posterize", 4, 8),
    ("rotate", -30, 30),
    ("sharpness", 0.1, 1.9),
    ("shear_x", -0.3, 0.3),
    ("shear_y", -0.3, 0.3),
    ("solarize", 0, 256),
    ("translate_x", -0.3, 0.3),
    ("translate_y", -0.3, 0.3),
)

_FIXMATCH: Table = (
    ("autocontrast", 0, 1),
    ("brightness", 0.05, 0.95),
    ("color", 0.05, 0.95),
    ("contrast", 0.05, 0.95),
    ("equalize", 0, 1),
    ("identity", 0, 1),
    ("posterize", 4, 8),
    ("rotate", -30, 30),
    ("sharpness", 0.05, 0.95),
    ("shear_x", -0.3, 0.3),
    ("shear_y", -0.3, 0.3),
    ("solarize", 0, 256),
    ("translate_x", -0.3, 0.3),
    ("translate_y", -0.3, 0.3),
)


class RandAugment:
    """``n`` random operations, all of magnitude ``m``.

    Args:
        n: operations per picture.
        m: magnitude from 0 to 30.

    Raises:
        ConfigError: ``m`` is out of range.
    """

    def __init__(self, n: int = 2, m: float = 10) -> None:
        if not 0 <= m <= 30:
            raise ConfigError(f"INPUT.RANDAUGMENT_M is {m}, but must be from 0 to 30")
        self.n = n
        self.m = m

    def __call__(self, img: Picture) -> Picture:
        """Return a changed copy of a picture."""
        for name, least, greatest in random.choices(_FIXED, k=self.n):
            img = _OPERATIONS[name](img, self.m / 30 * (greatest - least) + least)
        return img


class RandAugment2:
    """``n`` random operations, each done with probability ``p`` at a random magnitude.

    Args:
        n: operations per picture.
        p: probability of each.
    """

    def __init__(self, n: int = 2, p: float = 0.6) -> None:
        self.n = n
        self.p = p

    def __call__(self, img: Picture) -> Picture:
        """Return a changed copy of a picture."""
        for name, least, greatest in random.choices(_RANDOM, k=self.n):
            if random.random() <= self.p:
                img = _OPERATIONS[name](img, random.random() * (greatest - least) + least)
        return img


class RandAugmentFixMatch:
    """``n`` random operations at random magnitudes, in FixMatch's ranges.

    Args:
        n: operations per picture.
    """

    def __init__(self, n: int = 2) -> None:
        self.n = n

    def __call__(self, img: Picture) -> Picture:
        """Return a changed copy of a picture."""
        for name, least, greatest in random.choices(_FIXMATCH, k=self.n):
            img = _OPERATIONS[name](img, random.random() * (greatest - least) + least)
        return img
