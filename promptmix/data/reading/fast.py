"""``INPUT.PIPELINE fast``: training pictures as bytes through torchvision's kernels, where the exact way goes through Pillow.

Numbers are others: the kernels round otherwise, and JPEGs that are much larger than what is made of them are decoded at a half, a
quarter or an eighth of their size, after which random crops lie elsewhere. Evaluation is always exact.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.functional import InterpolationMode, pil_to_tensor
from yacs.config import CfgNode

from promptmix.data.reading.images import as_rgb, read_image
from promptmix.errors import ConfigError

try:  # faster than Pillow's, with the same pixels; torchvision has announced that it will go
    from torchvision.io import ImageReadMode, decode_jpeg, read_file
except ImportError:
    decode_jpeg = None

__all__ = ["FAST", "FastTransform"]

#: Names of ``INPUT.TRANSFORMS`` that there is a fast way for.
FAST = ("random_resized_crop", "random_flip", "center_crop", "normalize")
#: Markers of JPEG that a frame's size follows (ITU T.81, table B.1).
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


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
        self.scale = torch.tensor(self.std).reciprocal().view(3, 1, 1)
        self.shift = -torch.tensor(self.mean).view(3, 1, 1) * self.scale
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
        return found.copy_(small).mul_(self.scale).add_(self.shift)

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
            content = read_file(path) if decode_jpeg else None
            head = None if content is None else read_head(memoryview(content.numpy()))
            if head and head.plain(reading) and min(head.size) < 2 * self.least:
                return decode_jpeg(content, ImageReadMode.RGB)
            with Image.open(path) as image:
                if image.format != "JPEG" or min(image.size) < 2 * self.least:
                    return None
                image.draft(None, (self.least, self.least))
                return pil_to_tensor(as_rgb(image, reading))
        except Exception:  # decoders raise many kinds; the exact way says it in our words
            return None


class Head(NamedTuple):
    """What the first bytes of a JPEG say, in a tenth of the time that Pillow takes to open it.

    Attributes:
        size: width and height.
        colours: channels.
        bits: of a channel.
        tagged: there are EXIF or XMP tags, which may turn the picture.
    """

    size: tuple[int, int]
    colours: int
    bits: int
    tagged: bool

    def plain(self, reading: str) -> bool:
        """Tell whether any decoder gives the pixels that Pillow does."""
        harmless = self.size[0] * self.size[1] <= (Image.MAX_IMAGE_PIXELS or 0)
        return self.colours == 3 and self.bits == 8 and harmless and not (self.tagged and reading == "upright")


def read_head(content: memoryview) -> Head | None:
    """Return what stands before a JPEG's pixels, or None where it is none, or a damaged one."""
    if bytes(content[:2]) != b"\xff\xd8":
        return None
    place, tagged = 2, False
    while place + 9 < len(content) and content[place] == 0xFF:
        marker = content[place + 1]
        if marker in _FRAMES:
            bits, *edges = content[place + 4 : place + 9]
            height, width = 256 * edges[0] + edges[1], 256 * edges[2] + edges[3]
            return Head((width, height), content[place + 9], bits, tagged)
        tagged = tagged or marker == 0xE1
        # A marker may be preceded by any number of filling bytes.
        place += 1 if marker == 0xFF else 2 + 256 * content[place + 2] + content[place + 3]
    return None
