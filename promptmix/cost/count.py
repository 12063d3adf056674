"""What work costs by its shapes: floating-point operations and the peak of live tensors, the same on every machine.

Run on tensors of device ``meta``, the work takes a second whatever its size, and the counts are those of the real thing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count


@dataclass(frozen=True)
class Count:
    """What a piece of work costs by its shapes.

    Attributes:
        gflops: floating-point operations in 10^9; a multiply and an add are two.
        live_mb: largest sum of the tensors that the work made and still held, in MiB; scratch memory inside a kernel is not seen.
    """

    gflops: float
    live_mb: float


def count(work: Callable[[], Any]) -> Count:
    """Do ``work`` once and count what it costs."""
    counter = _Counter()
    try:
        with counter:
            work()
    finally:
        counter.leave()
    return Count(counter.flops / 1e9, counter.peak / 2**20)


@dataclass(frozen=True)
class Operations:
    """How often a piece of work calls an operator: what the host does, while work on small tensors takes a GPU hardly longer.

    Attributes:
        all: operators that PyTorch dispatches, forward and backward.
        launches: those that do something, so that a GPU launches at least one kernel; the others are views.
    """

    all: int
    launches: int


def count_operations(work: Callable[[], Any]) -> Operations:
    """Do ``work`` once and count its operators; attention counts as one, also on ``meta``, where it runs in parts."""
    with _Attention(), _Operators() as counter:
        work()
    return Operations(counter.all, counter.launches)


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.all = self.launches = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.is_inference_mode_enabled() and func is not _FUSED.default:
            with self:  # composite operators come in one piece, as in ``_Counter``
                parts = func.decompose(*args, **(kwargs or {}))  # type: ignore[attr-defined]
            if parts is not NotImplemented:
                return parts
        self.all += 1
        returns = func._schema.returns  # type: ignore[attr-defined]
        view = any(part.alias_info is not None and not part.alias_info.is_write for part in returns)
        self.launches += not view and func is not torch.ops.aten._unsafe_view.default
        return func(*args, **(kwargs or {}))


_FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class _Attention(TorchFunctionMode):
    """Runs attention on ``meta`` as the one operator that a CPU has."""

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and args[0].is_meta:
            return _FUSED(*args[:3], is_causal=kwargs.get("is_causal", False), attn_mask=kwargs.get("attn_mask"))[0]
        return func(*args, **kwargs)


class _Counter(TorchDispatchMode):
    """Adds up operations by PyTorch's own formulas, and follows the memory behind every tensor that an operator makes.

    It stands in for ``FlopCounterMode``, which keeps alive what checkpointing frees and does not know attention on a CPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.now = self.peak = 0
        self._known: set[int] = set()
        self._followed: list[weakref.finalize[Any, Any]] = []

    def leave(self) -> None:
        """Follow nothing any more; what lives on would keep this."""
        for one in self._followed:
            one.detach()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            self._take(leaf, made=False)  # weights and inputs were there before the work
        packet = getattr(func, "_overloadpacket", None)
        if torch.is_inference_mode_enabled() and packet not in flop_registry:
            with self:  # inference mode hands composite operators (linear, attention) over in one piece
                parts = func.decompose(*args, **(kwargs or {}))  # type: ignore[attr-defined]
            if parts is not NotImplemented:
                return parts
        output = func(*args, **(kwargs or {}))
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=output)
        elif packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            self.flops += sdpa_flop_count(*(part.shape for part in args[:3]))
        elif packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
            self.flops += sdpa_backward_flop_count(*(part.shape for part in args[:4]))
        elif packet is torch.ops.aten._native_multi_head_attention:
            self.flops += _attention_flops(*(part.shape for part in args[:3]))
        for leaf in tree_leaves(output):
            self._take(leaf, made=True)
        return output

    def _take(self, leaf: Any, *, made: bool) -> None:
        if not isinstance(leaf, torch.Tensor) or leaf.layout is not torch.strided:
            return
        storage = leaf.untyped_storage()
        key, size = id(storage), storage.nbytes() if made else 0
        if key in self._known:  # a view
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        self._followed.append(weakref.finalize(storage, self._free, key, size))

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size) -> int:
    """Operations of multi-head attention (B, L, W) with its projections, which PyTorch fuses where nothing is learned."""
    batch, length, width = query
    projections = 2 * width * width * batch * (2 * length + key[1] + value[1])
    return projections + 4 * batch * length * key[1] * width
