"""The scaling study: time and memory over classes, experts, context, batch, from counts alone (device ``meta``)."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import tabulate

from promptmix.bench.counted import count_step
from promptmix.bench.world import World

#: (GPU, dense bf16 TFLOP/s by the maker's data sheet, share of it that such small kernels are taken to reach)
GPUS = (("A100", 312.0, 0.3), ("H100", 989.0, 0.3))
#: What is varied, the values, and how a method's config says it.
CLASSES = (10, 50, 100, 200, 500, 1000)
EXPERTS = (1, 2, 5, 10, 20)
CONTEXTS = (4, 8, 16)
BATCHES = (1, 4, 16, 32)
METHODS = ("CoOp", "CoCoOp", "MoCoOp", "MaPLe")
_CONTEXT_KEY = {"CoOp": "TRAINER.COOP.N_CTX", "CoCoOp": "TRAINER.COCOOP.N_CTX"}


def study(
    world: World,
    methods: Sequence[str] = METHODS,
    classes: Sequence[int] = CLASSES,
    experts: Sequence[int] = EXPERTS,
    contexts: Sequence[int] = CONTEXTS,
    batches: Sequence[int] = BATCHES,
) -> str:
    """Return tables in Markdown: one over classes for all methods, then what else each method's cost depends on."""
    lines = []
    for name in methods:
        for count in classes:
            lines.append(_line(world, name, 4, count, f"{count} classes"))
    for name in methods:
        for batch in batches:
            lines.append(_line(world, name, batch, 100 if 100 in classes else classes[-1], f"batch {batch}"))
    small = 100 if 100 in classes else classes[-1]
    for count in experts if "MoCoOp" in methods else ():
        keep = ("ROUTER.HARDPROMPTTOPK.K", min(2, count))
        lines.append(_line(world, "MoCoOp", 4, small, f"{count} experts", *keep, experts=count))
    for name, key in _CONTEXT_KEY.items():
        for length in contexts if name in methods else ():
            lines.append(_line(world, name, 4, small, f"context {length}", key, length))
    headers = ["method", "varied", "GFLOP", "plain GFLOP", "saved", "live MiB", "plain live MiB"]
    headers += [f"{gpu} ms (extrapolated)" for gpu, _, _ in GPUS]
    return tabulate(lines, headers, tablefmt="github", floatfmt=("", "", ".0f", ".0f", ".1f", ".0f", ".0f", ".1f", ".1f")) + "\n"


def _line(world: World, name: str, batch: int, classes: int, varied: str, *opts: object, experts: int = 5) -> list[str | float]:
    counts = count_step(world, name, batch, classes, *opts, experts=experts)
    ours, full = counts["gflops"], counts["plain_gflops"]
    times = [ours / (peak * share) for _, peak, share in GPUS]  # GFLOP over TFLOP/s is milliseconds
    return [name, varied, ours, full, full / ours, counts["live_mb"], counts["plain_live_mb"], *times]
