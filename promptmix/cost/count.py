"""What work costs by its shapes: floating-point operations and the peak of live tensors, the same on every machine.

Run on tensors of device ``meta``, the work takes a second whatever its size, and the counts are those of the real thing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from promptmix.cost.shapes import run


@dataclass(frozen=True)
class Operations:
    """How often a piece of work calls an operator: what the host does, while work on small tensors takes a GPU hardly longer.

    Attributes:
        all: operators that PyTorch dispatches, forward and backward; attention is one, also on ``meta``, where it runs in parts.
        launches: those that do something, so that a GPU launches at least one kernel; the others are views.
    """

    all: int
    launches: int


@dataclass(frozen=True)
class Count:
    """What a piece of work costs by its shapes.

    Attributes:
        gflops: floating-point operations in 10^9; a multiply and an add are two.
        live_mb: largest sum of the tensors that the work made and still held, in MiB; scratch memory inside a kernel is not seen.
        operations: how often it calls operators.
    """

    gflops: float
    live_mb: float
    operations: Operations


class Listener(Protocol):
    """Hears of every operator that ran, with its arguments, what it gave, and its floating-point operations."""

    def __call__(self, func: Any, args: tuple[Any, ...], output: Any, flops: int) -> None:
        """Take notice of a call."""


def count(work: Callable[[], Any]) -> Count:
    """Do ``work`` once and count what it costs."""
    return counted(work)


def counted(work: Callable[[], Any], listener: Listener | None = None) -> Count:
    """``count``, with one who hears of every call; attention on ``meta`` is the one operator that devices have."""
    counter = _Counter(listener)
    try:
        with _fused_attention(), counter:
            work()
    finally:
        counter.leave()
    return Count(counter.flops / 1e9, counter.peak / 2**20, Operations(counter.operators, counter.launches))


#: Products that PyTorch's formulas know by the names of those which are not in place.
_IN_PLACE = {torch.ops.aten.addmm_: torch.ops.aten.addmm, torch.ops.aten.baddbmm_: torch.ops.aten.baddbmm}

_FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Run attention (B, H, L, d) on ``meta`` as the one operator that a CPU has; of other shapes it runs in parts there too.

    The function is exchanged, since PyTorch's modes don't hold where a backward pass computes something again.
    """
    own = F.scaled_dot_product_attention

    def fused(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:
        if not query.is_meta or query.dim() != 4 or dropout_p:
            return own(query, key, value, attn_mask, dropout_p, is_causal, **kwargs)
        out: torch.Tensor = _FUSED(query, key, value, is_causal=is_causal, attn_mask=attn_mask)[0]
        return out

    F.scaled_dot_product_attention = fused  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = own


class _Counter(TorchDispatchMode):
    """Adds up operations by PyTorch's own formulas, and follows the memory behind every tensor that an operator makes.

    It stands in for ``FlopCounterMode``, which keeps alive what checkpointing frees and does not know attention on a CPU.
    """

    def __init__(self, listener: Listener | None = None) -> None:
        super().__init__()
        self.flops = self.now = self.peak = self.operators = self.launches = 0
        self._known: set[int] = set()
        self._listener = listener
        self._followed: list[weakref.finalize[Any, Any]] = []

    def leave(self) -> None:
        """Follow nothing any more; what lives on would keep this."""
        for one in self._followed:
            one.detach()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for tensor in tensors_in(args, kwargs):
            self._take(tensor, made=False)  # weights and inputs were there before the work
        packet = getattr(func, "_overloadpacket", None)
        if torch.is_inference_mode_enabled() and packet not in flop_registry:
            with self:  # inference mode hands composite operators (linear, attention) over in one piece
                parts = func.decompose(*args, **(kwargs or {}))  # type: ignore[attr-defined]
            if parts is not NotImplemented:
                return parts
        self.operators += 1
        returns = func._schema.returns  # type: ignore[attr-defined]
        view = any(part.alias_info is not None and not part.alias_info.is_write for part in returns)
        self.launches += not view and func is not torch.ops.aten._unsafe_view.default
        output = run(func, args, kwargs or {})
        flops = _flops(packet, args, kwargs or {}, output)
        self.flops += flops
        if self._listener is not None:
            self._listener(func, args, output, flops)
        for tensor in tensors_in(output):
            self._take(tensor, made=True)
        return output

    def _take(self, tensor: torch.Tensor, *, made: bool) -> None:
        if tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
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


def tensors_in(*values: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in what an operator takes or gives; PyTorch's own walk over trees takes longer than the operators."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from tensors_in(*value)
        elif isinstance(value, dict):
            yield from tensors_in(*value.values())


def _flops(packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> int:
    """Floating-point operations of a call by PyTorch's formulas; 0 where it multiplies no matrices."""
    packet = _IN_PLACE.get(packet, packet)
    if packet is torch.ops.aten.convolution_backward:
        return _convolution_backward_flops(*args)
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=output))
    if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        return int(sdpa_flop_count(*(part.shape for part in args[:3])))
    if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return int(sdpa_backward_flop_count(*(part.shape for part in args[:4])))
    if packet is torch.ops.aten._native_multi_head_attention:
        return _attention_flops(*(part.shape for part in args[:3]))
    return 0


def _convolution_backward_flops(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *settings: Any) -> int:
    """Operations for the gradients of input and weight; PyTorch counts those of a grouped weight once for each group."""
    *_, transposed, _, _, wanted = settings
    return 2 * (x if transposed else grad).numel() * weight[0].numel() * (wanted[0] + wanted[1])


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size) -> int:
    """Operations of multi-head attention (B, L, W) with its projections, which PyTorch fuses where nothing is learned."""
    batch, length, width = query
    projections = 2 * width * width * batch * (2 * length + key[1] + value[1])
    return projections + 4 * batch * length * key[1] * width
