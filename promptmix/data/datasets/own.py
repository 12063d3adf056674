"""Your own pictures without code: ``ImageFolder`` reads class folders, ``CSV`` a table of paths and labels."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image
from yacs.config import CfgNode

from promptmix import hookimpl
from promptmix.config import sources
from promptmix.data.assemble import AssembledDataset, renumbered
from promptmix.data.base import require_folder
from promptmix.data.datasets.readers import list_folder, read_classnames, shuffled_split
from promptmix.data.datum import Datum
from promptmix.errors import ConfigError, DataError
from promptmix.registry import Registry

PARTS = ("train", "val", "test")

#: (part or "", domain, folder or label, path): one picture as found.
Found = tuple[str, str, str, str]


class _Own(AssembledDataset):
    """What both share: names, domains and splits from a list of found pictures, which are read as people see them.

    Args:
        cfg: the whole config tree.
        node: the data set's own settings.
        found: pictures in a fixed order.
        names: label -> class name, for labels whose text is not the name.
        where: the folder or file, for messages.

    Raises:
        DataError: there are no pictures, no training or no test pictures, or a class that the training part lacks.
    """

    reading = "upright"

    def __init__(self, cfg: CfgNode, node: CfgNode, found: list[Found], names: dict[str, str], where: Path) -> None:
        if not found:
            raise DataError(f"no pictures in {where}; ImageFolder reads CLASS/a.jpg or train/CLASS/a.jpg, CSV rows path,label")
        self.domains = sorted({domain for _, domain, _, _ in found})
        self.templates = list(node.TEMPLATES)
        labels = {label: number for number, label in enumerate(_in_order({label for _, _, label, _ in found}))}

        def datum(entry: Found) -> Datum:
            _, domain, label, path = entry
            return Datum(path, labels[label], self.domains.index(domain), names.get(label, label))

        given = {part: [datum(entry) for entry in found if entry[0] == part] for part in PARTS}
        if any(entry[0] for entry in found):
            # Without a test part the validation part is what is tested, as with ImageNet.
            splits = given | {"test": given["test"] or given["val"]}
        else:
            splits = self._split([datum(entry) for entry in found], node, where)
        splits = self._choose_domains(cfg, splits)
        for part in ("train", "test"):
            if not splits[part]:
                raise DataError(f"{where} has no {part} pictures; add some, or put all into one folder or list that is split")
        strange = {item.classname for item in splits["test"]} - {item.classname for item in splits["train"]}
        if strange:
            raise DataError(f"{where}: class {sorted(strange)[0]!r} has test but no training pictures; add some or move it away")
        # Some domains may lack a class: labels count those that are trained on.
        present = {label: place for place, label in enumerate(sorted({item.label for item in splits["train"]}))}
        splits = {part: renumbered([i for i in items if i.label in present], present) for part, items in splits.items()}
        super().__init__(cfg, splits, remedy=f"check {where}")

    @staticmethod
    def _split(items: Iterable[Datum], node: CfgNode, where: Path) -> dict[str, list[Datum]]:
        """Split each class by ``SPLIT_RATIO`` with ``SPLIT_SEED``; every domain of a class has its own share.

        Raises:
            ConfigError: the ratio is not three shares that add up to 1.
        """
        ratio = tuple(node.SPLIT_RATIO)
        if len(ratio) != 3 or min(ratio) < 0 or abs(sum(ratio) - 1) > 1e-6 or not ratio[0] or not ratio[2]:
            raise ConfigError(
                f"SPLIT_RATIO is {ratio}; give the shares of train, val and test, which add up to 1, such as (0.5, 0.2, 0.3)"
            )
        groups: dict[tuple[int, int], list[Datum]] = {}
        for item in items:
            groups.setdefault((item.label, item.domain), []).append(item)
        return shuffled_split(groups.values(), ratio, node.SPLIT_SEED, where)

    def _choose_domains(self, cfg: CfgNode, splits: dict[str, list[Datum]]) -> dict[str, list[Datum]]:
        """Train and validate on ``SOURCE_DOMAINS`` (default: all), test on ``TARGET_DOMAINS`` (default: the same)."""
        sources_ = list(cfg.DATASET.SOURCE_DOMAINS) or list(self.domains)
        targets = list(cfg.DATASET.TARGET_DOMAINS) or sources_
        self.is_input_domain_valid([*sources_, *targets])
        kept = {"train": sources_, "val": sources_, "test": targets}
        return {part: [item for item in items if self.domains[item.domain] in kept[part]] for part, items in splits.items()}


def _in_order(labels: Iterable[str]) -> list[str]:
    """Return labels sorted: by number where all are numbers, otherwise as text."""
    found = sorted(labels)
    return sorted(found, key=int) if all(label.isdecimal() for label in found) else found


class ImageFolder(_Own):
    """Folders named by class below ``train/``, ``val/`` and ``test/``, or one level of class folders that is split.

    With ``DATASET.IMAGEFOLDER.DOMAINS``, class folders lie in folders named by domain (``train/photo/cat``, ``sketch/dog``).
    """

    def __init__(self, cfg: CfgNode) -> None:
        node = cfg.DATASET.IMAGEFOLDER
        if not cfg.DATASET.ROOT:
            raise DataError("data set ImageFolder: DATASET.ROOT is not set; set --root to the folder with your class folders")
        where = require_folder(os.path.join(cfg.DATASET.ROOT, node.FOLDER) if node.FOLDER else cfg.DATASET.ROOT, "ImageFolder")
        parts = [part for part in PARTS if (where / part).is_dir()]
        # A lone `train` may be a class of that name.
        divided = parts[:1] == ["train"] and len(parts) > 1
        found = [entry for part in (parts if divided else [""]) for entry in _folders(where / part, part, node.DOMAINS)]
        names: dict[str, str] = {}
        if node.CLASSNAMES:
            names = read_classnames(_text(where / node.CLASSNAMES, "DATASET.IMAGEFOLDER.CLASSNAMES"))
        super().__init__(cfg, node, found, names, where)


def _folders(above: Path, part: str, domains: bool) -> list[Found]:
    """Return the pictures of class folders, or of class folders in domain folders."""
    if domains:
        names = [name for name in list_folder(above) if (above / name).is_dir()]
        return [(part, name, *entry[2:]) for name in names for entry in _folders(above / name, part, False)]
    known = Image.registered_extensions()
    return [
        (part, "", name, str(above / name / file))
        for name in list_folder(above)
        if (above / name).is_dir()
        for file in list_folder(above / name)
        if Path(file).suffix.lower() in known
    ]


class CSV(_Own):
    """A table with the columns ``path`` and ``label``, and ``split`` (train, val, test) and ``domain`` where wanted.

    Paths are relative to the table's folder; labels are class names, numbered in alphabetical order.
    """

    def __init__(self, cfg: CfgNode) -> None:
        node = cfg.DATASET.CSV
        where = Path(os.path.abspath(os.path.expanduser(os.path.join(cfg.DATASET.ROOT, node.FILE))))
        table = csv.DictReader(_text(where, "DATASET.CSV.FILE").splitlines(), skipinitialspace=True)
        missing = sorted({"path", "label"} - set(table.fieldnames or ()))
        if missing:
            raise DataError(f"{where} has no column {missing[0]!r}; its first line must be path,label[,split,domain]")
        found = [_row(row, where, number) for number, row in enumerate(table, start=2)]
        if len({bool(entry[0]) for entry in found}) > 1:
            raise DataError(f"{where}: some rows have a split and some have none; fill the column or remove it")
        super().__init__(cfg, node, found, {}, where)


def _row(row: dict[str | Any, Any], where: Path, number: int) -> Found:
    values = {key: (value or "").strip() for key, value in row.items() if isinstance(key, str) and not isinstance(value, list)}
    part = values.get("split", "")
    if part not in ("", *PARTS) or not values["path"] or not values["label"] or None in row:
        raise DataError(f"{where}, line {number}: needs path,label and a split among train, val, test, not {list(row.values())}")
    return part, values.get("domain", ""), values["label"], os.path.join(where.parent, values["path"])


def _text(path: Path, key: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise DataError(f"{key} {path}: {reason}; give a file below DATASET.ROOT (--root) or its full path") from error


@hookimpl
def extend_config(cfg: CfgNode) -> None:
    """Add ``DATASET.IMAGEFOLDER`` and ``DATASET.CSV``."""
    for name in ("IMAGEFOLDER", "CSV"):
        node = cfg.DATASET[name] = CfgNode()
        node.TEMPLATES = ("a photo of a {}.",)  # hard templates; the first is the one that methods start from
        node.SPLIT_RATIO = (0.5, 0.2, 0.3)  # shares of train, val and test where the pictures come without a split
        node.SPLIT_SEED = 1  # of that split; the run's SEED does not move it
    cfg.DATASET.IMAGEFOLDER.FOLDER = ""  # folder of the pictures below DATASET.ROOT; "" = DATASET.ROOT itself
    cfg.DATASET.IMAGEFOLDER.DOMAINS = False  # True: class folders lie in folders named by domain
    cfg.DATASET.IMAGEFOLDER.CLASSNAMES = ""  # file with lines "folder class name"; "" = the folders' names are the classes'
    cfg.DATASET.CSV.FILE = "labels.csv"  # the table, below DATASET.ROOT or with its full path


@hookimpl
def validate_config(cfg: CfgNode) -> None:
    """Refuse settings of one of the two that another data set would ignore."""
    for name in ("IMAGEFOLDER", "CSV"):
        keys = [key for key in sources(cfg) if key.startswith(f"DATASET.{name}.")]
        if keys and cfg.DATASET.NAME.upper() != name:
            raise ConfigError(
                f"{keys[0]} (set by {sources(cfg)[keys[0]]}) would be ignored by data set {cfg.DATASET.NAME}; remove it"
            )


@hookimpl
def register_datasets(registry: Registry) -> None:
    """Add both."""
    registry.register(ImageFolder)
    registry.register(CSV)
