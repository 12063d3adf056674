"""From a picture to a tensor: Dassl's transforms by name, composed in its order."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import transforms as T
from torchvision.transforms import functional as F
from torchvision.transforms.functional import InterpolationMode
from yacs.config import CfgNode

from promptmix.config.core import TRANSFORMS as CHOICES
from promptmix.data.reading.fast import FastTransform
from promptmix.data.reading.randaugment import RandAugment, RandAugment2, RandAugmentFixMatch
from promptmix.errors import ConfigError
from promptmix.registry import closest
from promptmix.utils import get_logger

__all__ = [
    "CHOICES",
    "INTERPOLATION_MODES",
    "Cutout",
    "GaussianNoise",
    "InstanceNormalization",
    "Random2DTranslation",
    "build_transform",
    "tensor_steps",
]

Transform = Callable[[Any], Any]

INTERPOLATION_MODES = {
    "bilinear": InterpolationMode.BILINEAR,
    "bicubic": InterpolationMode.BICUBIC,
    "nearest": InterpolationMode.NEAREST,
}


class Random2DTranslation:
    """Resize to ``height`` x ``width``; with probability ``p`` an eighth larger, then cut that size out at random.

    Args:
        height: of the result, in pixels.
        width: of the result, in pixels.
        p: probability of the shift.
        interpolation: of the resize.
    """

    def __init__(
        self, height: int, width: int, p: float = 0.5, interpolation: InterpolationMode = InterpolationMode.BILINEAR
    ) -> None:
        self.height = height
        self.width = width
        self.p = p
        self.interpolation = interpolation

    def __call__(self, img: Image.Image) -> Image.Image:
        """Return a picture of the wanted size."""
        if random.uniform(0, 1) > self.p:
            return F.resize(img, [self.height, self.width], self.interpolation)
        width, height = round(self.width * 1.125), round(self.height * 1.125)
        larger = F.resize(img, [height, width], self.interpolation)
        left = round(random.uniform(0, width - self.width))
        top = round(random.uniform(0, height - self.height))
        return F.crop(larger, top, left, self.height, self.width)


class InstanceNormalization:
    """Subtract each channel's mean and divide by its standard deviation, both of the picture itself.

    Args:
        eps: added to the deviation.
    """

    def __init__(self, eps: float = 1e-8) -> None:
        self.eps = eps

    def __call__(self, img: torch.Tensor) -> torch.Tensor:
        """Return the normalised picture (C, H, W)."""
        mean = img.mean(dim=(1, 2), keepdim=True)
        std = img.std(dim=(1, 2), keepdim=True)
        return (img - mean) / (std + self.eps)


class Cutout:
    """Set random squares to 0.

    Args:
        n_holes: squares per picture.
        length: side of a square in pixels; it may lie partly outside.
    """

    def __init__(self, n_holes: int = 1, length: int = 16) -> None:
        self.n_holes = n_holes
        self.length = length

    def __call__(self, img: torch.Tensor) -> torch.Tensor:
        """Return the picture (C, H, W) with holes."""
        height, width = img.shape[-2:]
        mask = torch.ones(height, width)
        half = self.length // 2
        for _ in range(self.n_holes):
            y, x = np.random.randint(height), np.random.randint(width)
            mask[max(y - half, 0) : y + half, max(x - half, 0) : x + half] = 0
        return img * mask


class GaussianNoise:
    """Add noise with probability ``p``.

    Args:
        mean: of the noise.
        std: of the noise.
        p: probability.
    """

    def __init__(self, mean: float = 0.0, std: float = 0.15, p: float = 0.5) -> None:
        self.mean = mean
        self.std = std
        self.p = p

    def __call__(self, img: torch.Tensor) -> torch.Tensor:
        """Return the picture (C, H, W), with noise or without."""
        if random.uniform(0, 1) > self.p:
            return img
        return img + torch.randn(img.size()) * self.std + self.mean


def build_transform(cfg: CfgNode, is_train: bool = True, choices: Sequence[str] | None = None) -> Transform | None:
    """Build the transform for training or evaluation.

    Args:
        cfg: the whole config tree; the ``INPUT`` node counts.
        is_train: evaluation only resizes, crops the centre and normalises.
        choices: names to use instead of ``INPUT.TRANSFORMS``.

    Returns:
        A transform from a PIL picture to a tensor (3, H, W), or None with ``INPUT.NO_TRANSFORM``.

    Raises:
        ConfigError: a name or interpolation is unknown, or ``INPUT.PIPELINE fast`` knows no way to do it.
    """
    if cfg.INPUT.NO_TRANSFORM:
        get_logger().info("Note: no transform is applied!")
        return None
    names = cfg.INPUT.TRANSFORMS if choices is None else choices
    for name in names:
        if name not in CHOICES:
            hint = closest(name, list(CHOICES))
            raise ConfigError(f"INPUT.TRANSFORMS: unknown transform {name!r}{hint} (choices: {', '.join(CHOICES)})")
    if cfg.INPUT.INTERPOLATION not in INTERPOLATION_MODES:
        known = ", ".join(INTERPOLATION_MODES)
        raise ConfigError(f"INPUT.INTERPOLATION is {cfg.INPUT.INTERPOLATION!r}, but must be one of: {known}")
    if is_train and cfg.INPUT.get("PIPELINE", "exact") == "fast":  # a real Dassl's tree lacks it
        fast = FastTransform(cfg.INPUT, names, INTERPOLATION_MODES[cfg.INPUT.INTERPOLATION])
        get_logger().info("Building transform_train\n+ %s", fast)
        return fast
    steps = _train_steps(cfg.INPUT, names) if is_train else _test_steps(cfg.INPUT)
    steps += tensor_steps(cfg.INPUT, names, is_train)
    title = "Building transform_train" if is_train else "Building transform_test"
    get_logger().info("\n+ ".join([title, *(text for text, _ in steps)]))
    return T.Compose([step for _, step in steps])


Steps = list[tuple[str, Transform]]  # what the log says, what is done


def _test_steps(node: CfgNode) -> Steps:
    """Return what evaluation does to the picture."""
    height, width = node.SIZE
    mode = INTERPOLATION_MODES[node.INTERPOLATION]
    return [
        (f"resize the smaller edge to {max(height, width)}", T.Resize(max(height, width), interpolation=mode)),
        (f"{height}x{width} center crop", T.CenterCrop((height, width))),
    ]


def _train_steps(node: CfgNode, names: Sequence[str]) -> Steps:
    """Return what training does to the picture. The order is fixed; the order of ``names`` doesn't matter."""
    size = list(node.SIZE)
    height, width = size
    mode = INTERPOLATION_MODES[node.INTERPOLATION]
    steps: Steps = []

    def add(name: str, text: str, make: Callable[[], Transform]) -> None:
        if name in names:
            steps.append((text, make()))

    if "random_crop" not in names and "random_resized_crop" not in names:
        steps.append((f"resize to {height}x{width}", T.Resize(size, interpolation=mode)))
    add("random_translation", "random translation", lambda: Random2DTranslation(height, width))
    padding, scale = node.CROP_PADDING, node.RRCROP_SCALE
    add("random_crop", f"random crop (padding = {padding})", lambda: T.RandomCrop(size, padding=padding))
    add(
        "random_resized_crop",
        f"random resized crop (size={node.SIZE}, scale={scale})",
        lambda: T.RandomResizedCrop(size, scale=scale, interpolation=mode),
    )
    add("random_flip", "random flip", T.RandomHorizontalFlip)
    for policy in (T.AutoAugmentPolicy.IMAGENET, T.AutoAugmentPolicy.CIFAR10, T.AutoAugmentPolicy.SVHN):
        add(f"{policy.value}_policy", f"{policy.value} policy", lambda policy=policy: T.AutoAugment(policy))  # type: ignore[misc]
    n, m = node.RANDAUGMENT_N, node.RANDAUGMENT_M
    add("randaugment", f"randaugment (n={n}, m={m})", lambda: RandAugment(n, m))
    add("randaugment_fixmatch", f"randaugment_fixmatch (n={n})", lambda: RandAugmentFixMatch(n))
    add("randaugment2", f"randaugment2 (n={n})", lambda: RandAugment2(n))
    b, c, s, h = node.COLORJITTER_B, node.COLORJITTER_C, node.COLORJITTER_S, node.COLORJITTER_H
    add(
        "colorjitter",
        f"color jitter (brightness={b}, contrast={c}, saturation={s}, hue={h})",
        lambda: T.ColorJitter(brightness=b, contrast=c, saturation=s, hue=h),
    )
    add("randomgrayscale", "random gray scale", lambda: T.RandomGrayscale(p=node.RGS_P))
    add(
        "gaussian_blur",
        f"gaussian blur (kernel={node.GB_K})",
        lambda: T.RandomApply([T.GaussianBlur(node.GB_K)], p=node.GB_P),
    )
    return steps


def tensor_steps(node: CfgNode, names: Sequence[str], is_train: bool) -> Steps:
    """Return what is done from the conversion to a tensor on."""
    steps: Steps = [("to torch tensor of range [0, 1]", T.ToTensor())]
    if is_train and "cutout" in names:
        text = f"cutout (n_holes={node.CUTOUT_N}, length={node.CUTOUT_LEN})"
        steps.append((text, Cutout(node.CUTOUT_N, node.CUTOUT_LEN)))
    if "normalize" in names:
        text = f"normalization (mean={node.PIXEL_MEAN}, std={node.PIXEL_STD})"
        steps.append((text, T.Normalize(mean=node.PIXEL_MEAN, std=node.PIXEL_STD)))
    if is_train and "gaussian_noise" in names:
        text = f"gaussian noise (mean={node.GN_MEAN}, std={node.GN_STD})"
        steps.append((text, GaussianNoise(node.GN_MEAN, node.GN_STD)))
    if "instance_norm" in names:
        steps.append(("instance normalization", InstanceNormalization()))
    return steps
