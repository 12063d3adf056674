"""``promptmix data list | check NAME | prepare NAME | sample DIR``: what there is, whether it is whole, how to get it."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from promptmix.commands.train import split_arguments
from promptmix.errors import UserError
from promptmix.files.text import harmless, one_line
from promptmix.registry import closest

if TYPE_CHECKING:
    from promptmix.data.check import Report
    from promptmix.data.datasets.descriptions import Description

__all__ = ["add_arguments", "run", "split_arguments"]

ACTIONS = ("list", "check", "prepare", "sample")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add = parser.add_argument
    add("action", choices=ACTIONS, help="list; check a folder; download and unpack a data set; write pictures to try")
    add("name", nargs="?", default="", metavar="NAME", help="a data set, see `promptmix data list`; sample: a folder")
    add("opts", nargs="*", metavar="KEY VALUE", help="check of your own pictures: config keys (DATASET.CSV.FILE cats.csv)")
    add("--root", default="", help="folder of the data sets")
    add("--fast", action="store_true", help="check: look at first and last bytes only, instead of decoding every picture")
    add("--all", action="store_true", help="check: name every bad picture, not only the first 20")
    add("--keep", action="store_true", help="prepare: keep the archives after unpacking")
    add("--plugin", action="append", default=[], metavar="MODULE|FILE", help="load a plugin first")


def run(args: argparse.Namespace) -> int:
    """Do what was asked; a check that finds something returns 1."""
    from promptmix.config.flags import load_plugins
    from promptmix.data.datasets.descriptions import DESCRIPTIONS
    from promptmix.registry import DATASET_REGISTRY

    for flag, action in {"fast": "check", "all": "check", "keep": "prepare"}.items():
        if getattr(args, flag) and args.action != action:
            raise UserError(f"--{flag} is for data {action}, not for data {args.action}; leave it out")
    if args.action == "list" and (args.name or args.opts):
        raise UserError(f"data list takes no NAME and no config keys, but got {args.name or args.opts[0]}; leave it out")
    if args.action == "sample" and args.opts:
        raise UserError(f"data sample takes a folder alone, but got {' '.join(args.opts)} too; leave it out")
    load_plugins(args.plugin)
    if args.action == "list":
        return _list(args.root)
    if args.action == "sample":
        return _sample(args.name)
    if args.name not in DATASET_REGISTRY:
        names = DATASET_REGISTRY.registered_names()
        raise UserError(f"data {args.action}: name a data set{closest(args.name, names)} (choices: {', '.join(names)})")
    about = DESCRIPTIONS.get(args.name)
    if about and args.opts:
        raise UserError(f"data {args.action} {args.name} takes no config keys, but got {' '.join(args.opts)}; remove them")
    if about and not args.root:
        raise UserError(f"data {args.action} {args.name}: --root is missing; name the folder that holds {about.folder}/, or will")
    if args.action == "prepare":
        if about is None:
            raise UserError(f"data prepare: {args.name} needs no download; see `promptmix data list`")
        return _prepare(about, args.root, args.keep)
    return _check(about, args) if about else _check_other(args)


def _list(root: str) -> int:
    """Print every registered data set; with a root, whether its folder is there."""
    from tabulate import tabulate

    from promptmix.data.datasets.descriptions import DESCRIPTIONS
    from promptmix.data.datasets.sources import ARCHIVES
    from promptmix.registry import DATASET_REGISTRY

    rows: list[list[str]] = []
    for name in [*DESCRIPTIONS, *(name for name in DATASET_REGISTRY if name not in DESCRIPTIONS)]:
        about = DESCRIPTIONS.get(name)
        if about is None:
            summary = (DATASET_REGISTRY.get(name).__doc__ or "").strip().partition("\n")[0]
            rows.append([name, "", "", "", summary, *([""] if root else [])])
            continue
        sizes = " / ".join(f"{count:,}" for count in about.expected.values())
        how = "data prepare" if name in ARCHIVES else "by hand, see data prepare"
        there = (Path(os.path.expanduser(root)) / about.folder / about.images).is_dir()
        rows.append(
            [
                name,
                f"{about.folder}/",
                sizes,
                str(about.classes),
                f"{how}; {about.terms}",
                *(["yes" if there else "no"] if root else []),
            ]
        )
    headers = ["Data set", "Folder", "Pictures", "Classes", "How to get it; terms", *(["There"] if root else [])]
    sys.stdout.write(tabulate(rows, headers=headers, disable_numparse=True) + "\n")
    return 0


def _sample(name: str) -> int:
    """Write some of the embedded pictures, a folder for each class."""
    from promptmix.data.datasets.emoji import SAMPLE, write_sample

    if not name:
        raise UserError("data sample: name the folder to write the pictures to")
    count = write_sample(Path(name))
    sys.stdout.write(f"{count} pictures of {len(SAMPLE)} classes in {harmless(name)} (OpenMoji, CC BY-SA 4.0)\n")
    return 0


def _prepare(about: Description, root: str, keep: bool) -> int:
    from promptmix.data.check import check
    from promptmix.data.prepare import prepare

    sys.stdout.write(f"{about.name}: {about.terms}\n")
    folder = prepare(about, root, keep)
    sys.stdout.write(f"{folder} is ready; checking it\n")
    return _show(about, check(about, root, decode=False), everything=False)


def _check(about: Description, args: argparse.Namespace) -> int:
    from promptmix.data.check import check

    return _show(about, check(about, args.root, decode=not args.fast), args.all)


def _show(about: Description, report: Report, everything: bool) -> int:
    """Print a report; return 0 where all is right, else 1."""
    from tabulate import tabulate

    write = sys.stdout.write
    rows = [[part, *numbers] for part, numbers in report.counts.items()]
    write(tabulate(rows, headers=["Part", "Expected", "Found", "Bad"]) + "\n")
    if report.split:
        write(f"split: {report.split}\n")
    for finding in report.findings:
        write(f"- {one_line(finding)}\n")
    for note in report.notes:
        write(f"- as published: {note}\n" if report.ok else f"- {one_line(note)}\n")
    shown = list(report.bad.items()) if everything else list(report.bad.items())[:20]
    for path, wrong in shown:
        write(f"- {one_line(os.path.relpath(path, report.folder))}: {one_line(wrong)}\n")
    if len(shown) < len(report.bad):
        write(f"- and {len(report.bad) - len(shown):,} more bad pictures; --all names them\n")
    write(f"{about.name}: {'all right' if report.ok else 'not right'} ({report.folder})\n")
    return 0 if report.ok else 1


def _check_other(args: argparse.Namespace) -> int:
    """Build any other data set, which refuses what it can't read, then decode its pictures."""
    from promptmix.config.flags import make_config
    from promptmix.data import build_dataset
    from promptmix.data.leaks import find_leaks
    from promptmix.data.reading.pictures import decode_problem, find_bad, quick_problem

    cfg = make_config([], {"NAME": ("DATASET.NAME", args.name), "--root": ("DATASET.ROOT", args.root)}, args.opts)
    with _warnings() as said:
        dataset = build_dataset(cfg)
    parts = {"train": dataset.train_x, "val": dataset.val or [], "test": dataset.test or []}
    bad = find_bad((item.impath for items in parts.values() for item in items), quick_problem if args.fast else decode_problem)
    leaks = find_leaks(parts)
    said += [leak for leak in leaks if not any(leak in line for line in said)]  # a data set may have said them itself
    for line in said:
        sys.stdout.write(f"- {one_line(line)}\n")
    for path, wrong in list(bad.items())[: None if args.all else 20]:
        sys.stdout.write(f"- {one_line(path)}: {one_line(wrong)}\n")
    sizes = ", ".join(f"{part} {len(items):,}" for part, items in parts.items())
    state = f"{len(bad):,} bad pictures" if bad else "see above" if said else "all right"
    sys.stdout.write(f"{args.name}: {dataset.num_classes} classes, {sizes}; {state}\n")
    return 1 if bad or leaks else 0


@contextlib.contextmanager
def _warnings() -> Iterator[list[str]]:
    """Collect what is warned of, in place of printing it."""
    from promptmix.utils import get_logger

    said: list[str] = []

    def collect(record: logging.LogRecord) -> bool:
        if record.levelno >= logging.WARNING:
            said.append(record.getMessage())
        return record.levelno < logging.WARNING

    logger = get_logger()
    logger.addFilter(collect)
    try:
        yield said
    finally:
        logger.removeFilter(collect)
