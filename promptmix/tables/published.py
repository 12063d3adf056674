"""Published numbers beside ours: only where method, data set, protocol, shots and backbone are the same.

The numbers are in ``data/published_results.csv``, with their origin in ``data/published_results.md``. Settings other than
those are the authors' own; a row of ours is compared whatever its schedule was.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterable
from functools import cache
from importlib.resources import files

from promptmix.engine.league import LEAGUES
from promptmix.tables.rows import Row

#: Our name to the papers', where they differ.
_METHODS = {"ZeroshotCLIP": "CLIP", "VPT": "Deep Vision Prompting", "TwoSFS": "2SFS"}
_DATASETS = {"OxfordFlowers": "Flowers102", "DescribableTextures": "DTD"}
#: What the papers' average is over, in our names.
_ELEVEN = (
    *("ImageNet", "Caltech101", "OxfordPets", "StanfordCars", "OxfordFlowers", "Food101", "FGVCAircraft", "SUN397"),
    *("DescribableTextures", "EuroSAT", "UCF101"),
)
_PROTOCOLS = {"base to new": "base-to-new"}
_PARTS = {"base": "base", "new": "new", "h": "hmean"}

Key = tuple[str, ...]


@cache
def _records() -> list[dict[str, str]]:
    """Return the best published averages, each with its league."""
    text = files("promptmix").joinpath("data/published_records.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


@cache
def _table() -> dict[Key, list[dict[str, str]]]:
    """Return the published rows by method, protocol, data set, backbone and shots, in the order of the file."""
    found: dict[Key, list[dict[str, str]]] = defaultdict(list)
    text = files("promptmix").joinpath("data/published_results.csv").read_text(encoding="utf-8")
    for row in csv.DictReader(text.splitlines()):
        if row["backbone"] and row["shots"]:
            found[row["method"], row["protocol"], row["dataset"], row["backbone"], row["shots"]].append(row)
    for row in _records():
        if row["protocol"] == "base-to-new":
            found[row["method"], row["protocol"], "average", "ViT-B/16", "16"].append(row)
    return dict(found)


def add(rows: Iterable[Row]) -> list[str]:
    """Give each row the published numbers that it can be compared with.

    Args:
        rows: rows of a table, averages included; ``published`` and ``origin`` are set.

    Returns:
        Notes: what the numbers were read from, where publications disagree, and that nothing could be compared.
    """
    notes: list[str] = []
    for row in rows:
        candidates = _table().get(_key(row), [])
        if not candidates:
            continue
        first, *others = candidates
        row.published = {part: float(first[column]) for part, column in _PARTS.items() if first[column]}
        row.origin = first["source"]
        name = f"{row.method} on {row.dataset}"
        for other in others:
            numbers = {part: float(other[column]) for part, column in _PARTS.items() if other[column]}
            if any(abs(number - row.published.get(part, number)) > 0.005 for part, number in numbers.items()):
                shown = " / ".join(f"{number:.2f}" for number in numbers.values())
                notes.append(f"{name}: {other['source']} prints {shown} instead")
    compared = sorted({row.origin for row in rows if row.origin})
    if not compared:
        return ["--published: no published number for these methods, data sets, shots and backbones"]
    whole = any(_key(row)[1:] == ("base-to-new", "average", "ViT-B/16", "16") for row in rows)
    return [*(f"published numbers: {origin}" for origin in compared), *notes, *(best_by_league() if whole else [])]


def best_by_league() -> list[str]:
    """Return a line for each league with its best published H over the 11 data sets (base to new, ViT-B/16, 16 shots)."""
    lines = []
    for league in LEAGUES:
        rows = [row for row in _records() if row["league"] == league and row["protocol"] == "base-to-new" and row["hmean"]]
        if rows:
            best = max(rows, key=lambda row: float(row["hmean"]))
            lines.append(f"best published H, {league}: {best['hmean']} ({best['method']}, {best['source']})")
    return lines


def _key(row: Row) -> Key:
    dataset = _DATASETS.get(row.dataset, row.dataset)
    if row.averages:
        dataset = "average" if set(row.averages) == set(_ELEVEN) else ""
    return _METHODS.get(row.method, row.method), _PROTOCOLS.get(row.protocol, ""), dataset, row.backbone, row.shots
