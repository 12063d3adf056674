"""The scaling study: time and memory over classes, experts, context and batch; counted always, measured where asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

from promptmix.bench.counted import count_step
from promptmix.bench.measure import Cost, measure
from promptmix.bench.step import in_full
from promptmix.bench.world import World, learn

#: (GPU, dense bf16 TFLOP/s by the maker's data sheet, share of it that such small kernels are taken to reach)
GPUS = (("A100", 312.0, 0.3), ("H100", 989.0, 0.3))
#: What is varied, the values, and how a method's config says it.
CLASSES = (10, 50, 100, 200, 500, 1000)
EXPERTS = (1, 2, 5, 10, 20)
CONTEXTS = (4, 8, 16)
BATCHES = (1, 4, 16, 32)
METHODS = ("CoOp", "CoCoOp", "MoCoOp", "MaPLe")
_CONTEXT_NODE = {"CoOp": "TRAINER.COOP", "CoCoOp": "TRAINER.COCOOP"}


@dataclass(frozen=True)
class Size:
    """One line of the study: a step of ``method`` with the size that is varied in ``varied``."""

    method: str
    varied: str
    batch: int
    classes: int
    experts: int = 5
    opts: tuple[object, ...] = ()


def sizes(
    methods: Sequence[str] = METHODS,
    classes: Sequence[int] = CLASSES,
    experts: Sequence[int] = EXPERTS,
    contexts: Sequence[int] = CONTEXTS,
    batches: Sequence[int] = BATCHES,
) -> Iterator[Size]:
    """Yield the lines: classes and batches for all methods, then what else each method's cost depends on."""
    usual = 100 if 100 in classes else classes[-1]
    for name in methods:
        yield from (Size(name, f"{count} classes", 4, count) for count in classes)
    for name in methods:
        yield from (Size(name, f"batch {batch}", batch, usual) for batch in batches)
    for count in experts if "MoCoOp" in methods else ():
        yield Size("MoCoOp", f"{count} experts", 4, usual, count, ("ROUTER.HARDPROMPTTOPK.K", min(2, count)))
    for name, node in _CONTEXT_NODE.items():
        for m in contexts if name in methods else ():
            yield Size(name, f"context {m}", 4, usual, opts=(f"{node}.N_CTX", m, f"{node}.CTX_INIT", ""))


def study(world: World, lines: Iterable[Size], here: World | None = None, limit: float = 0.0, repeats: int = 1) -> str:
    """Return the study as a table in Markdown.

    Args:
        world: on device ``meta``.
        lines: such as ``sizes`` yields.
        here: where steps are measured; None measures nothing.
        limit: the largest step that is measured, in counted GFLOP; holds for the plain way and for ours apart.
        repeats: timed rounds of a measured step.
    """
    rows: list[list[Any]] = []
    for size in lines:
        counts = count_step(world, size.method, size.batch, size.classes, *size.opts, experts=size.experts, compare=True)
        ours, full = counts["gflops"], counts["plain_gflops"]
        costs = _measured(here, size, ours <= limit, full <= limit, repeats) if here is not None else {}
        numbers: list[Any] = [ours, full, full / ours, counts["live_mb"], counts["plain_live_mb"]]
        for way in ("ours", "plain") if here is not None else ():
            numbers += [costs[way].seconds, costs[way].memory_mb] if way in costs else [None, None]
        numbers += [ours / (peak * share) for _, peak, share in GPUS]  # GFLOP over TFLOP/s is milliseconds
        rows.append([size.method, size.varied, *numbers])
    headers = ["method", "varied", "GFLOP", "plain", "saved", "live MiB", "plain"]
    forms = ["", "", ".0f", ".0f", ".1f", ".0f", ".0f"]
    if here is not None:
        headers += ["s here", "peak MiB", "plain s", "peak MiB"]
        forms += [".2f", ".0f", ".1f", ".0f"]
    headers += [f"{gpu} ms (extrapolated)" for gpu, _, _ in GPUS]
    return tabulate(rows, headers, tablefmt="github", floatfmt=(*forms, *(".1f" for _ in GPUS)), missingval="") + "\n"


def _measured(world: World, size: Size, ours: bool, plain: bool, repeats: int) -> dict[str, Cost]:
    """Measure the ways that are wanted."""
    if not (ours or plain):
        return {}
    trainer = world.trainer(size.method, size.classes, *size.opts, experts=size.experts)
    batch = world.batch(trainer, size.batch)

    def step() -> None:
        learn(trainer, batch)

    step()  # references are built once, in the first step
    ways = {"plain": in_full(trainer, step), "ours": step}
    return measure({name: ways[name] for name, wanted in (("plain", plain), ("ours", ours)) if wanted}, repeats)
