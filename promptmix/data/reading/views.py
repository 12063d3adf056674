"""Several views of one picture, for methods that learn from a test picture itself: the picture, and random ones of it.

A picture's views follow from the seed and its pixels alone, whatever batch, order or worker it is read in, so that their
features can be kept. AugMix (arXiv 1912.02781) as in TPT (arXiv 2209.07511): a crop mixed with three chains of operations on it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision import transforms as T
from yacs.config import CfgNode

from promptmix.data.reading.loaders import seed_streams, streams_kept
from promptmix.data.reading.transforms import build_transform, tensor_steps

__all__ = ["KINDS", "Views"]

KINDS = ("crops", "augmix")
_CHAINS = 3


class Views:
    """A picture to its views (V, 3, H, W), the picture as it is evaluated first.

    Args:
        cfg: the whole config tree; ``INPUT`` and ``SEED`` count.
        count: V.
        kind: ``crops`` (random-resized-crop and flip), or ``augmix`` of those.
    """

    def __init__(self, cfg: CfgNode, count: int, kind: str) -> None:
        self.count, self.kind, self.seed = count, kind, cfg.SEED
        self.plain = build_transform(cfg, is_train=False) or T.Compose([])
        self.crop = T.Compose([T.RandomResizedCrop(list(cfg.INPUT.SIZE)), T.RandomHorizontalFlip()])
        self.to_tensor = T.Compose([step for _, step in tensor_steps(cfg.INPUT, cfg.INPUT.TRANSFORMS, is_train=False)])

    def __repr__(self) -> str:
        """Say all that decides what a picture becomes."""
        return f"Views({self.count}, {self.kind}, {self.seed}, {self.plain}, {self.crop}, {self.to_tensor})"

    def __call__(self, picture: Image.Image) -> torch.Tensor:
        """Return the views (V, 3, H, W)."""
        digest = hashlib.blake2b(picture.tobytes(), digest_size=16).hexdigest()
        with streams_kept():
            seed_streams(self.seed, digest)
            view = self._augmix if self.kind == "augmix" else lambda cropped: self.to_tensor(cropped)
            return torch.stack([self.plain(picture), *(view(self.crop(picture)) for _ in range(self.count - 1))])

    def _augmix(self, cropped: Image.Image) -> torch.Tensor:
        """Return a mixture of a crop with three chains of one to three operations each."""
        weights, share = np.random.dirichlet([1.0] * _CHAINS), float(np.random.beta(1.0, 1.0))
        plain: torch.Tensor = self.to_tensor(cropped)
        mixed = torch.zeros_like(plain)
        for weight in weights:
            changed = cropped
            for _ in range(np.random.randint(1, 4)):
                changed = _OPERATIONS[np.random.randint(len(_OPERATIONS))](changed)
            mixed += float(weight) * self.to_tensor(changed)
        return share * plain + (1 - share) * mixed


def _level(most: float) -> float:
    """Draw a strength of severity 1: a hundredth to a tenth of ``most``."""
    return float(np.random.uniform(0.1, 1.0)) * most / 10


def _signed(strength: float) -> float:
    return -strength if np.random.uniform() > 0.5 else strength


def _affine(picture: Image.Image, *matrix: float) -> Image.Image:
    return picture.transform(picture.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BILINEAR)


#: Operations of AugMix that are not among the corruptions of ImageNet-C.
_OPERATIONS: tuple[Callable[[Any], Any], ...] = (
    ImageOps.autocontrast,
    ImageOps.equalize,
    lambda p: ImageOps.posterize(p, 4 - int(_level(4))),
    lambda p: p.rotate(_signed(int(_level(30))), resample=Image.Resampling.BILINEAR),
    lambda p: ImageOps.solarize(p, 256 - int(_level(256))),
    lambda p: _affine(p, 1, _signed(_level(0.3)), 0, 0, 1, 0),
    lambda p: _affine(p, 1, 0, 0, _signed(_level(0.3)), 1, 0),
    lambda p: _affine(p, 1, 0, _signed(int(_level(p.width / 3))), 0, 1, 0),
    lambda p: _affine(p, 1, 0, 0, 0, 1, _signed(int(_level(p.height / 3)))),
)
