"""Reads the benchmark data sets from CoOp's folders into lists of ``Datum``: the authors' order, labels and class names."""

from __future__ import annotations

import gzip
import json
import os
import random
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path

from promptmix.data.datasets.descriptions import Description
from promptmix.data.datum import Datum
from promptmix.data.fewshot import load_split
from promptmix.data.records import read_records
from promptmix.errors import DataError
from promptmix.files.text import counted
from promptmix.utils import get_logger

__all__ = [
    "PACKAGED",
    "READERS",
    "Splits",
    "list_folder",
    "packaged_rows",
    "packaged_text",
    "read_classnames",
    "read_splits",
    "shuffled_split",
]

#: Part -> items, in the order train, val, test.
Splits = dict[str, list[Datum]]

#: Where the split files that come with the package lie.
PACKAGED = Path(__file__).resolve().parent.parent / "splits"

_SPLIT_SEED = 1  # of splits made here, whatever the run's seed: every run must be tested on the same pictures


def read_splits(about: Description, root: str | os.PathLike[str]) -> Splits:
    """Read a benchmark data set.

    Args:
        about: which.
        root: ``DATASET.ROOT``, the folder that holds the data sets' folders.

    Returns:
        Its parts as the authors' readers give them; whether the pictures exist is not looked at.

    Raises:
        DataError: the folder or one of its files is missing or of another form.
    """
    folder = dataset_folder(about, root)
    splits = READERS[about.kind](about, folder)
    if not splits["train"]:
        raise DataError(f"data set {about.name}: no pictures in {folder}; {remedy(about, root)}")
    return splits


def dataset_folder(about: Description, root: str | os.PathLike[str]) -> Path:
    """Return the data set's folder.

    Raises:
        DataError: there is none; the message says how to get it.
    """
    above = Path(os.path.abspath(os.path.expanduser(root)))
    folder = above / about.folder
    # An empty root would silently mean the current folder.
    if str(root) and (folder / about.images).is_dir():
        return folder
    if not str(root):
        problem = "DATASET.ROOT is not set"
    elif folder.is_dir():
        problem = f"no folder {folder / about.images}"
    else:
        there = sorted(entry.name for entry in above.iterdir()) if above.is_dir() else []
        problem = f"no folder {folder} ({above} {'holds ' + ', '.join(there[:8]) if there else 'is empty or missing'})"
    raise DataError(f"data set {about.name}: {problem}; {remedy(about, root)}")


def remedy(about: Description, root: str | os.PathLike[str]) -> str:
    """Return the clause that ends messages about missing data."""
    command = f"promptmix data prepare {about.name} --root {root or 'FOLDER'}"
    return f"get it with `{command}`, or set --root to the folder that holds {about.folder}/"


def packaged_text(name: str) -> str:
    """Return a split file or list that comes with the package, unpacked.

    Raises:
        DataError: the package lacks it.
    """
    path = PACKAGED / name
    try:
        if path.suffix == ".gz":
            return gzip.decompress(path.read_bytes()).decode("utf-8")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"the package lacks {path} ({error.strerror}); install promptmix again") from error


def _own_or_packaged(folder: Path, own: str, packaged: str) -> str:
    """Return the text of the data set's own file, or of the packaged one where there is none."""
    path = folder / own
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else packaged_text(packaged)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"can't read {path} ({error}); fix it, or remove it to use the packaged one") from error


def list_folder(folder: Path) -> list[str]:
    """Return the names in ``folder`` that don't start with a dot, sorted: the file system's own order differs by machine.

    Raises:
        DataError: it can't be listed.
    """
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        raise DataError(f"can't list {folder} ({error.strerror}); check the path and DATASET.ROOT") from error


def read_classnames(text: str) -> dict[str, str]:
    """Read lines ``folder class name`` (CoOp's ``classnames.txt``) as folder -> class name, in order."""
    pairs = (line.strip().split(" ", 1) for line in text.splitlines() if line.strip())
    return {pair[0]: pair[-1].strip() for pair in pairs}


