"""``dassl.data.datasets``: the base of all data sets, their registry, and Dassl's own sets."""

from __future__ import annotations

from promptmix.dassl.data import sets
from promptmix.dassl.data.datum import Datum
from promptmix.dassl.utils import Registry, check_availability, check_isfile, listdir_nohidden
from promptmix.data.base import DATASET_REGISTRY, DatasetBase, build_dataset

__all__ = [
    "DATASET_REGISTRY",
    "DatasetBase",
    "Datum",
    "Registry",
    "build_dataset",
    "check_availability",
    "check_isfile",
    "listdir_nohidden",
]

globals().update(sets.SETS)
__getattr__ = sets.__getattr__
