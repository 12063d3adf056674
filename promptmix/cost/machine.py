"""From counted work to seconds on a CPU, by a few numbers that are measured in two seconds.

Arithmetic, moving of tensors and dispatching of operators follow one another on a CPU, so their seconds add up.
"""

from __future__ import annotations

import time
from bisect import bisect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock

from promptmix.clip.model import CLIP
from promptmix.clip.packed import packed_layout, shared_block
from promptmix.cost.work import Sum, Work, work_of

#: Numbers in a tensor at which moving is measured: what lies in the nearest cache, in a further one, in memory.
_SIZES = (2**16, 2**20, 2**22, 2**24)
#: Weights of an image tower times the pictures of a pass: one picture of a ViT-B/16.
_PASS = 150_000_000


@dataclass(frozen=True)
class Machine:
    """The CPU threads that PyTorch uses.

    Attributes:
        product: 10^9 operations a second in matrix products of many rows.
        grouped: the same in convolutions of each channel by itself.
        batched: 10^9 bytes a second that batches of small products read and write.
        attention: 10^9 operations a second in attention of one kernel.
        sizes: bytes of a call at which ``move`` and ``curve`` were measured, rising.
        move: 10^9 bytes a second of what reads and writes tensors.
        curve: the same where exponentials are computed.
        random: 10^9 bytes a second of numbers that are drawn.
        dispatch_us: microseconds of the host for an operator.
        slower: how much longer kernels take inside passes through a model's towers than alone, with what they need in the caches,
            where that has room there.
    """

    product: float
    grouped: float
    batched: float
    attention: float
    sizes: tuple[float, ...]
    move: tuple[float, ...]
    curve: tuple[float, ...]
    random: float
    dispatch_us: float
    slower: float = 1.0

    def seconds(self, work: Work) -> float:
        """Return how long ``work`` takes."""
        return sum(self.by_kind(work).values())

    def by_kind(self, work: Work) -> dict[str, float]:
        """Return the seconds of each kind of operator in ``work``."""
        found: dict[str, float] = {}
        for (kind, _), part in work.sums.items():
            if part.calls:
                found[kind] = found.get(kind, 0.0) + self._seconds(kind, part)
        return found

    def _seconds(self, kind: str, part: Sum) -> float:
        host, size = 1e-6 * self.dispatch_us * part.calls, part.bytes / part.calls
        gflop, gigabytes = part.flops / 1e9, part.bytes / 1e9
        if kind in ("product", "grouped", "attention"):
            rate = getattr(self, kind)
            # With few rows it is the weight's way from memory that takes time.
            return host + self.slower * max(gflop / rate, gigabytes / self._rate(self.move, size))
        if kind in ("batched", "random"):
            return host + self.slower * gigabytes / getattr(self, kind)
        # What no cache holds is no slower inside a pass than alone.
        slower = self.slower if size < self.sizes[1] else 1.0
        return host + slower * gigabytes / self._rate(self.curve if kind == "curve" else self.move, size)

    def _rate(self, rates: tuple[float, ...], size: float) -> float:
        """Return the rate of a call of ``size`` bytes, on the line between the two sizes measured around it."""
        i = bisect(self.sizes, size)
        if i in (0, len(self.sizes)):
            return rates[min(i, len(rates) - 1)]
        (low, high), (before, behind) = self.sizes[i - 1 : i + 1], rates[i - 1 : i + 1]
        return before + (behind - before) * (size - low) / (high - low)


def measure_machine(clip: CLIP) -> Machine:
    """Measure this machine's CPU, with the threads that PyTorch has: kernels alone, then a pass through ``clip``'s towers."""
    parts = _parts()
    visual = sum(p.numel() for p in clip.image.parameters())
    passes = partial(_passes, clip, 10, min(max(_PASS // visual, 1), 32))
    work = work_of(passes)
    host = 1e-6 * parts.dispatch_us * work.operators
    slower = (_best(passes, 0.5, rounds=2) - host) / (parts.seconds(work) - host)
    return replace(parts, slower=max(slower, 0.1))


def _passes(clip: CLIP, classes: int, pictures: int) -> None:
    """Text with a gradient to its context, pictures with one and without."""
    names = clip.tokenizer.class_tokens([f"class {i}" for i in range(classes)])
    device = clip.scale.device
    context = torch.zeros(1, 8, clip.text.width, device=device, requires_grad=True)
    images = torch.zeros(pictures, 3, clip.image_size, clip.image_size, device=device)
    clip.text(clip.text.compose(context, names)).sum().backward()
    clip.image(images.requires_grad_()).sum().backward()
    with torch.inference_mode():
        clip.image(images)


@cache
def _parts() -> Machine:
    moves, curves = zip(*map(_moves, _SIZES), strict=True)
    rows, narrow, wide = torch.randn(600, 512), torch.randn(2048, 512), torch.randn(512, 2048)
    product = 2 * 2 * 600 * 512 * 2048 / 1e9 / _best(lambda: F.linear(F.linear(rows, narrow), wide))
    maps, filters = torch.randn(2, 512, 14, 14), torch.randn(512, 1, 3, 3)
    grouped = 2 * 9 * maps.numel() / 1e9 / _best(lambda: F.conv2d(maps, filters, padding=1, groups=512))
    query, key = torch.randn(800, 6, 64), torch.randn(800, 64, 6)
    scores = torch.randn(800, 6, 6)
    moved = 2 * (2 * query.numel() + scores.numel()) * 4
    batched = moved / 1e9 / _best(lambda: (torch.bmm(query, key), torch.bmm(scores, query)))
    heads = torch.randn(2, 12, 197, 64)
    attention = 4 * 24 * 197 * 197 * 64 / 1e9 / _best(lambda: F.scaled_dot_product_attention(heads, heads, heads))
    drawn = 8 * rows.numel() / 1e9 / _best(lambda: torch.empty_like(rows).bernoulli_(0.5))
    sizes = tuple(10.0 * count for count in _SIZES)
    return Machine(product, grouped, batched, attention, sizes, moves, curves, drawn, 1e6 * _dispatch())


def _moves(count: int) -> tuple[float, float]:
    """Return 10^9 bytes a second for moving tensors of so many numbers, and for a curve over them."""
    x, y = torch.randn(count), torch.randn(count)
    # What a step moves it adds or scales in order, or lays out anew.
    moved = _best(lambda: (x + y, x.view(-1, 64).t().contiguous()))
    return 20 * count / 1e9 / moved, 8 * count / 1e9 / _best(lambda: F.silu(x))


def _dispatch() -> float:
    """Return the seconds of an operator, in layers of a text tower so small that only the host's work is seen."""
    block, layout = ResidualAttentionBlock(16, 2).requires_grad_(False), packed_layout((3, 3), 4, "cpu")
    tokens = torch.zeros(1, 10, 16, requires_grad=True)

    def work() -> None:
        x = tokens
        for _ in range(4):
            x = shared_block(block, x, layout, last=False)
        x.sum().backward()

    return _best(work) / work_of(work).operators


def _best(work: Callable[[], Any], seconds: float = 0.06, rounds: int = 3) -> float:
    """Return the seconds of the fastest of several rounds, which others' work on the machine disturbs least.

    With one thread it is the processor's time, which doesn't count what other programs take.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    work()
    best, spent = float("inf"), 0.0
    while spent < seconds or rounds > 0:
        begin = clock()
        work()
        took = max(clock() - begin, 1e-9)
        best, spent, rounds = min(best, took), spent + took, rounds - 1
    return best
