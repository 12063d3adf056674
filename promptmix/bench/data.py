"""Suite ``data``: decoding, reading and transforming pictures, against reading their features from the cache."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable

import torch
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from promptmix.bench.measure import Row, measure
from promptmix.bench.world import World, draw
from promptmix.data import read_image


def run(world: World, args: Namespace) -> list[Row]:
    """Return two rows: decoding alone; and an epoch without workers (plain), with them, and from cached views."""

    def epoch(*opts: object) -> Callable[[], None]:
        trainer = world.trainer("CoOp", args.pictures, "DATALOADER.TRAIN_X.BATCH_SIZE", 25, *opts)
        trainer.before_train()
        list(trainer.train_loader_x)  # workers that stay are started once

        def read() -> None:
            for _ in trainer.train_loader_x:
                pass

        return read

    ways = {"plain": epoch()}
    for workers in args.workers:
        ways[f"{workers} workers"] = epoch("DATALOADER.NUM_WORKERS", workers)
    ways["ours, cached views"] = epoch("INPUT.CACHED_VIEWS", 1, "INPUT.FEATURE_CACHE_DIR", str(world.folder / "cache"))
    return [_decoding(world, args), Row(f"an epoch over {args.pictures} JPEGs without learning", measure(ways, args.repeats))]


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
    return Row(f"decode {args.pictures} JPEGs in one process", measure(ways, args.repeats))
