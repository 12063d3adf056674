"""Your own pictures without code: ``ImageFolder`` reads class folders, ``CSV`` a table of paths and labels."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from PIL import Image
from yacs.config import CfgNode

from promptmix.config import get_key, sources
from promptmix.config.checks import check_templates
from promptmix.config.declare import Setting, all_defaults, declare, shown
from promptmix.data.assemble import AssembledDataset, renumbered
from promptmix.data.base import require_folder
from promptmix.data.datasets.readers import read_classnames, shuffled_split
from promptmix.data.datasets.tables import Cells, read_table
from promptmix.data.datum import Datum
from promptmix.data.leaks import alike, find_leaks
from promptmix.data.templates import groups_of
from promptmix.errors import ConfigError, DataError
from promptmix.files.text import counted, is_name
from promptmix.hookspecs import hookimpl
from promptmix.registry import register
from promptmix.utils import get_logger, read_text

PARTS = ("train", "val", "test")
#: What folders of the parts are called.
_PART_FOLDERS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
#: Formats of cameras and drawings that Pillow does not read by itself.
_UNREAD_PICTURES = {".heic", ".heif", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".svg", ".jxl"}
#: What folders come packed in.
_ARCHIVES = {".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar"}

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
            raise DataError(
                f"no pictures in classes in {where}; ImageFolder reads CLASS/a.jpg or train/CLASS/a.jpg, CSV rows path,label"
            )
        _refuse_unreadable_names(found, names)
        self.domains = sorted({domain for _, domain, _, _ in found})
        self.templates = list(node.TEMPLATES)
        self.template_groups = groups_of(self.templates)
        labels = {label: number for number, label in enumerate(_in_order({label for _, _, label, _ in found}))}

        def datum(entry: Found) -> Datum:
            _, domain, label, path = entry
            return Datum(path, labels[label], self.domains.index(domain), names.get(label, label))

        given = {part: [datum(entry) for entry in found if entry[0] == part] for part in PARTS}
        self.comes_in_parts = any(entry[0] for entry in found)
        if self.comes_in_parts:
            key = next((key for key, by in sources(cfg).items() if ".SPLIT_" in key and by == "command line"), "")
            if key:
                raise ConfigError(f"{key} (set by command line) would be ignored, since {where} comes in parts; leave it out")
            # Without a test part the validation part is what is tested, as with ImageNet.
            splits = given | {"test": given["test"] or given["val"]}
        else:
            splits = self._split([datum(entry) for entry in found], node, where)
        self.all_tested = splits["train"] is splits["test"]
        splits = self._choose_domains(cfg, splits)
        _refuse_unusable(splits, where)
        # Some domains may lack a class: labels count those that are trained on.
        present = {label: place for place, label in enumerate(sorted({item.label for item in splits["train"]}))}
        splits = {part: renumbered([i for i in items if i.label in present], present) for part, items in splits.items()}
        super().__init__(cfg, splits, remedy=f"check {where}")
        if len(present) < 2:
            only = splits["train"][0].classname
            raise DataError(
                f"{where} has one class, {only!r}, so there is nothing to tell apart; add a folder or label for another"
            )
        if all(item.classname.isdecimal() for item in splits["train"]):
            get_logger().warning("%s: the class names are numbers, of which a prompt can make nothing; name the classes", where)
        used = {"train": self.train_x, "val": self.val or [], "test": self.test or []}
        for finding in [] if self.all_tested else find_leaks(used):
            get_logger().warning("%s: %s", where, finding)

    @staticmethod
    def _split(items: Iterable[Datum], node: CfgNode, where: Path) -> dict[str, list[Datum]]:
        """Split each class by ``SPLIT_RATIO`` with ``SPLIT_SEED``; every domain of a class has its own share.

        With the shares (0, 0, 1) all pictures are tested, and the training part, which names the classes, is the same.

        Raises:
            ConfigError: the ratio is not three shares that add up to 1.
        """
        ratio = tuple(node.SPLIT_RATIO)
        if ratio == (0, 0, 1):
            whole = list(items)
            return {"train": whole, "val": [], "test": whole}
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


def _refuse_unreadable_names(found: list[Found], names: dict[str, str]) -> None:
    for _, domain, label, path in found:
        for name in filter(None, (domain, names.get(label, label))):
            if not is_name(name):
                raise DataError(f"{ascii(path)}: its class or domain {ascii(name)} is not UTF-8 text that can be seen; rename it")


def _refuse_unusable(splits: dict[str, list[Datum]], where: Path) -> None:
    """Refuse parts that nothing can be learned from or tested on, and classes that a prompt can't tell apart."""
    for part in ("train", "test"):
        if not splits[part]:
            raise DataError(f"{where} has no {part} pictures; add some, or put all into one folder or list that is split")
    twins = alike(item.classname for items in splits.values() for item in items)
    if twins:
        raise DataError(
            f"{where}: {len(twins)} class names appear more than once but for case or underscores, such as "
            f"{' and '.join(map(repr, twins[0]))}, which no prompt can tell apart; put them together or rename one"
        )
    trained, tested = ({item.classname for item in splits[part]} for part in ("train", "test"))
    if strange := sorted(tested - trained):
        raise DataError(f"{where}: class {strange[0]!r} has test but no training pictures; add some or move it away")


