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
_METHODS = {"ZeroshotCLIP": "CLIP", "VPT": "Deep Vision Prompting", "TwoSFS": "2SFS", "PLOTpp": "PLOT++"}
_DATASETS = {"OxfordFlowers": "Flowers102", "DescribableTextures": "DTD"}
#: What the papers' averages are over, in our names.
_ELEVEN = (
    *("ImageNet", "Caltech101", "OxfordPets", "StanfordCars", "OxfordFlowers", "Food101", "FGVCAircraft", "SUN397"),
    *("DescribableTextures", "EuroSAT", "UCF101"),
)
_PROTOCOLS = {
    "base to new": "base-to-new",
    "all classes": "few-shot",
    "cross data set": "cross-dataset",
    "domain generalization": "domain generalization",
}
_AVERAGES = {
    "base-to-new": {*_ELEVEN},
    "few-shot": {*_ELEVEN},
    "cross-dataset": {*_ELEVEN} - {"ImageNet"},
    "domain generalization": {"ImageNetV2", "ImageNetSketch", "ImageNetA", "ImageNetR"},
}
_PARTS = {"base": "base", "new": "new", "h": "hmean", "test": "test"}

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
        row.published = {part: float(first[column]) for part, column in _PARTS.items() if first.get(column)}
        row.origin = first["source"]
        name = f"{row.method} on {row.dataset}"
        for other in others:
            numbers = {part: float(other[column]) for part, column in _PARTS.items() if other.get(column)}
            if any(abs(number - row.published.get(part, number)) > 0.005 for part, number in numbers.items()):
                shown = " / ".join(f"{number:.2f}" for number in numbers.values())
                notes.append(f"{name}: {other['source']} prints {shown} instead")
    compared = sorted({row.origin for row in rows if row.origin})
    if not compared:
        return ["--published: no published number for these methods, data sets, shots and backbones"]
    whole = {_key(row)[1] for row in rows if _key(row)[2:] == ("average", "ViT-B/16", "16")}
    bests = [line for protocol in _AVERAGES if protocol in whole for line in best_by_league(protocol)]
    return [*(f"published numbers: {origin}" for origin in compared), *notes, *bests]


def best_by_league(protocol: str) -> list[str]:
    """Return a line for each league with its best published average (ViT-B/16, 16 shots): H, or else accuracy."""
    lines = []
    column, what = ("hmean", "H") if protocol == "base-to-new" else ("test", f"accuracy ({protocol})")
    for league in LEAGUES:
        rows = [row for row in _records() if row["league"] == league and row["protocol"] == protocol and row[column]]
        if rows:
            best = max(rows, key=lambda row: float(row[column]))
            lines.append(f"best published {what}, {league}: {best[column]} ({best['method']}, {best['source']})")
    return lines


def _key(row: Row) -> Key:
    dataset, protocol = _DATASETS.get(row.dataset, row.dataset), _PROTOCOLS.get(row.protocol, "")
    if row.averages:
        targets = {name.rpartition(" → ")[2] for name in row.averages}
        known = protocol in _AVERAGES and row.trained_on in ("", "ImageNet")
        dataset = "average" if known and targets == _AVERAGES[protocol] else ""
    return _METHODS.get(row.method, row.method), protocol, dataset, row.backbone, row.shots
