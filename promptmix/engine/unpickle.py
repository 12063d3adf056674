"""Reads what Dassl's trainers and ``torch.save`` wrote, without importing or running anything that a file names.

Dassl stores its scheduler's whole state, in which a successor scheduler drags its optimizer along. PyTorch's weights-only
loading refuses that. The reader here builds tensors, numbers, strings, lists, dicts and ``OrderedDict``, puts an inert
``Placeholder`` where a file wants a scheduler or an optimizer, and refuses every other class by its name.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from promptmix.files.archives import read_saved, tensor_names
from promptmix.files.pickles import Maker, Refused, Shell

__all__ = ["Placeholder", "Refused", "read_pickled"]


class Placeholder(Shell):
    """Stands where a file wanted a scheduler, an optimizer or what hangs on one: its name and its attributes, no behaviour."""


#: Classes that a ``Placeholder`` may stand for: schedulers, optimizers, and what hangs on them.
_STANDS_FOR = re.compile(r"(^|\.)(optim|lr_scheduler)(\.|$)|Scheduler$|LR$|GradScaler$")


class _Dtype(Shell):
    """Stands for a numpy dtype of plain numbers."""

    order = "<"

    def take(self, state: Any) -> None:
        """Keep the byte order."""
        if type(state) is not tuple or len(state) < 2 or state[1] not in ("<", ">", "|", "="):
            raise Refused("it is damaged (a numpy dtype with another state)")
        self.order = state[1]


def _dtype(text: Any, *_flags: Any) -> _Dtype:
    if type(text) is not str or not re.fullmatch(r"[biuf]\d{1,2}", text):
        raise Refused(f"GLOBAL numpy dtype {str(text)[:20]} is not one of plain numbers")
    return _Dtype(text)


def _scalar(dtype: Any, data: Any = b"") -> int | float | bool:
    """Return a numpy scalar as a plain number."""
    if type(dtype) is not _Dtype or type(data) not in (str, bytes):
        raise Refused("GLOBAL numpy scalar is not a plain number")
    raw = data.encode("latin1") if isinstance(data, str) else data
    number: int | float | bool = np.frombuffer(raw, np.dtype(dtype.order + dtype.wanted), count=1)[0].item()
    return number


_NUMPY: dict[str, Callable[..., Any]] = {
    "numpy.dtype": _dtype,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
}


def _find(name: str) -> Any:
    """Return what a name stands for: plain containers, tensors, numpy's numbers, or a placeholder."""
    if name in _NUMPY:
        return Maker(name, _NUMPY[name])
    if _STANDS_FOR.search(name):
        return Maker(name, lambda *_: Placeholder(name))
    return tensor_names(name)


def read_pickled(path: Path) -> Any:
    """Read a file that ``torch.save`` wrote, with schedulers as placeholders, onto the CPU.

    Raises:
        Refused: it is damaged, or wants to build something else (the message has ``GLOBAL <name>`` then).
    """
    return read_saved(path, _find)