def _in_order(labels: Iterable[str]) -> list[str]:
    """Return labels sorted: by number where all are numbers, otherwise as text."""
    found = sorted(labels)
    return sorted(found, key=int) if all(label.isdecimal() for label in found) else found


@register
class ImageFolder(_Own):
    """Folders named by class below ``train/``, ``val/`` and ``test/``, or class folders alone, which are split.

    The pictures of a class may lie in folders of its folder, at any depth (``bird/2023/may/1.jpg``).

    With ``DATASET.IMAGEFOLDER.DOMAINS``, class folders lie in folders named by domain (``train/photo/cat``, ``sketch/dog``).
    """

    def __init__(self, cfg: CfgNode) -> None:
        node = cfg.DATASET.IMAGEFOLDER
        if not cfg.DATASET.ROOT:
            raise DataError("data set ImageFolder: DATASET.ROOT is not set; set --root to the folder with your class folders")
        where = require_folder(os.path.join(cfg.DATASET.ROOT, node.FOLDER) if node.FOLDER else cfg.DATASET.ROOT, "ImageFolder")
        parts = _parts(where)
        found = [entry for part, above in parts.items() for entry in _folders(above, part, node.DOMAINS)]
        _say_left_out(where, parts, found)
        if not node.DOMAINS:
            _say_if_domains(where, found)
        names: dict[str, str] = {}
        if node.CLASSNAMES:
            names = read_classnames(_text(where / node.CLASSNAMES, "DATASET.IMAGEFOLDER.CLASSNAMES"))
            if not names.keys() & {label for _, _, label, _ in found}:
                raise ConfigError(
                    f"DATASET.IMAGEFOLDER.CLASSNAMES {node.CLASSNAMES} names none of the class folders in {where}; "
                    "its lines must be: folder class name"
                )
        super().__init__(cfg, node, found, names, where)


def _parts(where: Path) -> dict[str, Path]:
    """Return part -> folder of what is divided, else "" -> ``where``."""
    parts = _part_folders(where)
    if "train" not in parts:
        return {"": where}
    if len(parts) == 1:
        # A lone `train` may be a class of that name. It is a part if it holds class folders and nothing lies beside it.
        others = [entry for entry in _entries(where) if entry.is_dir() and entry.path != str(parts["train"])]
        if others or any(not entry.is_dir() and _is_picture(entry.name) for entry in _entries(parts["train"])):
            return {"": where}
    return {part: parts[part] for part in PARTS if part in parts}


def _part_folders(where: Path) -> dict[str, Path]:
    """Return part -> folder, however its name is capitalised."""
    if not where.is_dir():
        return {}
    folders = {entry.name.lower(): where / entry.name for entry in _entries(where) if entry.is_dir()}
    return {part: folders[name] for part, names in _PART_FOLDERS.items() for name in names if name in folders}


def _folders(above: Path, part: str, domains: bool) -> list[Found]:
    """Return the pictures of class folders at any depth, or of class folders in domain folders."""
    if domains:
        names = [entry.name for entry in _entries(above) if entry.is_dir()]
        return [(part, name, *entry[2:]) for name in names for entry in _folders(above / name, part, False)]
    return [
        (part, "", folder.name, path)
        for folder in _entries(above)
        if folder.is_dir()
        for path in _below(str(above / folder.name), (os.path.realpath(folder.path),))
        if _is_picture(path)
    ]


