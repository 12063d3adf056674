"""``dassl.data.transforms``: from a picture to a tensor."""

from __future__ import annotations

from torchvision.transforms import AutoAugment, AutoAugmentPolicy

from promptmix.dassl.importing import lacking
from promptmix.data.reading.randaugment import RandAugment, RandAugment2, RandAugmentFixMatch
from promptmix.data.reading.transforms import CHOICES as AVAI_CHOICES
from promptmix.data.reading.transforms import (
    INTERPOLATION_MODES,
    Cutout,
    GaussianNoise,
    InstanceNormalization,
    Random2DTranslation,
    build_transform,
)

__all__ = [
    "AVAI_CHOICES",
    "CIFAR10Policy",
    "INTERPOLATION_MODES",
    "Cutout",
    "GaussianNoise",
    "ImageNetPolicy",
    "InstanceNormalization",
    "RandAugment",
    "RandAugment2",
    "RandAugmentFixMatch",
    "Random2DTranslation",
    "SVHNPolicy",
    "build_transform",
]


class _Policy(AutoAugment):
    """A policy of AutoAugment; ``fillcolor`` is what shows where a picture is moved away."""

    policy_: AutoAugmentPolicy

    def __init__(self, fillcolor: tuple[int, ...] = (128, 128, 128)) -> None:
        super().__init__(self.policy_, fill=list(fillcolor))


class ImageNetPolicy(_Policy):
    """That for ImageNet."""

    policy_ = AutoAugmentPolicy.IMAGENET


class CIFAR10Policy(_Policy):
    """That for CIFAR-10."""

    policy_ = AutoAugmentPolicy.CIFAR10


class SVHNPolicy(_Policy):
    """That for SVHN."""

    policy_ = AutoAugmentPolicy.SVHN


_OPERATIONS = (
    "AutoContrast Brightness Color Contrast CutoutAbs CutoutDefault Equalize Flip Identity Invert Lighting Posterize Rotate "
    "SamplePairing Sharpness ShearX ShearY Solarize SolarizeAdd TranslateX TranslateXabs TranslateY TranslateYabs fixmatch_list "
    "randaugment_list randaugment_list2"
)
__getattr__ = lacking(
    "dassl.data.transforms",
    ["SubPolicy", *_OPERATIONS.split()],
    "a part of its augmentations; RandAugment, the policies and torchvision.transforms have most",
)
