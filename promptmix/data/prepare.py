"""Brings a benchmark data set into CoOp's folder layout: downloads, unpacks, adds the split files."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from promptmix.data.datasets.descriptions import Description
from promptmix.data.datasets.readers import packaged_text
from promptmix.data.datasets.sources import ARCHIVES, BY_HAND, IMAGENET_FILES, Archive
from promptmix.data.download import download, unpack
from promptmix.errors import DataError
from promptmix.utils import atomic_write, get_logger

__all__ = ["prepare"]


def prepare(about: Description, root: str | os.PathLike[str], keep: bool = False) -> Path:
    """Download and unpack a data set below ``root``; what is there already is left alone.

    Args:
        about: which.
        root: ``DATASET.ROOT``; made where missing.
        keep: keep the archives after unpacking.

    Returns:
        The data set's folder.

    Raises:
        DataError: no connection, a wrong file, or a human must do something first; the message says what.
    """
    folder = Path(os.path.abspath(os.path.expanduser(root))) / about.folder
    for archive in ARCHIVES.get(about.name, ()):
        _get(archive, folder, about, keep)
    if about.name in BY_HAND and not _by_hand(about, folder):
        raise DataError(f"{about.name} can't be downloaded by a program: {BY_HAND[about.name].format(folder=folder)}")
    _add_lists(about, folder)
    return folder


def _get(archive: Archive, folder: Path, about: Description, keep: bool) -> None:
    if not archive.inside:
        try:
            download(archive.url, folder / archive.file)
        except DataError as error:
            if not archive.optional:
                raise
            get_logger().warning("%s is left out, the data set works without it: %s", archive.file, error)
        return
    goal = folder / (about.images if archive.to == "." else archive.to)
    if goal.is_dir() and any(goal.iterdir()):
        get_logger().info("%s is there already", goal)
        return
    packed = folder / archive.file
    download(archive.url, packed, archive.md5)
    get_logger().info("Unpacking %s", packed)
    # Unpacked beside its place and moved in one step: half an archive never looks like a data set.
    with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=folder) as work:
        inside = _unpacked(packed, archive, Path(work))
        if archive.to == ".":
            for entry in inside.iterdir():
                if not (folder / entry.name).exists():
                    shutil.move(entry, folder / entry.name)
        else:
            shutil.move(inside, goal)
    if not keep:
        packed.unlink()


def _unpacked(packed: Path, archive: Archive, work: Path) -> Path:
    unpack(packed, work / "outer")
    found = work / "outer"
    if archive.inner:
        unpack(found / archive.inner, work / "inner")
        found = work / "inner"
    if not (found / archive.inside).is_dir():
        raise DataError(
            f"{packed} holds no folder {archive.inside}; it is another file, remove it and run the same command again"
        )
    return found / archive.inside


def _by_hand(about: Description, folder: Path) -> bool:
    """Return whether the pictures are there; unpack ImageNet's archives where a human has put them."""
    images = folder / about.images
    if about.name != "ImageNet":
        return (folder / "cars_train").is_dir() and (folder / "cars_test").is_dir()
    if not all((images / part).is_dir() for part in ("train", "val")):
        if not all((images / name).is_file() for name in IMAGENET_FILES):
            return False
        from torchvision.datasets import ImageNet

        try:
            for part in ("train", "val"):
                get_logger().info("Unpacking ImageNet's %s pictures in %s", part, images)
                ImageNet(str(images), split=part)
        except (ImportError, RuntimeError, OSError) as error:
            raise DataError(
                f"ImageNet's archives in {images} can't be unpacked ({error}); fix that and run this again"
            ) from error
    return True


def _add_lists(about: Description, folder: Path) -> None:
    """Put split file and class names where CoOp's own code looks for them too."""
    lists: dict[str, str] = {}
    if about.kind == "split":
        lists[about.split_file] = f"{about.split_file}.gz"
    elif about.kind in ("imagenet", "wnids", "numbered"):
        lists["classnames.txt"] = "imagenet_classnames.txt"
    if about.name == "OxfordFlowers":
        lists["cat_to_name.json"] = "cat_to_name.json"
    for name, packaged in lists.items():
        if not (folder / name).exists():
            text = packaged_text(packaged)
            atomic_write(folder / name, lambda path, text=text: path.write_text(text, encoding="utf-8") and None)  # type: ignore[misc]
