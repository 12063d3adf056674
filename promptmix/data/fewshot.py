"""Few-shot splits and base/new classes: the same random calls as Dassl and CoOp, so the same pictures for a seed."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from promptmix.config.core import CLASSES
from promptmix.data.datum import Datum
from promptmix.errors import ConfigError, DataError
from promptmix.files.text import counted
from promptmix.utils import get_logger, read_json, write_json

__all__ = ["generate_fewshot", "load_split", "num_base", "save_split", "say_fewer", "split_by", "subsample_classes", "unlabeled"]

StrPath = str | os.PathLike[str]


def split_by(items: Sequence[Datum], attribute: str) -> dict[Any, list[Datum]]:
    """Group items by an attribute (``label``, ``domain``), groups in order of first appearance."""
    groups: dict[Any, list[Datum]] = {}
    for item in items:
        groups.setdefault(getattr(item, attribute), []).append(item)
    return groups


def generate_fewshot(items: Sequence[Datum], num_shots: int, repeat: bool = False) -> list[Datum]:
    """Draw ``num_shots`` items of each class with python's generator, classes in order of first appearance.

    Args:
        items: what to draw from.
        num_shots: items per class.
        repeat: where a class has too few, draw with replacement; otherwise all of the class are taken.
    """
    chosen: list[Datum] = []
    for members in split_by(items, "label").values():
        if len(members) >= num_shots:
            members = random.sample(members, num_shots)
        elif repeat:
            members = random.choices(members, k=num_shots)
        chosen += members
    return chosen


def say_fewer(items: Sequence[Datum], num_shots: int) -> None:
    """Say how many classes have fewer training pictures than the shots that are asked for."""
    counts = [len(members) for members in split_by(items, "label").values()]
    fewer = [count for count in counts if count < num_shots]
    if fewer:
        least = f"{min(fewer)} to {max(fewer)}" if min(fewer) < max(fewer) else f"{fewer[0]}"
        get_logger().warning(
            "%s: %d of %s fewer training pictures (%s) and give all of theirs",
            counted(num_shots, "shot"),
            len(fewer),
            counted(len(counts), "class has", "classes have"),
            least,
        )


def subsample_classes(*splits: Sequence[Datum], subsample: str = "all") -> list[list[Datum]]:
    """Keep the base or the new half of the classes, with labels numbered from 0 again.

    The labels of the first split are sorted; the first ceil(n / 2) are base, the others new. Domains are kept.

    Args:
        splits: for instance train, val and test.
        subsample: ``all``, ``base`` or ``new``; ``open`` keeps what ``all`` keeps.

    Raises:
        ConfigError: ``subsample`` is something else.
    """
    if subsample not in CLASSES:
        raise ConfigError(f"DATASET.SUBSAMPLE_CLASSES is {subsample!r}, but must be one of: {', '.join(CLASSES)}")
    if subsample in ("all", "open"):
        return [list(items) for items in splits]
    labels = sorted({item.label for item in splits[0]})
    half = num_base(len(labels))
    get_logger().info("SUBSAMPLE %s CLASSES!", subsample.upper())
    relabel = {label: new for new, label in enumerate(labels[:half] if subsample == "base" else labels[half:])}
    return [[Datum(i.impath, relabel[i.label], i.domain, i.classname) for i in items if i.label in relabel] for items in splits]


def num_base(classes: int) -> int:
    """Return how many of the classes are base: the first half, and the middle one."""
    return math.ceil(classes / 2)


def save_split(path: StrPath, splits: Mapping[str, Sequence[Datum]], root: StrPath = "") -> None:
    """Write splits as JSON: per split a list of ``[path, label, class name]``, as CoOp does; a domain follows if not 0.

    Args:
        path: the file.
        splits: name -> items.
        root: folder that paths are written relative to; those outside it are written as they are.
    """
    rows = {
        name: [
            [_relative(item.impath, root), item.label, item.classname, *([item.domain] if item.domain else [])] for item in items
        ]
        for name, items in splits.items()
    }
    write_json(rows, path)


def load_split(path: StrPath, root: StrPath = "") -> dict[str, list[Datum]]:
    """Read splits that ``save_split`` or CoOp wrote.

    Args:
        path: the file.
        root: folder that the paths in it are relative to.

    Raises:
        DataError: the file is missing or of another form.
    """
    content = read_json(path)
    try:
        return {name: [_datum(row, root) for row in rows] for name, rows in content.items()}
    except (AttributeError, TypeError, ValueError, IndexError) as error:
        raise DataError(
            f"{path} is not a split file: it must map split names to lists of [path, label, class name] ({error}); "
            "delete it to have it made anew"
        ) from error


def _datum(row: Sequence[Any], root: StrPath) -> Datum:
    impath, label, classname, *domain = row
    numbers = [label, *domain]
    texts = isinstance(row, list) and isinstance(impath, str) and "\0" not in impath and isinstance(classname, str)
    if not texts or len(domain) > 1 or not all(type(number) is int and 0 <= number < 2**31 for number in numbers):
        raise ValueError(f"bad row {row!r:.200}")
    classname.encode()  # a half of a character is not a name
    joined = os.path.join(root, impath) if root else impath
    return Datum(joined, label, domain[0] if domain else 0, classname)


def _relative(impath: str, root: StrPath) -> str:
    if not root:
        return impath
    try:
        return Path(impath).relative_to(root).as_posix()
    except ValueError:
        return impath


def unlabeled(cfg: CfgNode, train: Sequence[Datum]) -> list[Datum] | None:
    """Return the training pictures without labels that ``DATASET.UNLABELED`` asks for; None for none.

    Args:
        cfg: the whole config tree.
        train: the whole training part, before shots are drawn and classes left out.
    """
    chosen = cfg.DATASET.UNLABELED
    if chosen == "none":
        return None
    kept = train if chosen == "all" else subsample_classes(train, subsample=cfg.DATASET.SUBSAMPLE_CLASSES)[0]
    return [Datum(item.impath, -1, item.domain, "") for item in kept]
