"""What callers give: pictures and class names, checked."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from promptmix.config.declare import shown
from promptmix.errors import ConfigError
from promptmix.files.text import is_name

__all__ = ["Picture", "checked", "count", "each", "texts"]

#: A path (``pack.zip::member`` too), a picture, or the content of a picture's file.
Picture = str | Path | Image.Image | bytes
_PICTURES = "give paths, PIL pictures, or contents of files as bytes"


def checked(name: str, value: Any, kinds: type | tuple[type, ...], takes: str) -> None:  # whatever the caller gave
    """Refuse an argument of another type.

    Raises:
        ConfigError: it is of none of ``kinds``; ``takes`` says what to give.
    """
    if not isinstance(value, kinds) or isinstance(value, bool) and kinds is not bool:
        raise ConfigError(f"{name} is {shown(value)}; give {takes}")


def count(name: str, value: Any, most: int = 10**6) -> None:
    """Refuse what is not a whole number from 1 to ``most``.

    Raises:
        ConfigError: it is none.
    """
    if type(value) is not int or not 1 <= value <= most:
        raise ConfigError(f"{name} is {shown(value)}; give a whole number from 1 to {most:,}")


def texts(names: Any) -> tuple[str, ...]:
    """Return class names as a tuple.

    Raises:
        ConfigError: they are no names.
    """
    found = tuple(_gone_through(names) or ()) if getattr(names, "ndim", 1) != 0 else ()
    if not found or not all(isinstance(name, str) and is_name(name) for name in found):
        raise ConfigError(f"classnames is {shown(names)}; give a list of one or more names that can be seen, each once")
    return found


def _gone_through(items: Any) -> Iterator[Any] | None:
    """Return an iterator over ``items``; None where there is none, or its ``__iter__`` returns something else."""
    try:
        return iter(items) if isinstance(items, Iterable) else None
    except TypeError:
        return None


def each(images: Any) -> Iterator[Picture]:
    """Yield pictures, of one or several.

    Raises:
        ConfigError: one of them is neither a path nor a picture.
    """
    if isinstance(images, Picture):
        yield images
        return
    given = None if isinstance(images, io.IOBase) or getattr(images, "ndim", 1) != 1 else _gone_through(images)
    if given is None:
        raise ConfigError(f"images is {shown(images)}; {_PICTURES}")
    for image in given:
        if not isinstance(image, Picture):
            raise ConfigError(f"image is {shown(image)}; {_PICTURES}")
        yield image
