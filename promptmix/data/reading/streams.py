"""The random streams that augmentations draw from, as tensors that can be stored and put back."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: State of each stream: torch's (CPU), python's and numpy's.
Streams = dict[str, Tensor]


def get_streams() -> Streams:
    """Return the states of torch's CPU generator, of ``random`` and of ``numpy.random``."""
    version, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=True)
    _, keys, position, has_gauss, cached = numpy_state
    return {
        "torch": torch.get_rng_state().clone(),
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": torch.tensor([0.0 if gauss is None else 1.0, gauss or 0.0], dtype=torch.float64),
        "numpy": torch.tensor([*keys.tolist(), position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor(cached, dtype=torch.float64),
    }


def set_streams(streams: Mapping[str, Tensor]) -> None:
    """Put back what ``get_streams`` returned."""
    torch.set_rng_state(streams["torch"].clone())  # a slice of a larger tensor is refused
    version, *words = streams["python"].tolist()
    has_gauss, gauss = streams["python_gauss"].tolist()
    random.setstate((version, tuple(words), gauss if has_gauss else None))
    *keys, position, cached = streams["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, cached, streams["numpy_gauss"].item()))


def streams_hash(streams: Mapping[str, Tensor]) -> str:
    """Return a hash of random states."""
    digest = hashlib.sha256()
    for name in sorted(streams):
        digest.update(streams[name].numpy().tobytes())
    return digest.hexdigest()