# Split files


def _read_split(about: Description, folder: Path) -> Splits:
    """Read the split file in the folder, or the packaged one."""
    path = folder / about.split_file
    images = folder / about.images
    if path.is_file():
        get_logger().info("Reading split from %s", path)
        return _three_parts(load_split(path, images), path)
    rows = packaged_rows(about.split_file)
    prefix = str(images)
    return {
        part: [Datum(os.path.join(prefix, path), label, 0, name) for path, label, name in rows[part]]
        for part in ("train", "val", "test")
    }


def _three_parts(splits: Splits, path: Path) -> Splits:
    missing = [part for part in ("train", "val", "test") if part not in splits]
    if missing:
        raise DataError(f"{path} lacks {', '.join(missing)}; remove it to use the packaged split, or get it again")
    return splits


@lru_cache(maxsize=2)  # a sweep in one process reads the same split again and again
def packaged_rows(name: str) -> dict[str, list[tuple[str, int, str]]]:
    """Return a packaged split, part -> rows of path, label and class name; not to be changed."""
    rows: dict[str, list[tuple[str, int, str]]] = json.loads(packaged_text(f"{name}.gz"))
    return rows


def _read_folder_split(about: Description, folder: Path) -> Splits:
    """Read the split file in the folder or, without one, split the class folders 50 : 20 : 30 once and for all."""
    path = folder / about.split_file
    if path.is_file():
        return _read_split(about, folder)
    members = _official_lists(folder) or _class_folders(folder / about.images)
    get_logger().warning(
        "%s: no %s in %s, so a split of the same sizes is made, with other pictures than the authors': numbers differ a little",
        about.name,
        about.split_file,
        folder,
    )
    # Not saved under the authors' name: it comes out the same each time, and the warning should too.
    groups = [
        [Datum(str(folder / about.images / path), label, 0, name) for path in paths]
        for label, (name, paths) in enumerate(members.items())
    ]
    return shuffled_split(groups, (0.5, 0.2, 0.3), _SPLIT_SEED, folder)


def _official_lists(folder: Path) -> dict[str, list[str]]:
    """Return class folder -> paths of Food-101's ``meta`` lists, sorted; empty without them."""
    members: dict[str, list[str]] = {}
    for name in ("train.txt", "test.txt"):
        path = folder / "meta" / name
        if not path.is_file():
            return {}
        for line in path.read_text(encoding="utf-8").split():
            members.setdefault(line.split("/")[0], []).append(f"{line}.jpg")
    return {name: sorted(members[name]) for name in sorted(members)}


def _class_folders(images: Path) -> dict[str, list[str]]:
    names = [name for name in list_folder(images) if (images / name).is_dir()]
    return {name: [f"{name}/{file}" for file in list_folder(images / name)] for name in names}


def shuffled_split(groups: Iterable[Sequence[Datum]], ratio: Sequence[float], seed: int, where: Path) -> Splits:
    """Split each group by ratio, shuffled by ``seed`` alone.

    A group that is too small for three parts gives its val part up first.

    Args:
        groups: items of one class each (or of one class and domain).
        ratio: shares of train, val and test; the test part gets what is left. A share of 0 makes an empty part.
        seed: of the shuffle; python's global generator is not touched, so that few-shot picks stay the same.
        where: folder or file, for the message.

    Raises:
        DataError: a group has too few pictures to train and to test on.
    """
    generator = random.Random(seed)
    splits: Splits = {"train": [], "val": [], "test": []}
    without_val: list[str] = []
    for group in groups:
        items = list(group)
        generator.shuffle(items)
        first, second = (round(len(items) * share) for share in ratio[:2])
        if ratio[1] and (not second or first + second >= len(items)):
            second = 0
            without_val.append(items[0].classname)
        parts = {"train": items[:first], "val": items[first : first + second], "test": items[first + second :]}
        for part in ("train", "test"):
            if not parts[part]:
                raise DataError(
                    f"{where}: {len(items)} picture{'s' * (len(items) > 1)} of {items[0].classname!r}: too few to train on and "
                    "to test on; add some (2 at least, better 20), take the class away, or make folders train/ and test/ yourself"
                )
        splits = {part: splits[part] + chosen for part, chosen in parts.items()}
    if without_val:
        get_logger().warning(
            "%s: %s too few pictures for a val part, such as %r",
            where,
            counted(len(without_val), "class has", "classes have"),
            without_val[0],
        )
    return splits


