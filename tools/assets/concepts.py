"""The table of concepts: names, tags, subgroups, which are novel, which family; and the fixed split of the families."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from assets.render import COMPLETE_STYLES, key_of, load_style
from assets.sources import reader

NOVEL_SHARE = 0.12
MIN_FAMILY = 12
VAL_PER_FAMILY = 2
SEED = 20
FAMILIES = json.loads((Path(__file__).parent / "families.json").read_text())


@dataclass(frozen=True)
class Concept:
    """One emoji without skin tone."""

    hexcode: str
    label: str
    tags: tuple[str, ...]
    group: str
    subgroup: str
    novel: bool = False
    family: str = ""


def candidates(archives: Path) -> list[Concept]:
    """Return emojibase's emoji in CLDR's order, without flags, components, skin tones and joined sequences.

    Joined sequences (with U+200D) are mostly men's and women's versions of one picture.
    """
    package = reader(archives, "emojibase")
    meta = package.json("meta/groups.json")
    rows = []
    for entry in sorted(package.json("en/data.json"), key=lambda entry: entry.get("order", 0)):
        group = meta["groups"].get(str(entry.get("group")), "")
        if group in ("", "component", "flags") or "200D" in entry["hexcode"]:
            continue
        subgroup = meta["subgroups"][str(entry["subgroup"])]
        family = FAMILIES["family_of_subgroup"].get(subgroup, "")
        tags = tuple(entry.get("tags", ()))
        rows.append(Concept(key_of(entry["hexcode"]), entry["label"], tags, group, subgroup, False, family))
    return rows


def build_concepts(archives: Path, work: Path) -> list[Concept]:
    """Keep the concepts that all complete styles draw and mark the novel ones, spread evenly over the subgroups."""
    drawn = set.intersection(*(set(load_style(work, style)) for style in COMPLETE_STYLES))
    concepts = [concept for concept in candidates(archives) if concept.hexcode in drawn]
    rng = random.Random(SEED)
    novel: set[str] = set()
    due = 0.0
    for subgroup in sorted({concept.subgroup for concept in concepts}):
        members = sorted(concept.hexcode for concept in concepts if concept.subgroup == subgroup)
        due += NOVEL_SHARE * len(members)
        # Half a subgroup at most, so that every subgroup keeps seen concepts.
        take = min(int(due), len(members) // 2)
        due -= take
        novel.update(rng.sample(members, take))
    sizes = Counter(concept.family for concept in concepts)
    rows = [
        replace(row, novel=row.hexcode in novel, family=row.family if sizes[row.family] >= MIN_FAMILY else "") for row in concepts
    ]
    text = json.dumps([asdict(row) for row in rows], ensure_ascii=False)
    (work / "concepts.json").write_text(text, encoding="utf-8")
    print(f"{len(rows)} concepts, {len(novel)} novel, {len({row.family for row in rows} - {''})} families")
    return rows


def load_concepts(work: Path) -> list[Concept]:
    """Return the table that ``build_concepts`` wrote."""
    rows = json.loads((work / "concepts.json").read_text(encoding="utf-8"))
    return [Concept(**{**row, "tags": tuple(row["tags"])}) for row in rows]


def split_families(concepts: list[Concept]) -> dict[str, dict[str, list[str]]]:
    """Split each family by concept: two for validation, the others in halves for shots and test.

    Returns:
        ``{"train" | "val" | "test": {family: hexcodes}}``, without a concept in two of them.
    """
    rng = random.Random(SEED)
    split: dict[str, dict[str, list[str]]] = {"train": {}, "val": {}, "test": {}}
    for family in sorted({concept.family for concept in concepts} - {""}):
        members = sorted(concept.hexcode for concept in concepts if concept.family == family)
        rng.shuffle(members)
        half = len(members) // 2
        split["val"][family] = sorted(members[:VAL_PER_FAMILY])
        split["train"][family] = sorted(members[VAL_PER_FAMILY : half + (VAL_PER_FAMILY + 1) // 2])
        split["test"][family] = sorted(members[half + (VAL_PER_FAMILY + 1) // 2 :])
    return split
