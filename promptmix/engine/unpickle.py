"""Reads the pickles that Dassl's trainers wrote, without importing or running anything that a file names.

Dassl stores its scheduler's whole state, in which a successor scheduler drags its optimizer along. PyTorch's weights-only
loading refuses that. The reader here builds tensors, numbers, strings, lists, dicts and ``OrderedDict``, puts an inert
``Placeholder`` where a file wants a scheduler or an optimizer, and refuses every other class by its name.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

__all__ = ["Placeholder", "read_pickled"]


class Placeholder:
    """Stands where a file wanted an object of a class that is not built: its name and its attributes, and no behaviour.

    Attributes:
        wanted: dotted name of the class.
        state: what the file would have set on it.
    """

    wanted = ""

    def __new__(cls, *_args: Any, **_kwargs: Any) -> Placeholder:
        """Take whatever arguments the file has for the constructor, and forget them."""
        return super().__new__(cls)

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        self.state: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:  # noqa: ANN401
        self.state = dict(state) if isinstance(state, dict) else {}

    def __repr__(self) -> str:
        return f"<not built: {self.wanted}>"


def _scalar(dtype: np.dtype[Any], data: Any = b"") -> Any:  # noqa: ANN401
    """Return a numpy scalar as a plain number."""
    if dtype.kind not in "biuf":
        raise pickle.UnpicklingError(f"GLOBAL numpy scalar of type {dtype} is not a plain number")
    raw = data.encode("latin1") if isinstance(data, str) else data
    return np.frombuffer(raw, dtype, count=1)[0].item()


def _dtype(text: str, *_flags: Any) -> np.dtype[Any]:
    """Return a numpy dtype of numbers."""
    dtype = np.dtype(text)
    if dtype.kind not in "biuf":
        raise pickle.UnpicklingError(f"GLOBAL numpy dtype {text} is not one of plain numbers")
    return dtype


def _bytes(text: str, encoding: str = "latin1") -> bytes:
    """Stand for ``codecs.encode``, with which old protocols write bytes."""
    return text.encode(encoding)


#: Everything that a file may build besides Python's literals.
_ALLOWED: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": OrderedDict,
    "collections.Counter": Counter,
    "collections.defaultdict": defaultdict,
    "builtins.dict": dict,
    "__builtin__.dict": dict,
    "builtins.set": set,
    "__builtin__.set": set,
    "_codecs.encode": _bytes,
    "numpy.dtype": _dtype,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
    "torch._utils._rebuild_tensor": torch._utils._rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,
    "torch._utils._rebuild_parameter": torch._utils._rebuild_parameter,
    "torch.Size": torch.Size,
    "torch.device": torch.device,
}

#: Classes that a ``Placeholder`` may stand for: schedulers, optimizers, and what hangs on them.
_STANDS_FOR = re.compile(r"(^|\.)(optim|lr_scheduler)(\.|$)|Scheduler$|LR$|GradScaler$")


class _Unpickler(pickle.Unpickler):
    """Builds what ``_ALLOWED`` lists; never imports."""

    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401
        """Return what stands for ``module.name`` here.

        Raises:
            UnpicklingError: it is neither plain nor a scheduler.
        """
        wanted = f"{module}.{name}"
        if wanted in _ALLOWED:
            return _ALLOWED[wanted]
        if isinstance(value := getattr(torch, name, None) if module == "torch" else None, torch.dtype):
            return value
        if _STANDS_FOR.search(wanted):
            return type("Placeholder", (Placeholder,), {"wanted": wanted})
        raise pickle.UnpicklingError(f"GLOBAL {wanted}")


class _PickleModule:
    """What ``torch.load`` takes for the ``pickle`` module."""

    Unpickler = _Unpickler
    UnpicklingError = pickle.UnpicklingError
    __name__ = "promptmix.engine.unpickle"

    @staticmethod
    def load(file: IO[bytes], **options: Any) -> Any:  # noqa: ANN401
        """Read one pickle."""
        return _Unpickler(file, **options).load()


def read_pickled(path: Path) -> Any:  # noqa: ANN401
    """Read a file that ``torch.save`` wrote, with schedulers as placeholders, onto the CPU.

    Raises:
        UnpicklingError: it wants to build something else; the message ends in ``GLOBAL <name>``.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            # torch.load would hand such an archive on to torch.jit.load, which can run code.
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise pickle.UnpicklingError("GLOBAL torch.jit (a TorchScript archive)")
    return torch.load(path, map_location="cpu", weights_only=False, pickle_module=_PickleModule)
