"""Paths of the authors' machine in a checkout's code: what they name is read from where the rest of the path leads here."""

from __future__ import annotations

import builtins
import importlib.util
import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from promptmix.utils import get_logger

__all__ = ["found_here", "led_to", "is_foreign"]

#: Folders that a machine has or lacks whoever works on it.
_SHARED = ("/", "/Users", "/data", "/data1", "/data2", "/datasets", "/home", "/media", "/mnt", "/root", "/srv", "/workspace")
_WORDS = "bpe_simple_vocab_16e6.txt.gz"


def is_foreign(path: Path) -> bool:
    """Return whether an absolute path that is not there leads through folders that this machine lacks altogether."""
    return path.is_absolute() and str(next((above for above in path.parents if os.path.lexists(above)), path)) in _SHARED


def led_to(path: Path, bases: Sequence[Path]) -> Path | None:
    """Return the file or folder below one of ``bases`` that the longest end of ``path`` leads to, if any does."""
    parts = path.parts[1:] if path.is_absolute() else path.parts
    ends = (Path(*parts[at:]) for at in range(len(parts)))
    return next((base / end for end in ends for base in bases if os.path.lexists(base / end)), None)


def _lent(file: Path) -> Path | None:
    """Return CLIP's table of byte pairs, which forks forget to publish, from open_clip, which has the same."""
    found = importlib.util.find_spec("open_clip")
    place = Path(found.origin).with_name(_WORDS) if found is not None and found.origin else None
    if place is None or not os.path.lexists(place) or file == place:
        return None
    get_logger().warning("%s was not published with the checkout; open_clip's is used", file)
    return place


@contextmanager
def found_here(root: Path, data: str) -> Iterator[None]:
    """Lead what the checkout asks for by a path of its authors' machine here, inside the context; say what is.

    Args:
        root: folder of the checkout.
        data: where its data sets lie, or an empty string.
    """
    bases = [root, *([Path(data).absolute()] if data else [])]
    told, mkdir = set[str](), os.mkdir

    def instead(original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return original(*args, **kwargs)
            except FileNotFoundError:
                path, *others = args or (None,)
                makes = original is mkdir or writes(*others, **kwargs)
                place = look(path, makes) if isinstance(path, str | Path) else None
                if place is None:
                    raise
                return original(str(place), *others, **kwargs)

        return call

    def writes(mode: Any = "r", *_args: Any, **kwargs: Any) -> bool:
        return bool(set(str(kwargs.get("mode", mode))) & set("wax+"))

    def look(path: str | Path, makes: bool) -> Path | None:
        given = Path(path)
        if given.name == _WORDS and not makes:
            return _lent(given)
        if not given.is_absolute() or any(given.is_relative_to(base) for base in bases) or not is_foreign(given):
            return None
        # What is made goes into a folder that is here.
        folder = led_to(given.parent, bases) if makes else None
        place = folder and folder / given.name if makes else led_to(given, bases)
        if place is not None and str(given.parent) not in told:
            told.add(str(given.parent))
            get_logger().warning("The checkout asks for %s, a path of its authors' machine; %s is taken for it", given, place)
        return place

    places: list[tuple[Any, str]] = [
        (builtins, "open"),
        (io, "open"),
        *((os, name) for name in ("stat", "listdir", "scandir", "mkdir")),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name in places]
    for owner, name, original in before:
        setattr(owner, name, instead(original))
    try:
        yield
    finally:
        for owner, name, original in before:
            setattr(owner, name, original)
