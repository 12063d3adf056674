"""NVIDIA DALI, a library that does nothing but read training data, as a loader on the CPU beside ours (an optional package)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from yacs.config import CfgNode

__all__ = ["Dali", "installed"]


def installed() -> bool:
    """Tell whether DALI is there (``pip install nvidia-dali-cuda130``; a GPU is not needed)."""
    try:
        import nvidia.dali  # noqa: F401
    except (ImportError, OSError):  # OSError: a library that it is linked with
        return False
    return True


class Dali:
    """Batches (B, 3, size, size), float32, in an order drawn anew for each epoch.

    A random crop is cut out while the JPEG is decoded: rows below it and blocks beside it are passed over. Sizes and places of
    crops are drawn from the same ranges as torchvision's, by another generator; resizing is cubic with antialiasing.

    Args:
        paths: JPEG files.
        size: pixels of an edge.
        batch: B.
        cropped: crop at random and resize, or resize alone; both flip at random.
        node: ``cfg.INPUT``, whose means and deviations normalise.
    """

    def __init__(self, paths: Sequence[str], size: int, batch: int, cropped: bool, node: CfgNode) -> None:
        from nvidia.dali import fn, pipeline_def, types

        @pipeline_def(batch_size=batch, num_threads=1, device_id=None, seed=0, prefetch_queue_depth=1)
        def read() -> Any:
            files, _ = fn.readers.file(files=list(paths), random_shuffle=True)
            if cropped:
                area, aspect = list(node.RRCROP_SCALE), [3 / 4, 4 / 3]
                decoded = fn.decoders.image_random_crop(files, device="cpu", random_area=area, random_aspect_ratio=aspect)
            else:
                decoded = fn.decoders.image(files, device="cpu")
            resized = fn.resize(decoded, size=[size, size], interp_type=types.INTERP_CUBIC, antialias=True)
            mean, std = ([255 * value for value in values] for values in (node.PIXEL_MEAN, node.PIXEL_STD))
            return fn.crop_mirror_normalize(
                resized, mirror=fn.random.coin_flip(), mean=mean, std=std, output_layout="CHW", dtype=types.FLOAT
            )

        self.batches = len(paths) // batch
        self.pipeline = read()
        self.pipeline.build()

    def __iter__(self) -> Iterator[Tensor]:
        for _ in range(self.batches):
            yield torch.from_numpy(self.pipeline.run()[0].as_array())  # a copy: DALI writes the next batch to the same place
