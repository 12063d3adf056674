"""Suite ``scale``: steps with up to ImageNet-21k's class names, counted, and what limits them on a CPU, one GPU and eight.

Names are ImageNet's 1000 as CoOp words them, and behind those the lemmas of ImageNet-22k's synsets as timm lists them: of each
synset the first lemma that no class before it has. Nothing is computed but counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from tabulate import tabulate

from promptmix.bench.world import World, learn
from promptmix.clip.reference import plain_towers
from promptmix.clip.tokens import Tokenizer
from promptmix.cost.count import count
from promptmix.cost.gpu import GPUS, Bound, bound
from promptmix.cost.machine import Machine
from promptmix.cost.work import Work, work_of
from promptmix.utils import atomic_write

BACKBONE = "ViT-B/16"
CLASSES = (100, 1000, 5000, 21000)
METHODS = ("CoOp",)
BATCH = 32
CHUNK = 1000
#: The GPU of the page, and how many of them share a step: the batch and the classes are divided.
GPU, DEVICES = "h200", 8
#: Training pictures of 224 pixels that one core reads in a second (benchmarks/README.md): exact; cached, with fast transforms.
PICTURES = (220.0, 721.0)


def names(count: int) -> list[str]:
    """Return ``count`` class names, all different.

    Raises:
        ValueError: there are not so many.
    """
    text = files("promptmix.data").joinpath("splits").joinpath("imagenet_classnames.txt").read_text(encoding="utf-8")
    found = {name.casefold(): name for name in (line.partition(" ")[2].strip() for line in text.splitlines())}
    info = files("timm.data").joinpath("_info")
    rows = info.joinpath("imagenet_synset_to_lemma.txt").read_text(encoding="utf-8").splitlines()
    lemmas = dict(row.split("\t") for row in rows)
    for synset in info.joinpath("imagenet22k_synsets.txt").read_text(encoding="utf-8").split():
        free = next((lemma for lemma in lemmas[synset].split(", ") if lemma.casefold() not in found), None)
        found |= {} if free is None else {free.casefold(): free}
    if count > len(found):
        raise ValueError(f"{count} names are wanted, but there are {len(found)}")
    return list(found.values())[:count]


@dataclass(frozen=True)
class Tokens:
    """Tokens of prompts that the text tower must compute, beside the shared ones in front.

    Attributes:
        full: 77 positions for each class.
        packed: from the class name to EOT.
        trie: the same, where names that begin alike share their first tokens.
    """

    full: int
    packed: int
    trie: int

    @property
    def saved(self) -> float:
        """Share of the packed tokens that a trie would save."""
        return 1 - self.trie / self.packed


def tokens(tokenizer: Tokenizer, classes: Sequence[str]) -> Tokens:
    """Count the tokens of "name." for every class."""
    tails = [(*tokenizer.encode(f"{name}."), *tokenizer.after) for name in classes]
    nodes = {tail[: i + 1] for tail in tails for i in range(len(tail))}
    return Tokens(77 * len(tails), sum(map(len, tails)), len(nodes))


@dataclass(frozen=True)
class Counted:
    """A counted step.

    Attributes:
        method: its name.
        classes: C.
        work: ours.
        plain_gflops: with every token in every layer.
        chunk: ours, with ``MODEL.CLASS_CHUNK``: 10^9 operations and live MiB.
        share: the part of one of several devices: its classes and pictures.
    """

    method: str
    classes: int
    work: Work
    plain_gflops: float
    chunk: tuple[float, float]
    share: Work


def step(world: World, method: str, classes: Sequence[str]) -> Counted:
    """Count a step of ``method``; the loss is counted for a device's own classes."""
    trainer, work = _work(world, method, classes, BATCH)
    batch = world.batch(trainer, BATCH)
    trainer.clip.text.class_chunk = CHUNK
    chunked = count(lambda: learn(trainer, batch))
    trainer.clip.text.class_chunk = 0
    with plain_towers(trainer.clip):
        full = count(lambda: learn(trainer, batch)).gflops
    _, share = _work(world, method, classes[: -(-len(classes) // DEVICES)], BATCH // DEVICES)
    return Counted(method, len(classes), work, full, (chunked.gflops, chunked.live_mb), share)


def _work(world: World, method: str, classes: Sequence[str], size: int) -> tuple[Any, Work]:
    trainer = world.trainer(method, classes)
    batch = world.batch(trainer, size)
    learn(trainer, batch)  # what is built once
    return trainer, work_of(lambda: learn(trainer, batch))


def study(
    world: World, machine: Mapping[str, Any], classes: Sequence[int] = CLASSES, methods: Sequence[str] = METHODS
) -> dict[str, str]:
    """Return the tables by name: tokens, steps, limits.

    Args:
        world: on device ``meta``.
        machine: the CPU's numbers, as ``benchmarks/estimate.json`` has them.
        classes: numbers of classes.
        methods: whose steps are counted.
    """
    every = names(max(classes))
    steps = [step(world, method, every[:size]) for method in methods for size in classes]
    of_steps = ["method", "classes", "TFLOP", "plain", "GB moved", "live GiB", f"live GiB, chunks of {CHUNK}", "TFLOP"]
    of_limits = [
        "method",
        "classes",
        "machine",
        "seconds",
        "arithmetic",
        "memory traffic",
        "dispatch",
        "limit",
        "cores for pictures",
    ]
    return {
        "tokens": _table(
            ["classes", "77 positions", "class name to EOT", "in a trie", "a trie would save"],
            (_lengths(size, tokens(world.clip.tokenizer, every[:size])) for size in classes),
        ),
        "steps": _table(of_steps, map(_sizes, steps)),
        "limits": _table(of_limits, _limits(steps, Machine(**machine))),
    }


def rewrite(page: Path, tables: Mapping[str, str]) -> None:
    """Put tables between their marks (``<!-- name -->`` and ``<!-- end -->``) in a page."""
    text = page.read_text(encoding="utf-8")
    for name, table in tables.items():
        before, _, rest = text.partition(f"<!-- {name} -->\n")
        text = f"{before}<!-- {name} -->\n\n{table}\n\n<!-- end -->{rest.partition('<!-- end -->')[2]}"
    atomic_write(page, lambda to: to.write_text(text, encoding="utf-8"))


def _lengths(size: int, found: Tokens) -> list[str]:
    return [f"{size:,}", f"{found.full:,}", f"{found.packed:,}", f"{found.trie:,}", f"{found.saved:.1%}"]


def _sizes(one: Counted) -> list[str]:
    work = one.work
    numbers = (
        work.gflops / 1e3,
        one.plain_gflops / 1e3,
        work.gigabytes,
        work.live_mb / 1024,
        one.chunk[1] / 1024,
        one.chunk[0] / 1e3,
    )
    return [one.method, f"{one.classes:,}", *(f"{number:,.2f}" for number in numbers)]


def _limits(steps: Sequence[Counted], cpu: Machine) -> Iterator[list[str]]:
    for one in steps:
        by_kind = cpu.by_kind(one.work)
        host = 1e-6 * cpu.dispatch_us * one.work.operators
        seconds = sum(by_kind.values())
        arithmetic = sum(by_kind[kind] for kind in ("product", "grouped", "attention") if kind in by_kind)
        cells = [f"{number:.3g}" for number in (seconds, arithmetic, seconds - arithmetic - host, host)]
        limit = "arithmetic" if arithmetic > seconds / 2 else "memory traffic"
        yield [one.method, f"{one.classes:,}", "CPU, one thread", *cells, limit, _cores(seconds)]
        for devices, work in ((1, one.work), (DEVICES, one.share)):
            least = bound(work, GPUS[GPU], "bf16", cpu.dispatch_us)
            yield ["", "", f"{devices} {GPU.upper()}, bf16", *_gpu(least), _cores(least.seconds)]


def _gpu(least: Bound) -> list[str]:
    return [*(f"{x:.3g}" for x in (least.seconds, least.arithmetic, least.traffic, least.host)), least.limit]


def _cores(seconds: float) -> str:
    return " to ".join(f"{BATCH / seconds / rate:.2g}" for rate in reversed(PICTURES))


def _table(head: Sequence[str], rows: Any) -> str:
    return tabulate(list(rows), head, tablefmt="github", disable_numparse=True)
