"""``dassl.data.datasets``: the base of all data sets and their registry."""

from __future__ import annotations

from multiprocessing.reduction import ForkingPickler
from typing import Any

from promptmix.dassl.importing import lacking
from promptmix.dassl.utils import Registry, check_availability, check_isfile, listdir_nohidden
from promptmix.data import datum
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


class Datum(datum.Datum):
    """A labelled picture that is pickled as Dassl's own.

    CoOp's data sets keep few-shot picks as pickles in the data folder. This way a real Dassl and promptmix read each other's.
    """

    __slots__ = ()
    __module__ = "dassl.data.datasets.base_dataset"

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in datum.Datum.__slots__}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name in datum.Datum.__slots__:
            setattr(self, name, state[name])


# Worker processes that don't fork get plain items, since `dassl` is only importable in this one.
ForkingPickler.register(Datum, lambda item: (datum.Datum, (item.impath, item.label, item.domain, item.classname)))

_SETS = (
    "CIFAR10 CIFAR100 CIFAR10C CIFAR100C CIFARSTL Camelyon17 Digit5 DigitSingle DigitsDG DomainNet FMoW IWildCam miniDomainNet"
)
__getattr__ = lacking(
    "dassl.data.datasets",
    [*_SETS.split(), "Office31", "OfficeHome", "OfficeHomeDG", "PACS", "STL10", "SVHN", "VLCS", "VisDA17", "da", "dg", "ssl"],
    "a data set for domain adaptation, domain generalisation or semi-supervised learning",
)
