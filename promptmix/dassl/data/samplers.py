"""``dassl.data.samplers``: the order of pictures in an epoch."""

from __future__ import annotations

from promptmix.dassl.importing import lacking
from promptmix.data.reading.samplers import (
    RandomClassSampler,
    RandomDomainSampler,
    RandomSampler,
    SeqDomainSampler,
    SequentialSampler,
    build_sampler,
)

__all__ = [
    "RandomClassSampler",
    "RandomDomainSampler",
    "RandomSampler",
    "SeqDomainSampler",
    "SequentialSampler",
    "build_sampler",
]

__getattr__ = lacking("dassl.data.samplers")
