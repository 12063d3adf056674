"""A program that was written for a GPU, on a machine without one: requests for CUDA and for fp16 are passed over."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from yacs.config import CfgNode

from promptmix.dassl.reasons import here
from promptmix.utils import get_logger

__all__ = ["to_fp32", "without_cuda"]

_HALF = (torch.float16, "torch.HalfTensor", "torch.cuda.HalfTensor")


def to_fp32(cfg: CfgNode) -> str:
    """Turn every trainer's ``PREC`` to fp32, since fp16 and amp need a GPU; return what changed, in words."""
    changed = []
    for name, node in cfg.TRAINER.items():
        if isinstance(node, CfgNode) and node.get("PREC") in ("fp16", "amp"):
            changed.append(f"TRAINER.{name}.PREC is fp32 instead of {node.PREC}")
            node.PREC = "fp32"
    return ", ".join(changed)


class _OnCPU(TorchFunctionMode):
    """Reads every request for CUDA as one for the CPU and every request for fp16 as one for fp32.

    This reaches factories (``torch.zeros(3, device="cuda")``), ``Tensor.to`` and, through it, modules; what the checkout compares
    (``dtype == torch.float16``) stays as it is.
    """

    def __init__(self, root: Path) -> None:
        super().__init__()
        self._root, self._said = root, set[str]()

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.Tensor.to, torch.Tensor.type):
            args = (args[0], *(self._plain(value) for value in args[1:]))
        for key in ("device", "dtype"):
            if key in kwargs:
                kwargs = {**kwargs, key: self._plain(kwargs[key])}
        found = func(*args, **kwargs)
        return _apart(found) if func is torch.Tensor.to and found is args[0] else found

    def passed_over(self, name: str) -> Callable[..., torch.Tensor]:
        """Return a method of tensors that does nothing, also where this mode is off: in functions that asked the mode before."""

        def method(tensor: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
            self._say(f".{name}()")
            return _apart(tensor)

        return method

    def _plain(self, value: Any) -> Any:  # a device, a dtype or a tensor
        if isinstance(value, torch.dtype | str) and value in _HALF:
            self._say("torch.float16")
            return torch.float32
        if isinstance(value, str | torch.device) and str(value).startswith("cuda"):
            self._say(f'device="{value}"')
            return torch.device("cpu")
        if isinstance(value, int) and not isinstance(value, bool):  # the number of a GPU
            return torch.device("cpu")
        return value

    def _say(self, what: str) -> None:
        if what in self._said:
            return
        self._said.add(what)
        line = here(self._root)
        where = f" (first at {line})" if line else ""
        if what.startswith("."):
            get_logger().warning("No GPU: calls of %s in the checkout are passed over%s", what, where)
        else:
            get_logger().warning("No GPU: %s in the checkout is read as the CPU's%s", what, where)


def _apart(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor that stays where it is; a leaf as a copy, as moving it gives: one that may be written into."""
    return tensor.clone() if type(tensor) is torch.Tensor and tensor.requires_grad and tensor.is_leaf else tensor


def _in_fp32(loaded: Any) -> Any:  # whatever a file holds
    """Return tensors in fp16 as fp32, also those in dicts and lists: OpenAI's weights are stored so."""
    if isinstance(loaded, torch.Tensor):
        return loaded.float() if loaded.dtype == torch.float16 else loaded
    if type(loaded) in (dict, OrderedDict):
        return type(loaded)((key, _in_fp32(value)) for key, value in loaded.items())
    return [_in_fp32(value) for value in loaded] if type(loaded) is list else loaded


@contextmanager
def without_cuda(root: Path) -> Iterator[None]:
    """Run what asks for CUDA on the CPU inside the context, and say once for each kind where the checkout at ``root`` asks."""
    load = torch.load

    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():  # which makes tensors of the stored dtype
            return _in_fp32(load(*args, **{**kwargs, "map_location": "cpu"}))

    mode = _OnCPU(root)
    nothing: Callable[..., None] = lambda *_args, **_kwargs: None  # noqa: E731
    replaced: list[tuple[Any, str, Any]] = [
        (torch, "load", on_cpu),
        *((torch.cuda, name, nothing) for name in ("set_device", "synchronize", "empty_cache", "reset_peak_memory_stats")),
        (torch.cuda, "get_device_name", lambda *_args: "no GPU"),
        *((torch.Tensor, name, mode.passed_over(name)) for name in ("cuda", "half")),
    ]
    before = [(owner, name, vars(owner).get(name)) for owner, name, _ in replaced]
    for owner, name, value in replaced:
        setattr(owner, name, value)
    try:
        with mode:
            yield
    finally:
        for owner, name, value in before:
            if value is not None:
                setattr(owner, name, value)
            else:  # a method of the base class
                delattr(owner, name)
