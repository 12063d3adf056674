"""``INPUT.PIPELINE fast``: training pictures as bytes through torchvision's kernels, where the exact way goes through Pillow.

Numbers are others: the kernels round otherwise, random crops draw in another order, and JPEGs that are much larger than what is
made of them are decoded at a half, a quarter or an eighth of their size. Evaluation is always exact.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.functional import InterpolationMode, pil_to_tensor
from yacs.config import CfgNode

from promptmix.data.reading.images import as_rgb, read_image
from promptmix.errors import ConfigError

try:  # faster than Pillow's, with the same pixels; torchvision has announced that it will go
    from torchvision.io import ImageReadMode, decode_image
except ImportError:
    decode_image = None

__all__ = ["FAST", "FastTransform"]

#: Names of ``INPUT.TRANSFORMS`` that there is a fast way for.
FAST = ("random_resized_crop", "random_flip", "center_crop", "normalize")


class FastTransform:
    """A picture to a tensor (3, H, W) for training.

    Args:
        node: ``cfg.INPUT``.
        names: of the transforms.
        mode: of the resizing.

    Raises:
        ConfigError: there is no fast way for one of ``names``.
    """

    def __init__(self, node: CfgNode, names: Sequence[str], mode: InterpolationMode) -> None:
        for name in names:
            if name not in FAST:
                raise ConfigError(
                    f"INPUT.PIPELINE is 'fast', which knows {', '.join(FAST)}, but INPUT.TRANSFORMS names {name!r}; "
                    "set INPUT.PIPELINE to exact, or leave it out"
                )
        size = list(node.SIZE)
        cropped = "random_resized_crop" in names
        resize = v2.Resize(size, interpolation=mode, antialias=True)
        crop = v2.RandomResizedCrop(size, scale=node.RRCROP_SCALE, interpolation=mode, antialias=True)
        #: What is done to a picture when it is read: without chance, so that it can be kept after it.
        self.ahead = None if cropped else resize
        steps: list[Any] = [crop if cropped else resize]
        if "random_flip" in names:
            steps.append(v2.RandomHorizontalFlip())
        self.steps = v2.Compose(steps)
        normal = "normalize" in names
        self.mean = [255 * value if normal else 0.0 for value in node.PIXEL_MEAN]
        self.std = [255 * value if normal else 255.0 for value in node.PIXEL_STD]
        #: Pixels of the smaller edge that a picture keeps at least; a crop of a quarter of its area still has all that it needs.
        self.least = max(size) * (2 if cropped else 1)

    def __repr__(self) -> str:
        """Say all that decides what a picture becomes."""
        return f"FastTransform({self.reads}, {self.steps}, {self.mean}, {self.std})"

    @property
    def reads(self) -> str:
        """What decides how a picture is read, for keys of caches."""
        return f"JPEGs of {self.least} pixels and more, {self.ahead}"

    def __call__(self, picture: Image.Image | Tensor) -> Tensor:
        """Return the picture (3, H, W), float32.

        Args:
            picture: uint8 (3, height, width), or of Pillow, in RGB.
        """
        small = self.steps(picture if isinstance(picture, Tensor) else pil_to_tensor(picture))
        found = torch.empty(small.shape)  # not of the bytes' strides, which may be those of Pillow
        found.copy_(small)
        for channel, mean, std in zip(found, self.mean, self.std, strict=True):
            channel.sub_(mean).div_(std)
        return found

    def read(self, path: str, reading: str) -> Tensor:
        """Return a picture as uint8 (3, height, width), resized already where nothing is cropped.

        Args:
            path: as ``read_image`` takes it.
            reading: see ``promptmix.data.reading.images``.

        Raises:
            DataError: the file or member is missing, or is not a picture; the message names it.
        """
        decoded = self.decode(path, reading)
        return self.ahead(decoded) if self.ahead else decoded

    def decode(self, path: str, reading: str) -> Tensor:
        """Return a picture as uint8 (3, height, width), smaller where it is a large JPEG; otherwise as ``read``."""
        found = self._decode_jpeg(path, reading) if os.path.isfile(path) else None
        return pil_to_tensor(read_image(path, reading)) if found is None else found

    def _decode_jpeg(self, path: str, reading: str) -> Tensor | None:
        """Return a JPEG, smaller where it is large; None for what only the exact way reads."""
        try:
            with Image.open(path) as image:
                if image.format != "JPEG":
                    return None
                if min(image.size) >= 2 * self.least:
                    image.draft(None, (self.least, self.least))
                    return pil_to_tensor(as_rgb(image, reading))
                plain = image.mode == "RGB" and reading == "benchmark"
            return decode_image(path, ImageReadMode.RGB) if plain and decode_image else None
        except Exception:  # decoders raise many kinds; the exact way says it in our words
            return None
