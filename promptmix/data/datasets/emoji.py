"""The embedded data sets: emoji artwork of several artists, whose styles are domains (see ``promptmix/assets/README.md``)."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from promptmix.assets import asset_path
from promptmix.config.declare import Setting, declare, shown
from promptmix.data.base import DatasetBase
from promptmix.data.datum import Datum
from promptmix.data.fewshot import say_fewer, subsample_classes, unlabeled
from promptmix.data.reading.images import open_member
from promptmix.errors import ConfigError, OutputError
from promptmix.hookspecs import hookimpl
from promptmix.registry import register
from promptmix.utils import atomic_write

STYLES = ("openmoji_color", "openmoji_black", "fluent_3d", "fluent_high_contrast")

# Groups of similar templates; the first of each group may start an expert (MoCoOp).
TEMPLATE_GROUPS = (
    ("a photo of a {}.", "a photo of the {}.", "a bright photo of a {}.", "a close-up photo of a {}."),
    ("an emoji of a {}.", "an icon of a {}.", "a flat icon of a {}.", "a sticker of a {}."),
    ("a drawing of a {}.", "a colorful drawing of a {}.", "a cartoon of a {}."),
    ("an outline of a {}.", "a sketch of a {}.", "a black and white drawing of a {}."),
    ("a picture of a {}.", "an image of a {}."),
)

#: Classes that `promptmix data sample` writes.
SAMPLE = ("bird", "building", "clock", "clothing", "fruit", "mammal", "tool", "vehicle")

_CONCEPT_SEED = 41  # which concepts EmojiConcepts takes when it does not take all: the same ones for every run


def _read(name: str) -> dict[str, Any]:
    table: dict[str, Any] = json.loads(asset_path(f"emoji/{name}").read_text(encoding="utf-8"))
    return table


class _EmojiBase(DatasetBase):
    """What both data sets share: styles as domains, the order of the classes, templates."""

    domains = STYLES
    templates = [template for group in TEMPLATE_GROUPS for template in group]
    template_groups = [list(group) for group in TEMPLATE_GROUPS]

    def __init__(self, cfg: CfgNode, classes: Sequence[str], train: list[Datum], val: list[Datum], test: list[Datum]) -> None:
        """Draw the shots, keep the base or new classes, and note all class names.

        Args:
            cfg: The configuration.
            classes: All class names, by label.
            train: Training pictures.
            val: Validation pictures.
            test: Test pictures.
        """
        shots, without = cfg.DATASET.NUM_SHOTS, unlabeled(cfg, train)
        if shots >= 1:
            say_fewer(train, shots)
            train = self.generate_fewshot_dataset(train, num_shots=shots)  # type: ignore[assignment]
            val = self.generate_fewshot_dataset(val, num_shots=min(shots, 4))  # type: ignore[assignment]
        train, test, val = subsample_classes(train, test, val, subsample=cfg.DATASET.SUBSAMPLE_CLASSES)
        super().__init__(train_x=train, train_u=without, val=val or None, test=test)
        self.all_classnames = list(classes)
        # Made from templates, so that methods which read sentences run; they know nothing of the classes.
        self.descriptions = {name: [template.format(name) for template in self.templates] for name in classes}

    def _pictures(self, styles: Sequence[str], members: Mapping[str, Sequence[str]], classes: Sequence[str]) -> list[Datum]:
        """Return the pictures of every style, class by class.

        Args:
            styles: Names of styles.
            members: Class name -> hexcodes of its concepts.
            classes: Class names, by label.

        Raises:
            ConfigError: There is no such style.
        """
        self.is_input_domain_valid(styles)
        packs = {style: asset_path(f"emoji/{style}.zip") for style in styles}
        return [
            Datum(f"{packs[style]}::{hexcode}.webp", label, self.domains.index(style), name)
            for style in styles
            for label, name in enumerate(classes)
            for hexcode in members[name]
        ]


def write_sample(folder: Path, families: Sequence[str] = SAMPLE, style: str = "openmoji_color") -> int:
    """Write embedded pictures as files, a folder for each class, to try with what reads your own; return how many.

    Args:
        folder: is made; a picture that is there already stays.
        families: names of classes of ``EmojiFamilies``.
        style: of the pictures.

    Raises:
        OutputError: they can't be written.
    """
    others = sorted(path.name for path in folder.iterdir() if path.name not in families) if folder.is_dir() else []
    if others:
        raise OutputError(f"{folder} holds {shown(others[0])}, which is not a class of the sample; name a new folder")
    split, written = _read("families_split.json"), 0
    pack = asset_path(f"emoji/{style}.zip")
    for name in families:
        for code in sorted(code for part in split.values() if isinstance(part, dict) for code in part.get(name, ())):
            picture, file = f"{pack}::{code}.webp", folder / name / f"{code}.webp"
            if not file.exists():
                with open_member(picture) as member:
                    content = member.read()
                atomic_write(file, partial(Path.write_bytes, data=content))
            written += 1
    return written


def _in_order(names: Sequence[str], cfg: CfgNode) -> list[str]:
    """Return the class names sorted or, for ``DATASET.CLASS_ORDER: seeded``, shuffled by ``SEED`` alone."""
    ordered = sorted(names)
    if cfg.DATASET.CLASS_ORDER == "seeded":
        random.Random(cfg.SEED).shuffle(ordered)
    return ordered


@register
class EmojiFamilies(_EmojiBase):
    """41 visual families of emoji (bird, clock, vehicle, ...): no emoji is in train and test, in whatever style.

    Trains on ``DATASET.SOURCE_DOMAINS`` (default: openmoji_color), tests on ``DATASET.TARGET_DOMAINS`` (default: the same).
    """

    def __init__(self, cfg: CfgNode) -> None:
        """Read the fixed split and build the pictures' lists."""
        split = _read("families_split.json")
        classes = _in_order(list(split["train"]), cfg)
        sources = list(cfg.DATASET.SOURCE_DOMAINS) or ["openmoji_color"]
        targets = list(cfg.DATASET.TARGET_DOMAINS) or sources
        train, val = (self._pictures(sources, split[part], classes) for part in ("train", "val"))
        super().__init__(cfg, classes, train, val, self._pictures(targets, split["test"], classes))


