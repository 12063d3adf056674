"""From the parts of a data set on disk to what a run uses: shots, class order, base/new classes, pictures that can be read."""

from __future__ import annotations

import random
from pathlib import Path

from yacs.config import CfgNode

from promptmix.data.base import DatasetBase
from promptmix.data.datum import Datum
from promptmix.data.fewshot import generate_fewshot, say_fewer, subsample_classes, unlabeled
from promptmix.data.reading.pictures import without_bad
from promptmix.data.records import kept_fewshot
from promptmix.utils import get_logger

__all__ = ["AssembledDataset", "renumbered"]

Splits = dict[str, list[Datum]]


class AssembledDataset(DatasetBase):
    """A data set from files, drawn and divided as the config says, in CoOp's order: first the shots, then the classes.

    Args:
        cfg: the whole config tree.
        splits: ``train``, ``val`` (may be empty) and ``test`` of the whole data set.
        folder: where few-shot splits are kept; None keeps none.
        remedy: what to do about missing pictures, for messages.
        fewshot: parts that shots are drawn from, val with at most 4 a class; others stay whole.
    """

    templates: list[str] = ["a photo of a {}."]
    template_groups: list[list[str]] = []
    all_classnames: list[str]

    def __init__(
        self,
        cfg: CfgNode,
        splits: Splits,
        folder: Path | None = None,
        remedy: str = "get them again",
        fewshot: tuple[str, ...] = ("train", "val"),
    ) -> None:
        names = {item.label: item.classname for part in ("test", "train") for item in splits[part]}
        order = sorted(names)
        same, whole = splits["val"] is splits["test"], splits["train"]
        shots = cfg.DATASET.NUM_SHOTS
        if shots >= 1 and fewshot:
            get_logger().info("Creating a %d-shot dataset", shots)
            if "train" in fewshot:
                say_fewer(splits["train"], shots)
            # Train is drawn before val, as CoOp does: the draws share python's generator.
            drawn = {part: generate_fewshot(splits[part], shots if part == "train" else min(shots, 4)) for part in fewshot}
            splits = splits | (drawn if folder is None else kept_fewshot(folder, shots, cfg.SEED, drawn))
        if cfg.DATASET.CLASS_ORDER == "seeded":
            random.Random(cfg.SEED).shuffle(order)
            places = {label: place for place, label in enumerate(order)}
            splits = {part: renumbered(items, places) for part, items in splits.items()}
            whole = renumbered(whole, places)
        without = unlabeled(cfg, whole)
        parts = [splits["train"], splits["test"]] + ([] if same else [splits["val"]])
        parts = subsample_classes(*parts, subsample=cfg.DATASET.SUBSAMPLE_CLASSES)
        several = without_bad(cfg.DATASET.NAME, [*parts, without or []], cfg.DATASET.SKIP_BAD, remedy)
        train, test, val = several[0], several[1], several[len(parts) - 1]
        super().__init__(train_x=train, train_u=several[-1] or None, val=val or None, test=test)
        self.all_classnames = [names[label] for label in order]


def renumbered(items: list[Datum], places: dict[int, int]) -> list[Datum]:
    """Return items with each label replaced by its place."""
    return [Datum(item.impath, places[item.label], item.domain, item.classname) for item in items]