def _below(folder: str, above: tuple[str, ...]) -> Iterator[str]:
    """Return the files below ``folder`` at any depth, sorted, without following a link into a folder that it lies in."""
    for entry in _entries(Path(folder)):
        if not entry.is_dir():
            yield os.path.join(folder, entry.name)
            continue
        real = os.path.realpath(entry.path)
        if real not in above:
            yield from _below(os.path.join(folder, entry.name), (*above, real))


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """Return what lies in ``folder`` by name, without hidden entries.

    Raises:
        DataError: it can't be listed.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"can't list {folder} ({error.strerror}); check the path and DATASET.ROOT") from error


def _is_picture(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in Image.registered_extensions()


def _say_left_out(where: Path, parts: dict[str, Path], found: list[Found]) -> None:
    """Say which files below ``where`` are no picture of any class, with their number."""
    taken = {path for *_, path in found}
    left = [path for path in _below(str(where), (os.path.realpath(where),)) if path not in taken]
    loose = [path for path in left if _is_picture(path)]
    other = Counter(Path(path).suffix.lower() for path in left if not _is_picture(path))
    empty = _without_pictures(parts, found) if found else []
    if empty:
        shown = ", ".join(empty[:3]) + (", ..." if len(empty) > 3 else "")
        count = counted(len(empty), "folder holds no picture and is no class", "folders hold no picture and are no classes")
        get_logger().warning("%s: %s: %s", where, count, shown)
    if loose:
        inside = f"below {', '.join(folder.name for folder in parts.values())}" if "" not in parts else "in class folders"
        count = counted(len(loose), f"picture is not {inside} and is", f"pictures are not {inside} and are")
        get_logger().warning("%s: %s left out, such as %s", where, count, loose[0])
    if other:
        kinds = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in other.most_common(5))
        unread = sorted(set(other) & _UNREAD_PICTURES)
        remedy = f"; save {' and '.join(unread)} as .jpg or .png to have them read" if unread else ""
        log = get_logger().warning if unread else get_logger().info
        log(
            "%s: %s of no picture format that is read here, left out (%s)%s",
            where,
            counted(other.total(), "file is", "files are"),
            kinds,
            remedy,
        )


def _without_pictures(parts: dict[str, Path], found: list[Found]) -> list[str]:
    """Return those folders that stand where class folders do and hold no picture."""
    full = {(part, name) for part, domain, label, _ in found for name in (domain, label)}
    above = [(part, folder) for part, folder in parts.items() if part in ("", "train")]
    return [
        str(folder / entry.name)
        for part, folder in above
        for entry in _entries(folder)
        if entry.is_dir() and (part, entry.name) not in full
    ]


def _say_if_domains(where: Path, found: list[Found]) -> None:
    """Warn where every class folder holds the same folders and nothing else: these may be the classes, in domains."""
    inside: dict[str, set[str]] = {}
    for part, _, label, path in found:
        below = Path(path).relative_to(where).parts
        inside.setdefault(label, set()).add(below[1 + bool(part)] if len(below) > 2 + bool(part) else "")
    same = set.intersection(*inside.values()) if len(inside) > 1 else set()
    if len(same) > 1 and "" not in same:
        get_logger().warning(
            "%s: the folders %s each hold %s; they are read as the classes %s. If those inside are the classes, set "
            "DATASET.IMAGEFOLDER.DOMAINS True",
            where,
            ", ".join(list(inside)[:3]),
            ", ".join(sorted(same)[:3]),
            ", ".join(list(inside)[:3]),
        )


@register
class CSV(_Own):
    """A table with the columns ``path`` and ``label``, and ``split`` (train, val, test) and ``domain`` where wanted.

    Paths are relative to the table's folder; labels are class names, numbered in alphabetical order. TSV, JSON and JSON
    Lines do as well, and ``file_name`` as Hugging Face has it. A table that is not there is looked for in the parts' folders.
    """

    def __init__(self, cfg: CfgNode) -> None:
        node = cfg.DATASET.CSV
        where = Path(os.path.abspath(os.path.expanduser(os.path.join(cfg.DATASET.ROOT, node.FILE))))
        _refuse_no_table(where)
        parts = {} if where.is_file() else _part_folders(where.parent)
        tables = {part: folder / where.name for part, folder in parts.items() if (folder / where.name).is_file()}
        found = [entry for part, table in (tables or {"": where}).items() for entry in _of_table(table, part)]
        super().__init__(cfg, node, found, {}, where)


def _of_table(where: Path, part: str) -> list[Found]:
    """Return what a table names, in one part if that is given."""
    rows = read_table(_text(where, "DATASET.CSV.FILE"), where)
    found = [_row(row, where, part) for row in rows]
    if len({bool(entry[0]) for entry in found}) > 1:
        raise DataError(f"{where}: some rows have a split and some have none; fill the column or remove it")
    _refuse_copies(list(zip((number for number, *_ in rows), (path for *_, path in found), strict=True)), where)
    return found


def _refuse_no_table(where: Path) -> None:
    """Refuse an archive or a picture in the place of a table, which can't be read as text.

    Raises:
        DataError: it is one; the message says what to name instead.
    """
    if where.suffix.lower() in _ARCHIVES:
        raise DataError(f"{where} is an archive; unpack it, and name the folder that holds a folder of pictures for each class")
    if _is_picture(where.name):
        raise DataError(f"{where} is one picture; name the folder that holds a folder of pictures for each class")


def _row(cells: Cells, where: Path, part: str) -> Found:
    number, values, odd = cells
    values = {"path": "", "label": "", "split": part, "domain": ""} | values
    if odd or values["split"] not in ("", *PARTS) or not values["path"] or not values["label"] or "\0" in values["path"]:
        raise DataError(
            f"{where}, line {number}: needs path,label and a split among train, val, test, and as many cells as the first line, "
            f"not {shown([value for value in values.values() if value])}"
        )
    path = os.path.normpath(os.path.join(where.parent, values["path"]))
    if where.parent not in Path(path).parents:
        raise DataError(
            f"{where}, line {number}: {values['path']} lies outside {where.parent}; put the table "
            "into a folder above all pictures"
        )
    return part or values["split"], values["domain"], values["label"], path


def _refuse_copies(paths: list[tuple[int, str]], where: Path) -> None:
    """Refuse a table that names a picture twice.

    Raises:
        DataError: it does; the message says in which lines.
    """
    lines: dict[str, int] = {}
    for number, path in paths:
        if path in lines:
            raise DataError(f"{where}: {path} is in line {lines[path]} and in line {number}; keep one of them")
        lines[path] = number


def _text(path: Path, key: str) -> str:
    try:
        return read_text(path)
    except DataError as error:
        raise DataError(f"{key} {error}; give a file below DATASET.ROOT (--root) or its full path") from error


@hookimpl
def extend_config(cfg: CfgNode) -> None:
    """Add ``DATASET.IMAGEFOLDER`` and ``DATASET.CSV``."""
    for name in ("IMAGEFOLDER", "CSV"):
        node = cfg.DATASET[name] = CfgNode()
        comment = "hard templates; the first is the one that methods start from"
        declare(node, "TEMPLATES", ("a photo of a {}.",), Setting(comment, items=str))
        comment = "shares of train, val and test where the pictures come without a split"
        declare(node, "SPLIT_RATIO", (0.5, 0.2, 0.3), Setting(comment, low=0, high=1, length=3))
        comment = "of that split; the run's SEED does not move it"
        declare(node, "SPLIT_SEED", 1, Setting(comment, low=0, high=2**32 - 1))
    node = cfg.DATASET.IMAGEFOLDER
    comment = 'folder of the pictures below DATASET.ROOT; "" = DATASET.ROOT itself'
    declare(node, "FOLDER", "", Setting(comment))
    declare(node, "DOMAINS", False, Setting("True: class folders lie in folders named by domain"))
    comment = 'file with lines "folder class name"; "" = the folders\' names are the classes\''
    declare(node, "CLASSNAMES", "", Setting(comment))
    declare(cfg.DATASET.CSV, "FILE", "labels.csv", Setting("the table, below DATASET.ROOT or with its full path"))


@hookimpl
def validate_config(cfg: CfgNode) -> None:
    """Refuse settings of one of the two that another data set would ignore."""
    defaults = all_defaults(cfg)
    for name in ("IMAGEFOLDER", "CSV"):
        # The record of a run (run_config.yaml) states every key, those of other data sets at their defaults.
        keys = [key for key in sources(cfg) if key.startswith(f"DATASET.{name}.") and get_key(cfg, key) != defaults[key]]
        if keys and cfg.DATASET.NAME.upper() != name:
            raise ConfigError(
                f"{keys[0]} (set by {sources(cfg)[keys[0]]}) would be ignored by data set {cfg.DATASET.NAME}; remove it"
            )
        check_templates(f"DATASET.{name}.TEMPLATES", cfg.DATASET[name].TEMPLATES)