@register
class EmojiConcepts(_EmojiBase):
    """Single emoji as classes, one picture a style: trains on some styles, tests on others.

    Trains on ``DATASET.SOURCE_DOMAINS`` (default: openmoji_color), tests on ``DATASET.TARGET_DOMAINS`` (default: the rest).
    """

    def __init__(self, cfg: CfgNode) -> None:
        """Choose the concepts and build the pictures' lists.

        Raises:
            ConfigError: More concepts are asked for than there are, or a style is both source and target.
        """
        node = cfg.DATASET.EMOJI
        wanted = {"seen": (False,), "novel": (True,), "all": (False, True)}.get(node.CONCEPTS)
        if wanted is None:
            raise ConfigError(f"DATASET.EMOJI.CONCEPTS is {node.CONCEPTS!r}, but must be one of: seen, novel, all")
        codes = {row["label"]: [row["hexcode"]] for row in _read("concepts.json")["concepts"] if row["novel"] in wanted}
        if not 2 <= node.NUM_CONCEPTS <= len(codes):
            raise ConfigError(
                f"DATASET.EMOJI.NUM_CONCEPTS is {node.NUM_CONCEPTS}, but must be 2 to {len(codes)} with CONCEPTS {node.CONCEPTS}"
            )
        chosen = random.Random(_CONCEPT_SEED).sample(sorted(codes), node.NUM_CONCEPTS)
        classes = _in_order(chosen, cfg)
        sources = list(cfg.DATASET.SOURCE_DOMAINS) or ["openmoji_color"]
        targets = list(cfg.DATASET.TARGET_DOMAINS) or [style for style in STYLES if style not in sources]
        both = sorted(set(sources) & set(targets))
        if both or not targets:
            raise ConfigError(
                f"EmojiConcepts has one picture a concept and style, so {', '.join(both or sources)} can't be both in "
                f"DATASET.SOURCE_DOMAINS and DATASET.TARGET_DOMAINS; test on other styles ({', '.join(STYLES)})"
            )
        train, test = (self._pictures(styles, codes, classes) for styles in (sources, targets))
        super().__init__(cfg, classes, train, [], test)


@hookimpl
def extend_config(cfg: CfgNode) -> None:
    """Add ``DATASET.EMOJI``."""
    cfg.DATASET.EMOJI = CfgNode()
    comment = "EmojiConcepts: classes, a fixed choice for each number"
    declare(cfg.DATASET.EMOJI, "NUM_CONCEPTS", 150, Setting(comment, low=2, high=100_000))
    comment = "EmojiConcepts: novel: those kept out of the tiny models' pretraining"
    declare(cfg.DATASET.EMOJI, "CONCEPTS", "seen", Setting(comment, choices=("seen", "novel", "all")))
