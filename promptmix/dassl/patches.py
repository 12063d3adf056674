"""What PyTorch and NumPy have dropped since Dassl was last changed (2022), given back on request."""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim.lr_scheduler import LRScheduler

from promptmix.engine.unpickle import Placeholder, read_pickled

__all__ = ["patch_torch", "patched_torch"]

_done: list[str] = []
_ABSENT = object()


def patch_torch() -> list[str]:
    """Make the installed PyTorch and NumPy fit a real Dassl; call it before Dassl builds anything. A second call changes nothing.

    Returns:
        What was given back, one line each; empty where nothing is missing.
    """
    if not _done:
        _done.extend(text for text in (_scheduler_verbose(), _torch_load(), _nested_schedulers(), *_numpy_names()) if text)
    return list(_done)


def _scheduler_verbose() -> str:
    original = LRScheduler.__init__
    if "verbose" in inspect.signature(original).parameters:
        return ""

    @wraps(original)
    def init(self: LRScheduler, optimizer: torch.optim.Optimizer, last_epoch: int = -1, verbose: Any = None) -> None:
        original(self, optimizer, last_epoch)

    LRScheduler.__init__ = init  # type: ignore[method-assign]
    return "schedulers take the argument `verbose` again (and ignore it): Dassl's warm-up schedulers pass it on"


def _torch_load() -> str:
    original: Callable[..., Any] = torch.load

    @wraps(original)
    def load(f: Any, *args: Any, **kwargs: Any) -> Any:
        # PyTorch before 2.6 runs what a file holds unless it is told not to.
        safe = {"weights_only": True} if "pickle_module" not in kwargs and len(args) < 2 else {}
        try:
            return original(f, *args, **{**safe, **kwargs})
        except pickle.UnpicklingError:
            if "weights_only" in kwargs or not isinstance(f, str | Path):
                raise
            return read_pickled(Path(f))

    torch.load = load
    return "torch.load reads checkpoints with pickled schedulers, which become inert placeholders: no code of a file is run"


def _nested_schedulers() -> str:
    original = LRScheduler.load_state_dict

    @wraps(original)
    def load_state_dict(self: LRScheduler, state_dict: dict[str, Any]) -> None:
        plain = dict(state_dict)
        for name, value in state_dict.items():
            mine = getattr(self, name, None)
            if isinstance(mine, LRScheduler) and isinstance(value, Placeholder | LRScheduler):
                # A pickled scheduler steps the optimizer that was pickled with it, which nobody uses.
                del plain[name]
                state = value.state if isinstance(value, Placeholder) else vars(value)
                mine.load_state_dict({key: item for key, item in state.items() if key != "optimizer"})
        original(self, plain)

    LRScheduler.load_state_dict = load_state_dict  # type: ignore[method-assign]
    return (
        "a resumed warm-up goes on with its own successor: Dassl alone steps a pickled copy, and the learning rate stands still"
    )


def _numpy_names() -> list[str]:
    missing = {name: kind for name, kind in (("int", int), ("float", float), ("bool", bool)) if name not in vars(np)}
    for name, kind in missing.items():
        setattr(np, name, kind)
    return [f"numpy.{name} is Python's {name} again: Dassl's transforms use it" for name in missing if name == "int"]


@contextmanager
def patched_torch() -> Iterator[None]:
    """Do what ``patch_torch`` does inside the context only."""
    places = [
        (LRScheduler, "__init__"),
        (LRScheduler, "load_state_dict"),
        (torch, "load"),
        *((np, name) for name in ("int", "float", "bool")),
    ]
    before = [(owner, name, vars(owner).get(name, _ABSENT)) for owner, name in places]
    if not _done:
        for patch in (_scheduler_verbose, _torch_load, _nested_schedulers, _numpy_names):
            patch()
    try:
        yield
    finally:
        for owner, name, value in before:
            if value is not _ABSENT:
                setattr(owner, name, value)
            elif name in vars(owner):
                delattr(owner, name)
