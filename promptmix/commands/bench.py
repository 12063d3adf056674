"""``promptmix bench``: the prefix-shared text tower against the plain pass at full length, in one run."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from promptmix.clip import CLIP


@dataclass(frozen=True)
class Cost:
    """What one way of doing a piece of work costs.

    Attributes:
        seconds: the fastest of the repeats.
        memory_mb: peak resident memory above what was there before, in MiB; on a GPU, peak of allocations.
        gflops: counted floating-point operations, in 10^9 (a multiply and an add count as two).
    """

    seconds: float
    memory_mb: float
    gflops: float


@dataclass(frozen=True)
class Comparison:
    """One piece of work done plainly and our way."""

    work: str
    plain: Cost
    ours: Cost


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add = parser.add_argument
    add("suite", nargs="?", choices=("text",), default="text", help="text: forward and backward through the text tower")
    add("--backbone", default="ViT-B/16", help="its architecture is used with random weights")
    add("--classes", type=int, default=100, help="C, class names of 1 to 4 tokens")
    add("--context", type=int, nargs="+", default=[16, 4], metavar="M", help="context vectors; several are run in turn")
    add("--experts", type=int, default=1, help="E, prompts encoded together")
    add("--threads", type=int, default=1, help="CPU threads; one thread disturbs the ratio least on a busy machine")
    add("--repeats", type=int, default=2, help="timed rounds, in the order plain, ours, plain, ours; the fastest counts")
    add("--json", metavar="FILE", help="also write the numbers with machine, versions and commit")


def run(args: argparse.Namespace) -> int:
    """Measure and print the table."""
    import torch
    from tabulate import tabulate

    from promptmix.config import get_cfg_default
    from promptmix.plugin_manager import get_plugin_manager

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    get_plugin_manager()
    cfg = get_cfg_default()
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.PRETRAINED = args.backbone, False
    from promptmix.clip import load_clip

    clip = load_clip(cfg).to("cuda" if torch.cuda.is_available() else "cpu")
    found = [_text(clip, args.classes, m, args.experts, args.repeats) for m in args.context]
    rows = [
        [c.work, way, cost.seconds, cost.memory_mb, cost.gflops]
        for c in found
        for way, cost in (("plain", c.plain), ("ours", c.ours))
    ]
    rows += [
        [c.work, "ratio"] + [getattr(c.plain, key) / getattr(c.ours, key) for key in ("seconds", "memory_mb", "gflops")]
        for c in found
    ]
    headers = ["work", "way", "seconds", "peak MiB", "GFLOP"]
    sys.stdout.write(tabulate(rows, headers, tablefmt="github", floatfmt=".2f") + "\n")
    if args.json:
        _write(args, found)
    return 0


def class_names(count: int) -> list[str]:
    """Return made-up class names with 1, 2, 3 and 4 words in turn, as long as those of the benchmark data sets."""
    words = ("dog", "lion", "bus", "tree", "cup", "road", "bird", "ship")
    return [" ".join(words[(i + k) % len(words)] for k in range(i % 4 + 1)) for i in range(count)]


def _text(clip: CLIP, classes: int, context: int, experts: int, repeats: int) -> Comparison:
    import torch

    from promptmix.clip.reference import encode_plain

    tower = clip.text
    names = tower.tokenizer.class_tokens(class_names(classes))
    stop = tower.embed(tower.tokenizer.encode("."))[None]
    start = torch.randn(experts, context, tower.width, device=stop.device) * 0.02
    direction = torch.randn(clip.embed_dim, device=stop.device)

    def step(encode: Callable[..., Tensor]) -> Callable[[], None]:
        def work() -> None:
            learned = start.clone().requires_grad_()
            features = encode(tower.compose(learned, names, stop))
            (torch.nn.functional.normalize(features, dim=-1) @ direction).sum().backward()

        return work

    plain, ours = measure([step(lambda prompts: encode_plain(tower, prompts)), step(tower)], repeats)
    return Comparison(f"text, {classes} classes, {context} context, {experts} prompts, forward and backward", plain, ours)


def measure(ways: list[Callable[[], None]], repeats: int) -> list[Cost]:
    """Measure several ways of the same work in turn.

    Args:
        ways: each does the work once.
        repeats: timed rounds; a round before them counts operations and memory.

    Returns:
        The cost of each way.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from promptmix.memory import peak_mb, reset_peak, resident_mb

    counted: list[tuple[float, float]] = []
    for way in ways:
        reset_peak()
        before = resident_mb() or 0.0
        with FlopCounterMode(display=False) as counter:
            way()
        peak = peak_mb()
        counted.append((peak["cuda"] or (peak["rss"] or 0.0) - before, counter.get_total_flops() / 1e9))
    seconds = [float("inf")] * len(ways)
    for _ in range(repeats):
        for i, way in enumerate(ways):
            begin = time.perf_counter()
            way()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[i] = min(seconds[i], time.perf_counter() - begin)
    return [Cost(s, memory, flops) for s, (memory, flops) in zip(seconds, counted, strict=True)]


def _write(args: argparse.Namespace, found: list[Comparison]) -> None:
    import platform

    from promptmix.results import git_commit
    from promptmix.utils import collect_env_info, write_json

    record = {
        "command": "promptmix bench " + " ".join(args.argv[1:]),
        "commit": git_commit(),
        "machine": f"{platform.machine()}, {args.threads} thread(s)",
        "versions": collect_env_info(),
        "results": [asdict(c) for c in found],
    }
    write_json(record, Path(args.json))
