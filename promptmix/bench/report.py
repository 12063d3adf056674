"""Tables and JSON files of measurements, and the comparison of two of them."""

from __future__ import annotations

import os
import platform
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from promptmix.bench.measure import Cost, Row
from promptmix.errors import UserError
from promptmix.files.text import one_line
from promptmix.runs.results import git_commit
from promptmix.utils import collect_env_info, read_json, write_json

_HEADERS = ("work", "way", "seconds", "times faster", "peak MiB", "live MiB", "GFLOP", "GFLOP / minimum")
#: Where pictures are read: the processor's seconds of this process, and pictures in each of them.
_READING = ("processor s", "pictures / processor s", "times as many")


def table(rows: list[Row], form: str = "github") -> str:
    """Return a table with a line for each way of each piece of work."""
    lines: list[list[Any]] = []
    reading = any(row.pictures for row in rows)
    for row in rows:
        first = next(iter(row.ways.values()))
        for i, (way, cost) in enumerate(row.ways.items()):
            faster = first.seconds / cost.seconds if first.seconds and cost.seconds and i else None
            over = cost.gflops / row.minimum_gflops if row.minimum_gflops and cost.gflops else None
            numbers = [cost.seconds, faster, cost.memory_mb, cost.live_mb or None, cost.gflops or None, over]
            rates = _rates(row, first, cost) if reading else []
            lines.append([row.work if i == 0 else "", way, *numbers, *rates])
    headers = _HEADERS + (_READING if reading else ())
    return tabulate(
        lines, headers, tablefmt=form, floatfmt=("", "", ".3f", ".1f", ".0f", ".0f", ".1f", ".2f", ".3f", ".0f", ".2f")
    )


def _rates(row: Row, first: Cost, cost: Cost) -> list[float | None]:
    """Return what ``_READING`` heads."""
    if not (row.pictures and cost.cpu_seconds and first.cpu_seconds):
        return [None, None, None]
    return [cost.cpu_seconds, row.pictures / cost.cpu_seconds, first.cpu_seconds / cost.cpu_seconds]


def write(args: Namespace, rows: list[Row], path: str) -> None:
    """Write measurements with what they were made on."""
    write_record(args, [asdict(row) for row in rows], path)


def write_record(args: Namespace, results: object, path: str) -> None:
    """Write any results with command, commit, machine and versions."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None  # Windows has none
    record = {
        "command": " ".join(["promptmix", *_sizes_of(args.argv)]),
        "commit": git_commit(),
        "machine": {
            "kind": platform.machine(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "load_at_end": None if load is None else round(load, 1),
        },
        "versions": collect_env_info(),
        "results": results,
    }
    write_json(record, Path(path))


def _sizes_of(argv: list[str]) -> list[str]:
    """Return the arguments without those that say where the numbers go."""
    kept, rest = [], iter(argv)
    for word in rest:
        if word == "--json":
            next(rest, None)
        elif word != "--debug" and not word.startswith("--json="):
            kept.append(word)
    return kept


def read(path: str) -> list[Row]:
    """Read what ``write`` wrote.

    Raises:
        UserError: it is another kind of file.
    """
    try:
        found = []
        for row in read_json(path)["results"]:
            ways = {one_line(name): Cost(**cost) for name, cost in row["ways"].items()}
            sizes = row["minimum_gflops"], row.get("pictures")  # files from before lack the second
            found.append(Row(one_line(row["work"]), ways, *sizes))
            given = [*sizes, *(number for cost in ways.values() for number in asdict(cost).values())]
            if not ways or any(type(number) not in (int, float, type(None)) for number in given):
                raise TypeError(f"the numbers of {row['work']!r:.60} are none")
        return found
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not from `promptmix bench --json` ({type(error).__name__}: {error}); name one") from error


def compare(old: list[Row], new: list[Row], form: str = "github") -> str:
    """Return a table of new over old for everything that both measured."""
    before = {(row.work, way): cost for row in old for way, cost in row.ways.items()}
    lines: list[list[Any]] = []
    for row in new:
        for way, cost in row.ways.items():
            other = before.get((row.work, way))
            if other is not None:
                pairs = [(getattr(other, name), getattr(cost, name)) for name in ("seconds", "memory_mb", "live_mb", "gflops")]
                lines.append([row.work, way, *(b / a if a and b else None for a, b in pairs)])
    if not lines:
        raise UserError("the two files have no piece of work in common; measure the same suite with the same sizes")
    headers = ("work", "way", "seconds", "peak memory", "live memory", "FLOP")
    return "new / old, below 1 is better\n" + tabulate(lines, headers, tablefmt=form, floatfmt=".3f")
