"""A data set for promptmix."""

from __future__ import annotations

from pathlib import Path

from promptmix import register
from promptmix.config import CfgNode
from promptmix.data import (
    DatasetBase,
    Datum,
    generate_fewshot,
    require_folder,
    subsample_classes,
)


@register
class MyPart(DatasetBase):
    """Pictures in ``<DATASET.ROOT>/my_part/<train|val|test>/<class name>/``."""

    dataset_dir = "my_part"

    def __init__(self, cfg: CfgNode) -> None:
        folder = Path(cfg.DATASET.ROOT, self.dataset_dir)
        require_folder(str(folder), type(self).__name__)
        names = sorted(path.name for path in (folder / "train").iterdir() if path.is_dir())
        splits = [_read(folder / part, names) for part in ("train", "val", "test")]
        if cfg.DATASET.NUM_SHOTS >= 1:
            splits[0] = generate_fewshot(splits[0], cfg.DATASET.NUM_SHOTS)
        train, val, test = subsample_classes(*splits, subsample=cfg.DATASET.SUBSAMPLE_CLASSES)
        super().__init__(train_x=train, val=val, test=test)
        self.templates = ["a photo of a {}."]
        self.all_classnames = names  # of base and new classes


def _read(folder: Path, names: list[str]) -> list[Datum]:
    """Return the pictures of one split in a fixed order, so that a seed draws the same shots everywhere."""
    return [
        Datum(impath=str(path), label=label, classname=name)
        for label, name in enumerate(names)
        for path in sorted((folder / name).glob("*"))
    ]
