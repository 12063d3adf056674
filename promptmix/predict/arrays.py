"""Arrays and words in one file that nothing has to be run for to read: npz without pickles, or safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from promptmix.utils import atomic_write

__all__ = ["write_arrays"]


def write_arrays(path: Path, arrays: Mapping[str, Any], words: Mapping[str, Sequence[str] | str]) -> None:
    """Write a file of arrays, whole or not at all.

    Args:
        path: ends with ``.npz``, where words are arrays of text, or with ``.safetensors``, where lists of words are JSON in the
            file's metadata.
        arrays: by name.
        words: texts, or lists of texts, by name.
    """
    if path.suffix == ".npz":
        whole: dict[str, Any] = dict(arrays) | {name: np.array(text, dtype=str) for name, text in words.items()}
        atomic_write(path, lambda temporary: np.savez(temporary, **whole))
        return
    from safetensors.numpy import save_file

    metadata = {
        name: text if isinstance(text, str) else json.dumps(list(text), ensure_ascii=False) for name, text in words.items()
    }
    tensors = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    atomic_write(path, lambda temporary: save_file(tensors, temporary, metadata))
