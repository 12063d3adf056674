"""``dassl.data.transforms``: from a picture to a tensor."""

from __future__ import annotations

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
    "INTERPOLATION_MODES",
    "Cutout",
    "GaussianNoise",
    "InstanceNormalization",
    "RandAugment",
    "RandAugment2",
    "RandAugmentFixMatch",
    "Random2DTranslation",
    "build_transform",
]

_OPERATIONS = (
    "AutoContrast Brightness Color Contrast CutoutAbs CutoutDefault Equalize Flip Identity Invert Lighting Posterize Rotate "
    "SamplePairing Sharpness ShearX ShearY Solarize SolarizeAdd TranslateX TranslateXabs TranslateY TranslateYabs fixmatch_list "
    "randaugment_list randaugment_list2"
)
__getattr__ = lacking(
    "dassl.data.transforms",
    ["CIFAR10Policy", "ImageNetPolicy", "SVHNPolicy", "SubPolicy", *_OPERATIONS.split()],
    "torchvision.transforms.AutoAugment stands for it; INPUT.TRANSFORMS takes imagenet_policy and the like",
)