# Other forms


def _read_aircraft(about: Description, folder: Path) -> Splits:
    """Read FGVC-Aircraft's lists, ``number variant`` a line, from the folder or the package."""
    names = _own_or_packaged(folder, "variants.txt", "variants.txt").split("\n")
    labels = {name.strip(): label for label, name in enumerate(names) if name.strip()}
    splits: Splits = {}
    for part in ("train", "val", "test"):
        name = f"images_variant_{part}.txt"
        lines = _own_or_packaged(folder, name, name).splitlines()
        pairs = [line.strip().split(" ", 1) for line in lines if line.strip()]
        strange = [pair for pair in pairs if pair[-1] not in labels]
        if strange:
            raise DataError(f"{name} in {folder} names {strange[0][-1]!r}, which variants.txt lacks; get both again")
        splits[part] = [Datum(str(folder / about.images / f"{number}.jpg"), labels[v], 0, v) for number, v in pairs]
    return splits


def _classnames(folder: Path) -> dict[str, str]:
    return read_classnames(_own_or_packaged(folder, "classnames.txt", "imagenet_classnames.txt"))


def _read_imagenet(about: Description, folder: Path) -> Splits:
    """Read ImageNet's class folders, or the list that CoOp keeps of them; the validation set is both val and test."""
    kept = folder / "preprocessed.pkl"
    if kept.is_file():
        lists = read_records(kept, folder, ("train", "test"))
        return {"train": lists["train"], "val": lists["test"], "test": lists["test"]}
    names = _classnames(folder)
    train, test = (_by_wnid(folder / about.images / part, names) for part in ("train", "val"))
    return {"train": train, "val": test, "test": test}


def _read_wnids(about: Description, folder: Path) -> Splits:
    """Read a variant with folders named by wnid; labels number the folders there are."""
    items = _by_wnid(folder / about.images, _classnames(folder))
    return {"train": items, "val": [], "test": items}


def _by_wnid(images: Path, names: dict[str, str]) -> list[Datum]:
    folders = [name for name in list_folder(images) if (images / name).is_dir()]
    unknown = [name for name in folders if name not in names]
    if unknown:
        raise DataError(f"{images} holds {unknown[0]!r}, which is not a class folder of ImageNet; move it away")
    return _pictures(images, [(folder, names[folder]) for folder in folders])


def _read_numbered(about: Description, folder: Path) -> Splits:
    """Read ImageNetV2, whose folders are numbered by ImageNet's classes."""
    names = list(_classnames(folder).values())
    items = _pictures(folder / about.images, [(str(label), name) for label, name in enumerate(names)])
    return {"train": items, "val": [], "test": items}


def _pictures(images: Path, folders: list[tuple[str, str]]) -> list[Datum]:
    """Return the pictures of (folder, class name) pairs, labelled in their order."""
    prefix = str(images)
    return [
        Datum(os.path.join(prefix, folder, file), label, 0, name)
        for label, (folder, name) in enumerate(folders)
        for file in list_folder(images / folder)
    ]


#: Kind of a description -> its reader.
READERS: dict[str, Callable[[Description, Path], Splits]] = {
    "split": _read_split,
    "folder-split": _read_folder_split,
    "aircraft": _read_aircraft,
    "imagenet": _read_imagenet,
    "wnids": _read_wnids,
    "numbered": _read_numbered,
}
