"""Compares a data set's folder with what it should hold."""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from promptmix.data.datasets.descriptions import Description
from promptmix.data.datasets.readers import Splits, dataset_folder, packaged_rows, read_splits
from promptmix.data.datum import Datum
from promptmix.data.fewshot import load_split
from promptmix.data.leaks import find_leaks
from promptmix.data.reading.pictures import decode_problem, find_bad, quick_problem
from promptmix.data.records import FOLDER, read_records
from promptmix.errors import DataError
from promptmix.files.text import counted

__all__ = ["Report", "check"]

Row = tuple[str, int, str]


@dataclass
class Report:
    """What ``check`` found.

    Attributes:
        folder: the data set's folder.
        counts: part -> (expected, found, bad) pictures.
        split: where the split came from.
        findings: what is wrong, one line each.
        bad: path of a picture -> what is wrong with it.
        notes: copies of pictures, which are the authors' own where nothing else is wrong.
    """

    folder: Path
    counts: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    split: str = ""
    findings: list[str] = field(default_factory=list)
    bad: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.findings and not self.bad


def check(about: Description, root: str | os.PathLike[str], decode: bool = True) -> Report:
    """Check a benchmark data set: its split, its classes, and every picture.

    Args:
        about: which.
        root: ``DATASET.ROOT``.
        decode: read every picture whole; otherwise only look at its first and last bytes.

    Raises:
        DataError: there is no such folder, or its split file is of another form.
    """
    report = Report(dataset_folder(about, root))
    splits = read_splits(about, root)
    parts = ("test",) if about.test_only else tuple(about.expected)
    _check_split(about, report, splits)
    _check_labels(about, report, {part: splits[part] for part in parts})
    _check_kept(report, splits)
    report.notes = find_leaks({part: splits[part] for part in parts})
    paths = [item.impath for part in parts for item in splits[part]]
    report.bad = find_bad(paths, decode_problem if decode else quick_problem)
    for part in parts:
        expected, found = about.expected[part], len(splits[part])
        report.counts[part] = (expected, found, sum(item.impath in report.bad for item in splits[part]))
        if found != expected:
            report.findings.append(f"{part} has {counted(found, 'picture')}, {expected:,} expected")
    return report


def _check_split(about: Description, report: Report, splits: Splits) -> None:
    """Say where the split comes from, and how one in the folder differs from CoOp's."""
    path = report.folder / about.split_file
    if about.kind == "folder-split" and not path.is_file():
        report.split = f"made here; CoOp's {about.split_file} is missing, so numbers differ a little from published ones"
    if about.kind != "split":
        return
    report.split = f"{path}" if path.is_file() else f"{about.split_file} of the package"
    if not path.is_file():
        return
    theirs = packaged_rows(about.split_file)
    prefix = str(report.folder / about.images)
    for part in ("train", "val", "test"):
        here = [(os.path.relpath(item.impath, prefix), item.label, item.classname) for item in splits[part]]
        there = [(row[0], row[1], row[2]) for row in theirs[part]]
        if here != there:
            wrong = f"wrong split: {part} in {path.name} is not CoOp's ({_difference(here, there)})"
            report.findings.append(f"{wrong}; remove the file to use the packaged one")


def _difference(here: list[Row], there: list[Row]) -> str:
    extra, lacking = set(here) - set(there), set(there) - set(here)
    if not extra and not lacking:
        return "the same rows in another order, which draws other few-shot pictures"
    example = min(extra or lacking)
    return f"{len(extra)} rows more, {len(lacking)} fewer, such as {example[0]} as {example[2]!r} with label {example[1]}"


def _check_labels(about: Description, report: Report, splits: Splits) -> None:
    names: dict[int, set[str]] = defaultdict(set)
    for items in splits.values():
        for item in items:
            names[item.label].add(item.classname)
    for label, found in sorted(names.items()):
        if len(found) > 1:
            report.findings.append(f"label {label} has several class names: {', '.join(sorted(found))}")
    if len(names) != about.classes:
        report.findings.append(f"{len(names)} classes, {about.classes} expected")
    seen: dict[str, str] = {}
    shared: list[str] = []
    for part, items in splits.items():
        shared += [item.impath for item in items if seen.setdefault(item.impath, part) != part]
    if shared:
        report.findings.append(
            f"{counted(len(shared), 'picture is', 'pictures are')} in two parts of the split, such as {shared[0]}"
        )


def _check_kept(report: Report, splits: Splits) -> None:
    """Check the few-shot files: readable, and of pictures that the split trains on."""
    known: dict[str, set[str]] = {part: {item.impath for item in splits[part]} for part in ("train", "val")}
    folder = report.folder / FOLDER
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        try:
            kept = _kept(path, report.folder)
        except DataError as error:
            report.findings.append(str(error))
            continue
        strange = [item.impath for part, items in kept.items() for item in items if item.impath not in known.get(part, ())]
        if strange:
            report.findings.append(
                f"{path} holds {counted(len(strange), 'picture')} that the split does not, such as {strange[0]}; remove it"
            )


def _kept(path: Path, folder: Path) -> dict[str, list[Datum]]:
    if path.suffix == ".json":
        return load_split(path, folder)
    if path.suffix != ".pkl":
        return {}
    try:
        return read_records(path, folder, ("train", "val"))
    except DataError:
        return read_records(path, folder, ("train",))  # ImageNet's have no val
