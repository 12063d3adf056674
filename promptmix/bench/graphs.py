"""Suite ``graphs``: what a compiled step (``TRAIN.STEP``) captures, and whether what the compiler makes of it is right."""

from __future__ import annotations

import operator
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tabulate import tabulate

from promptmix.bench.gpu import TOLERANCES, distance, numbers
from promptmix.bench.world import World
from promptmix.errors import ConfigError
from promptmix.prompts.compiled import CompiledStep

_BATCH = 4
#: Settings of depths that small towers don't reach.
_DEPTHS = {
    "MaPLe": ("TRAINER.MAPLE.PROMPT_DEPTH",),
    "PromptSRC": ("TRAINER.PROMPTSRC.PROMPT_DEPTH_TEXT", "TRAINER.PROMPTSRC.PROMPT_DEPTH_VISION"),
}
_DEPTH = 9


@dataclass(frozen=True)
class Graphs:
    """The graphs of one method's step.

    Attributes:
        method: its name.
        forward: operators of each graph forward, views too.
        backward: of each graph backward.
        breaks: how often the step leaves the graph.
        off: largest difference of logits, loss and gradients of the graphs from the eager step's, over the largest number.
        compiled: the same of what the compiler made of them; None where it was not asked.
        seconds: of the processor that the compiler took, with the step.
        error: why there are none.
    """

    method: str
    forward: tuple[int, ...] = ()
    backward: tuple[int, ...] = ()
    breaks: int | None = None
    off: float | None = None
    compiled: float | None = None
    seconds: float | None = None
    error: str = ""


def run(world: World, args: Namespace) -> list[Graphs]:
    """Capture the steps of ``args.gpu_methods``, and compile them where ``args.also`` says so."""
    return [_graphs(world, method, args.classes, compiles="compiled" in args.also) for method in args.gpu_methods]


def is_wrong(one: Graphs) -> bool:
    """Tell whether a step could not be captured, or came out differently."""
    return bool(one.error) or any(off is not None and not off <= TOLERANCES["compiled"] for off in (one.off, one.compiled))


def table(found: list[Graphs]) -> str:
    """Return the graphs as a table."""
    rows = []
    for one in found:
        shares = [f"{len(part)}: {', '.join(map(str, part))}" if part else "-" for part in (one.forward, one.backward)]
        offs = ["-" if off is None else f"{off:.0e}" for off in (one.off, one.compiled)]
        seconds = "-" if one.seconds is None else f"{one.seconds:.0f}"
        rows.append([one.method, *shares, "-" if one.breaks is None else one.breaks, *offs, seconds, one.error])
    heads = ["method", "graphs forward: operators", "backward", "breaks", "captured, off", "compiled, off", "compiler's s", ""]
    return tabulate(rows, heads, tablefmt="github", disable_numparse=True)


def _graphs(world: World, method: str, classes: int, *, compiles: bool) -> Graphs:
    layers = min(len(world.clip.text.blocks), world.clip.image.depth if world.clip.image.takes_prompts else _DEPTH, _DEPTH)
    opts = [part for key in _DEPTHS.get(method, ()) for part in (key, layers)]

    def learnt(backend: Callable[..., Any] | None = None, *, eager: bool = False) -> list[torch.Tensor]:
        trainer = world.trainer(method, classes, *opts)
        torch._dynamo.reset()
        step = None if eager else CompiledStep(trainer.model, (), backend=backend)
        return numbers(trainer, world.batch(trainer, _BATCH), step)

    forward: list[int] = []
    backward: list[int] = []
    try:
        expected = learnt(eager=True)
        torch._dynamo.utils.counters.clear()
        found = learnt(_keeper(forward, backward))
        breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
        begin, last = time.process_time(), learnt() if compiles else None
    except ConfigError as error:
        return Graphs(method, error=str(error))
    off, compiled = (None if one is None else max(map(distance, expected, one)) for one in (found, last))
    seconds = time.process_time() - begin if compiles else None
    return Graphs(method, tuple(forward), tuple(backward), breaks, off, compiled, seconds)


def _keeper(forward: list[int], backward: list[int]) -> Callable[..., Any]:
    """Return a backend that differentiates graphs, writes down how many operators they have, and runs them as they are."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    def keep(sizes: list[int]) -> Callable[..., Any]:
        def compiler(graph: torch.fx.GraphModule, _: Any) -> Any:
            nodes = (node for node in graph.graph.nodes if node.op == "call_function")
            sizes.append(sum(node.target is not operator.getitem for node in nodes))
            return make_boxed_func(graph)

        return compiler

    backend: Callable[..., Any] = aot_autograd(fw_compiler=keep(forward), bw_compiler=keep(backward))
    return backend
