"""``dassl.data``: the data manager and what it wraps pictures in."""

from __future__ import annotations

from promptmix.dassl.importing import lacking
from promptmix.data.reading.manager import DataManager, DatasetWrapper

__all__ = ["DataManager", "DatasetWrapper"]

__getattr__ = lacking("dassl.data")
