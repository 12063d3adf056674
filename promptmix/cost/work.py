"""What a piece of work asks of a machine: arithmetic, bytes and operators that the host dispatches, by what limits each.

``promptmix.cost.count`` says how much work there is; here it is kept apart, so that ``promptmix.cost.machine`` can turn it into
seconds. Run on ``meta``, it costs nothing and the shapes are those of the real thing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from promptmix.cost.count import Listener, counted, tensors_in

#: Kinds of operators. ``product``: matrix products of rows with weights, convolutions. ``grouped``: those of channels apart,
#: which kernels compute far more slowly. ``batched``: batches of small products. ``attention`` in one kernel. ``curve``:
#: exponentials and the like, which a CPU computes more slowly than it moves them. ``random``: numbers that are drawn. ``move``:
#: everything else that reads and writes tensors. ``view``: what only the host does.
KINDS = ("product", "grouped", "batched", "attention", "curve", "random", "move", "view")
_NAMES = {
    "product": ("mm", "addmm", "convolution", "convolution_backward", "_addmm_activation"),
    "batched": ("bmm", "baddbmm"),
    "attention": (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
        "_native_multi_head_attention",
    ),
    "curve": (
        *("silu", "silu_backward", "gelu", "gelu_backward", "_softmax", "_log_softmax", "exp", "log", "tanh", "sigmoid", "erf"),
        *("pow", "logsumexp", "sin", "cos"),
    ),
    "random": ("bernoulli_", "native_dropout", "normal_", "uniform_"),
}
_KIND = {f"aten::{name}": kind for kind, names in _NAMES.items() for name in names}
#: Operators that read no more of their first argument than they give, and those that read nothing.
_PICK = frozenset(f"aten::{name}" for name in ("index_select", "embedding", "gather", "index"))
_FILL = frozenset(("aten::zero_", "aten::fill_"))
_aten = torch.ops.aten
_VIEWS = (_aten._unsafe_view.default, _aten.detach.default, _aten.lift_fresh.default)


@dataclass(frozen=True)
class Sum:
    """Calls of one kind and of about one size, added up.

    Attributes:
        calls: how many.
        flops: multiplications and additions of products and attention; 0 for the other kinds.
        bytes: what they read and write, each tensor of a call once.
    """

    calls: int = 0
    flops: int = 0
    bytes: int = 0

    def plus(self, flops: int, size: int) -> Sum:
        """Return the sum with one more call."""
        return Sum(self.calls + 1, self.flops + flops, self.bytes + size)


@dataclass(frozen=True)
class Work:
    """A piece of work.

    Attributes:
        sums: kind and size to calls; calls of a size move less than four times the bytes of one another.
        live_mb: largest sum of the tensors that it made and held at once, in MiB.
    """

    sums: Mapping[tuple[str, int], Sum] = field(default_factory=dict)
    live_mb: float = 0.0

    @property
    def gflops(self) -> float:
        """Floating-point operations in 10^9, as ``promptmix.cost.count`` counts them."""
        return sum(part.flops for part in self.sums.values()) / 1e9

    @property
    def gigabytes(self) -> float:
        """What all operators read and write, in 10^9 bytes."""
        return sum(part.bytes for part in self.sums.values()) / 1e9

    @property
    def operators(self) -> int:
        """Operators that PyTorch dispatches."""
        return sum(part.calls for part in self.sums.values())

    @property
    def launches(self) -> int:
        """Operators that do something, so that a GPU launches at least one kernel."""
        return sum(part.calls for (kind, _), part in self.sums.items() if kind != "view")

    def less(self, other: Work, share: float) -> Work:
        """Return what is left without ``share`` of another piece of work that is part of it; calls stay whole numbers."""
        sums = dict(self.sums)
        for key, part in other.sums.items():
            mine = sums.get(key, Sum())
            left = (max(a - round(share * b), 0) for a, b in zip(_numbers(mine), _numbers(part), strict=True))
            sums[key] = Sum(*left)
        return Work(sums, self.live_mb)

    def plus(self, other: Work) -> Work:
        """Return both, one after the other."""
        sums = dict(self.sums)
        for key, part in other.sums.items():
            sums[key] = Sum(*(a + b for a, b in zip(_numbers(sums.get(key, Sum())), _numbers(part), strict=True)))
        return Work(sums, max(self.live_mb, other.live_mb))

    def rows(self) -> list[list[Any]]:
        """Return the sums as plain rows: kind, size, calls, flops, bytes."""
        return [[*key, *_numbers(part)] for key, part in sorted(self.sums.items())]

    @classmethod
    def of_rows(cls, rows: Iterable[Sequence[Any]], live_mb: float = 0.0) -> Work:
        """Return the work whose ``rows`` these are."""
        return cls({(kind, size): Sum(*numbers) for kind, size, *numbers in rows}, live_mb)


def work_of(work: Callable[[], Any]) -> Work:
    """Do ``work`` once and return what it asked for."""
    ledger = _Ledger()
    found = counted(work, ledger)
    return Work(dict(ledger.sums), found.live_mb)


class _Ledger(Listener):
    def __init__(self) -> None:
        self.sums: defaultdict[tuple[str, int], Sum] = defaultdict(Sum)

    def __call__(self, func: Any, args: Any, output: Any, flops: int) -> None:
        name = func._schema.name
        if _is_view(func):
            self.sums["view", 0] = self.sums["view", 0].plus(0, 0)
            return
        read, made = list(tensors_in(args)), list(tensors_in(output))
        read = made + read[1:] if name in _PICK else [] if name in _FILL else read
        size = sum(map(_bytes, read)) + sum(map(_bytes, made))
        kind = "grouped" if _is_grouped(name, args) else _KIND.get(name, "product" if flops else "move")
        key = kind, size.bit_length() // 2
        self.sums[key] = self.sums[key].plus(flops, size)


def _is_grouped(name: str, args: Any) -> bool:
    at = {"aten::convolution": 8, "aten::convolution_backward": 9}.get(name)
    return at is not None and args[at] > 1


def _is_view(func: Any) -> bool:
    parts = func._schema.returns
    return func in _VIEWS or any(part.alias_info is not None and not part.alias_info.is_write for part in parts)


def _bytes(tensor: Tensor) -> int:
    """Bytes that a tensor's numbers take; what is expanded is read once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _numbers(part: Sum) -> tuple[int, int, int]:
    return part.calls, part.flops, part.bytes
