"""A labelled picture that is pickled as Dassl's own."""

from __future__ import annotations

from multiprocessing.reduction import ForkingPickler
from typing import Any

from promptmix.data import datum

__all__ = ["Datum"]


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
