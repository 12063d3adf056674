"""Suite ``data``: decoding, reading and transforming pictures, against decoded ones and against their features from the cache."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from yacs.config import CfgNode

from promptmix.bench import dali
from promptmix.bench.measure import Row, measure
from promptmix.bench.world import World, draw
from promptmix.data import Datum, build_data_loader, read_image
from promptmix.data.reading.transforms import INTERPOLATION_MODES, build_transform

_PIXELS = 224
_BATCH = 25
#: What is done to training pictures: with the whole picture needed in each epoch, and with a first step without chance.
_TRAINING = {
    "crop at random, flip": ("random_resized_crop", "random_flip", "normalize"),
    "resize, flip": ("random_flip", "normalize"),
}


def run(world: World, args: Namespace) -> list[Row]:
    """Return rows: decoding; training pictures at 224 pixels; an epoch without workers, with them, and from cached views."""

    def epoch(*opts: object) -> Callable[[], None]:
        trainer = world.trainer("CoOp", args.pictures, "DATALOADER.TRAIN_X.BATCH_SIZE", _BATCH, *opts)
        trainer.before_train()
        return _reading(trainer.train_loader_x)

    ways = {"plain": epoch()}
    for workers in args.workers:
        ways[f"{workers} workers"] = epoch("DATALOADER.NUM_WORKERS", workers)
    ways["ours, cached views"] = epoch("INPUT.CACHED_VIEWS", 1, "INPUT.FEATURE_CACHE_DIR", str(world.folder / "cache"))
    whole = Row(f"an epoch over {args.pictures} JPEGs without learning", measure(ways, args.repeats))
    return [_decoding(world, args), *(_training(world, args, *case) for case in _TRAINING.items()), whole]


def _reading(loader: Iterable[Any]) -> Callable[[], None]:
    """Return what reads an epoch of ``loader``, after a first one, so that workers that stay and files are there."""

    def read() -> None:
        for _ in loader:
            pass

    read()
    return read


def _training(world: World, args: Namespace, work: str, names: tuple[str, ...]) -> Row:
    """Compare ways from different JPEGs of 500 x 375 pixels to batches for training, in this process."""
    items = [Datum(path, 0, 0, "thing") for path in draw(world.folder / "different", args.pictures)]

    def ours(*opts: object) -> Callable[[], None]:
        cfg = world.config("CoOp", "INPUT.TRANSFORMS", names, "INPUT.SIZE", (_PIXELS, _PIXELS), *opts)
        tfm = build_transform(cfg, is_train=True)
        return _reading(build_data_loader(cfg, "RandomSampler", items, batch_size=_BATCH, tfm=tfm, is_train=True))

    kept = ("INPUT.FEATURE_CACHE_DIR", str(world.folder / "cache"))
    ways = {
        "exact (plain)": ours(),
        "ours, INPUT.PICTURE_CACHE": ours("INPUT.PICTURE_CACHE", True, *kept),
        "ours, INPUT.PIPELINE fast": ours("INPUT.PIPELINE", "fast"),
        "ours, both": ours("INPUT.PIPELINE", "fast", "INPUT.PICTURE_CACHE", True, *kept),
        "torchvision: decode_image, v2": _reading(_torchvision(world.config("CoOp"), items, names)),
    }
    work = f"{args.pictures} training pictures at {_PIXELS} pixels: {work}"
    if dali.installed():
        cropped, node = "random_resized_crop" in names, world.config("CoOp").INPUT
        ways["DALI on the CPU"] = _reading(dali.Dali([item.impath for item in items], _PIXELS, _BATCH, cropped, node))
    else:
        work += " (without DALI: pip install nvidia-dali-cuda130)"
    return Row(work, measure(ways, args.repeats), pictures=args.pictures)


def _torchvision(cfg: CfgNode, items: list[Datum], names: tuple[str, ...]) -> DataLoader[Any]:
    """Return torch's loader over torchvision's decoder and its transforms of bytes, as its own training recipes have them.

    Its resizing rounds otherwise than Pillow's, so that its numbers are others.
    """
    size, mode = [_PIXELS, _PIXELS], INTERPOLATION_MODES[cfg.INPUT.INTERPOLATION]
    crop = v2.RandomResizedCrop(size, interpolation=mode, antialias=True)
    first = crop if "random_resized_crop" in names else v2.Resize(size, interpolation=mode, antialias=True)
    last = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(cfg.INPUT.PIXEL_MEAN, cfg.INPUT.PIXEL_STD)]
    transform = v2.Compose([first, v2.RandomHorizontalFlip(), *last])
    return DataLoader(_Files([item.impath for item in items], transform), batch_size=_BATCH, shuffle=True)


class _Files(Dataset[torch.Tensor]):
    def __init__(self, paths: list[str], transform: v2.Compose) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        picture: torch.Tensor = self.transform(decode_image(self.paths[index], ImageReadMode.RGB))
        return picture


def _decoding(world: World, args: Namespace) -> Row:
    """Compare Pillow, whose pixels the methods were published on, with torchvision's decoder.

    The transforms take Pillow images, as Dassl's do, so that what another decoder saves has to pay for the way back.
    """
    paths = draw(world.folder)
    many = [paths[i % len(paths)] for i in range(args.pictures)]

    def torchvision(path: str) -> torch.Tensor:
        return decode_image(path, ImageReadMode.RGB)

    same = all(torch.equal(pil_to_tensor(read_image(path)), torchvision(path)) for path in paths)
    ways = {
        "Pillow (used)": lambda: [read_image(path) for path in many],
        f"torchvision.io, pixels {'equal' if same else 'differ'}": lambda: [torchvision(path) for path in many],
        "torchvision.io, as Pillow images": lambda: [to_pil_image(torchvision(path)) for path in many],
    }
    return Row(f"decode {args.pictures} JPEGs in one process", measure(ways, args.repeats), pictures=args.pictures)
