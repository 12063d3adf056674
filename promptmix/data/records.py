"""Few-shot splits kept beside a data set: written as JSON, and read from the pickles that CoOp leaves, without running them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from promptmix.data.datum import Datum
from promptmix.data.fewshot import load_split, save_split
from promptmix.errors import DataError
from promptmix.files.pickles import Maker, Refused, Shell, read_pickle
from promptmix.utils import get_logger

__all__ = ["kept_fewshot", "read_records"]

Splits = dict[str, list[Datum]]
FOLDER = "split_fewshot"  # CoOp's


def kept_fewshot(folder: Path, shots: int, seed: int, drawn: Splits) -> Splits:
    """Return the few-shot split that is kept for these shots and seed; where none is, keep the one drawn.

    Args:
        folder: the data set's.
        shots: pictures per class.
        seed: the run's; a negative one (not seeded) is neither read nor kept.
        drawn: part -> items as just drawn. They are drawn in any case, so that a run's random numbers don't depend on files.

    Raises:
        DataError: the file there is of another form, or a pickle that holds something else than lists of items.
    """
    if seed < 0:
        return drawn
    path = folder / FOLDER / f"shot_{shots}-seed_{seed}.json"
    theirs = path.with_suffix(".pkl")
    if path.is_file():
        kept = load_split(path, folder)
    elif theirs.is_file():
        kept = read_records(theirs, folder, tuple(drawn))
    else:
        _keep(path, drawn, folder)
        return drawn
    missing = [part for part in drawn if part not in kept]
    source = path if path.is_file() else theirs
    if missing:
        raise DataError(f"{source} lacks {', '.join(missing)}; remove it to have it made anew")
    get_logger().info("Loading preprocessed few-shot data from %s", source)
    if any([i.impath for i in kept[part]] != [i.impath for i in drawn[part]] for part in drawn):
        get_logger().warning("%s holds other pictures than shots %d and seed %d draw now; the file is used", source, shots, seed)
    return {part: kept[part] for part in drawn}


def _keep(path: Path, drawn: Splits, folder: Path) -> None:
    try:
        save_split(path, drawn, folder)
    except OSError:
        # Data sets are often shared and read-only; the draw is the same each time anyway.
        get_logger().info("Few-shot data is not saved: %s can't be written", path.parent)
    else:
        get_logger().info("Saving preprocessed few-shot data to %s", path)


def read_records(path: Path, folder: Path, parts: Sequence[str]) -> Splits:
    """Read lists of items from a pickle of CoOp's, which can build nothing but lists, dicts, text, numbers and items.

    Args:
        path: the pickle.
        folder: the data set's folder; paths from another place (CoOp stores absolute ones) are moved here.
        parts: which lists it must hold.

    Raises:
        DataError: it names any class or function besides ``Datum``, is damaged, or is of another form.
    """

    def find(name: str) -> Maker:
        if name.rpartition(".")[2] != "Datum":
            raise Refused(f"it asks for {name[:200]}, but a split holds lists of Datum only")
        return Maker(name, lambda *_: Shell(name))

    try:
        with path.open("rb") as file:
            content = read_pickle(file, find)
    except (Refused, OSError) as error:
        raise DataError(f"{path} is refused: {error}; remove it to have the split made anew") from error
    try:
        return {part: [_datum(item, folder) for item in content[part]] for part in parts}
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is not a split of CoOp's ({type(error).__name__}: {error}); remove it to have the split made anew"
        ) from error


def _datum(item: Any, folder: Path) -> Datum:
    if type(item) is not Shell:
        raise TypeError(f"an item is a {type(item).__name__}, not a Datum")
    values = [item.state[name] for name in ("_impath", "_label", "_domain", "_classname")]
    if [type(value) for value in values] != [str, int, int, str]:
        raise TypeError("an item's path, label, domain and class name must be text, number, number, text")
    return Datum(_here(values[0], folder), *values[1:])


def _here(path: str, folder: Path) -> str:
    """Move a path that was made on another machine to this folder: what follows the data set's folder name is kept."""
    if path.startswith(str(folder) + os.sep):
        return path
    above, found, below = path.replace("\\", "/").rpartition(f"/{folder.name}/")
    return str(folder / below) if found else path
