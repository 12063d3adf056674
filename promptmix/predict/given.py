"""What callers give: pictures and class names, checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from promptmix.config.declare import shown
from promptmix.errors import ConfigError

__all__ = ["Picture", "listed", "texts"]

#: A path (``pack.zip::member`` too), a picture, or the content of a picture's file.
Picture = str | Path | Image.Image | bytes


def texts(names: Any) -> tuple[str, ...]:  # whatever the caller gave
    """Return class names as a tuple.

    Raises:
        ConfigError: they are no names.
    """
    try:
        found = tuple(names)
    except TypeError:
        found = ()
    if not found or not all(isinstance(name, str) and name.strip() for name in found):
        raise ConfigError(f"classnames is {shown(names)}; give a list of one or more names, each once")
    return found


def listed(images: Any) -> list[Picture]:
    """Return pictures as a list.

    Raises:
        ConfigError: one of them is neither a path nor a picture.
    """
    try:
        found = list(images)
    except (TypeError, ValueError):  # a closed file
        found = [images]
    for image in found:
        if not isinstance(image, Picture):
            raise ConfigError(f"image is {shown(image)}; give paths, PIL pictures, or contents of files as bytes")
    return found
