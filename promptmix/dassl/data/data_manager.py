"""``dassl.data.data_manager``: loaders of a data set's splits."""

from __future__ import annotations

from promptmix.dassl.importing import lacking
from promptmix.data.images import read_image
from promptmix.data.manager import INTERPOLATION_MODES, DataManager, DatasetWrapper, build_data_loader
from promptmix.data.samplers import build_sampler
from promptmix.data.transforms import build_transform

__all__ = [
    "INTERPOLATION_MODES",
    "DataManager",
    "DatasetWrapper",
    "build_data_loader",
    "build_sampler",
    "build_transform",
    "read_image",
]

__getattr__ = lacking("dassl.data.data_manager")
