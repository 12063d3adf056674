"""``dassl.data.data_manager``: loaders of a data set's splits."""

from __future__ import annotations

from promptmix.dassl.importing import lacking
from promptmix.data.base import build_dataset
from promptmix.data.reading.images import read_image
from promptmix.data.reading.manager import INTERPOLATION_MODES, DataManager, DatasetWrapper, build_data_loader
from promptmix.data.reading.samplers import build_sampler
from promptmix.data.reading.transforms import build_transform

__all__ = [
    "INTERPOLATION_MODES",
    "DataManager",
    "DatasetWrapper",
    "build_data_loader",
    "build_dataset",
    "build_sampler",
    "build_transform",
    "read_image",
]

__getattr__ = lacking("dassl.data.data_manager")
