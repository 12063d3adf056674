"""The field's benchmark: 11 data sets and 4 variants of ImageNet, each a description in ``descriptions.py``."""

from __future__ import annotations

from typing import ClassVar

from yacs.config import CfgNode

from promptmix.config.declare import Setting, declare
from promptmix.data.assemble import AssembledDataset
from promptmix.data.datasets.descriptions import DESCRIPTIONS, Description
from promptmix.data.datasets.readers import dataset_folder, read_splits, remedy
from promptmix.hookspecs import hookimpl
from promptmix.registry import Registry
from promptmix.utils import get_logger


class Benchmark(AssembledDataset):
    """A benchmark data set in CoOp's folders, with CoOp's items, labels, class names and few-shot picks."""

    about: ClassVar[Description]

    def __init__(self, cfg: CfgNode) -> None:
        about, root = self.about, cfg.DATASET.ROOT
        splits = read_splits(about, root)
        # ImageNet's validation set is its test set and stays whole; the variants are for testing only.
        parts = ("train",) if about.kind == "imagenet" else () if about.test_only else ("train", "val")
        if about.test_only and cfg.DATASET.NUM_SHOTS >= 1:
            get_logger().info("%s is for testing only: NUM_SHOTS is not applied, train_x is the test set as in CoOp", about.name)
        super().__init__(cfg, splits, dataset_folder(about, root), remedy(about, root), parts)


def _dataset(about: Description) -> type[Benchmark]:
    attributes = {
        "__module__": __name__,
        "__doc__": f"{about.name}, read from ``{about.folder}/`` below ``DATASET.ROOT``.",
        "about": about,
        "dataset_dir": about.folder,
        "templates": about.templates,
        "template_groups": [list(group) for group in about.groups],
    }
    return type(about.name, (Benchmark,), attributes)


@hookimpl
def extend_config(cfg: CfgNode) -> None:
    """Add ``DATASET.SKIP_BAD``."""
    comment = "True: leave out pictures that are missing or damaged, instead of stopping before training"
    declare(cfg.DATASET, "SKIP_BAD", False, Setting(comment))


@hookimpl
def register_datasets(registry: Registry) -> None:
    """Add all of them."""
    for about in DESCRIPTIONS.values():
        registry.register(_dataset(about))
