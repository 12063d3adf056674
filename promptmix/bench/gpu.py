"""Suite ``gpu``: whether a device computes what the CPU computes, then how fast, within so many minutes.

Correctness comes first, since a time of wrong numbers says nothing. Whatever the minutes leave out is named in the result.
Without a GPU the same checks run on the CPU against itself, and the result says so; there each part has its share of the minutes,
and what needs the compiler comes last.
"""

from __future__ import annotations

import signal
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from promptmix.bench.world import World
from promptmix.clip.reference import plain_towers
from promptmix.cost import memory
from promptmix.cost.count import count
from promptmix.cost.estimate import HEAP, step_count, without_numbers
from promptmix.engine.precision import use_repeatable_kernels
from promptmix.errors import ConfigError, UserError
from promptmix.prompts.compiled import CompiledStep
from promptmix.prompts.trainer import PromptTrainer
from promptmix.registry import TRAINER_REGISTRY

#: How long steps of one way are repeated, at least three times.
SECONDS = 2.0
#: Largest difference over the largest number, in logits, losses and gradients.
TOLERANCES = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.03, "flex": 1e-3, "compiled": 1e-3, "compiled flex": 1e-3}
_OPTS: dict[str, tuple[object, ...]] = {
    "fp32": (),
    "bf16": ("TRAINER.PREC", "bf16"),
    "fp16": ("TRAINER.PREC", "amp"),
    "flex": ("MODEL.ATTENTION", "flex"),
    "compiled": ("TRAIN.STEP", "compiled"),
    "compiled flex": ("TRAIN.STEP", "compiled", "MODEL.ATTENTION", "flex"),
    "cuda graph": ("TRAIN.STEP", "cuda_graph"),
}
_BATCH = 4
_CHECKED_CLASSES = 10
#: The step of a public training log (CoOp on ImageNet: batches of 32, fp16): precision, way, and whether image features are kept.
_IMAGENET = [(precision, way, kept) for precision in ("fp16", "bf16") for way in ("ours", "cuda graph") for kept in (False, True)]
_IMAGENET_BATCH = 32


@dataclass(frozen=True)
class Check:
    """One question of correctness.

    Attributes:
        name: what was asked.
        passed: the answer; None where it could not be asked here.
        detail: the largest difference, or the reason.
    """

    name: str
    passed: bool | None
    detail: str


@dataclass(frozen=True)
class Timing:
    """A training step in one way.

    Attributes:
        work: method and classes.
        way: plain, ours, through FlexAttention, ours compiled, both, ours as a CUDA graph.
        milliseconds: median of a step; None where it failed.
        peak_mb: peak of the device's allocations, None on a CPU.
        launches: operators that do something, in an eager step; None where the compiler decides.
        tflops: counted operations of the way over the time, in 10^12 a second.
        error: why there is no time.
    """

    work: str
    way: str
    milliseconds: float | None = None
    peak_mb: float | None = None
    launches: int | None = None
    tflops: float | None = None
    error: str = ""


@dataclass
class Result:
    """What the minutes sufficed for."""

    device: str
    checks: list[Check] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)
    pictures_per_second: dict[str, float] = field(default_factory=dict)
    not_reached: list[str] = field(default_factory=list)

    @property
    def failed(self) -> list[Check]:
        """The checks that did not pass."""
        return [check for check in self.checks if check.passed is False]


def run(args: Namespace, folder: Path) -> Result:
    """Check and measure until ``args.minutes`` are over."""
    end = time.monotonic() + 60 * args.minutes
    torch.manual_seed(0)
    here = World(args.backbone, folder, args.device)
    torch.manual_seed(0)
    cpu = World(args.backbone, folder, "cpu")
    device = here.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu (no GPU: nothing here is a GPU's number)"
    result = Result(name)
    plan = _plan(here, cpu, args)
    for place, part in enumerate(plan):
        now = time.monotonic()
        until = end if device.type == "cuda" else now + (end - now) / (len(plan) - place)
        for what, work in part:
            left = until - time.monotonic()
            try:
                with _cut_off(left):
                    found = work() if left > 0 else None
            except _Over:
                what, found = f"{what} (cut off after {left:.0f} s)", None
            if found is None:
                result.not_reached.append(what)
            else:
                _keep(result, found)
    return result


class _Over(BaseException):
    """The time is over; no ``Exception``, so that no check takes it for a wrong answer."""


@contextmanager
def _cut_off(seconds: float) -> Iterator[None]:
    """End what still runs after some seconds: a step of a large model, or a compiler, may take longer than all minutes.

    Raises:
        _Over: it was ended; not on Windows nor outside the main thread, where work goes on to its end.
    """
    if seconds <= 0 or not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def over(*_: object) -> None:
        raise _Over

    before = signal.signal(signal.SIGALRM, over)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, before)


def _keep(result: Result, found: Any) -> None:
    for one in found if isinstance(found, list) else [found]:
        if isinstance(one, Check):
            result.checks.append(one)
        elif isinstance(one, Timing):
            result.timings.append(one)
        else:
            result.pictures_per_second |= one


#: What is done, by name.
Part = list[tuple[str, Callable[[], Any]]]


def _plan(here: World, cpu: World, args: Namespace) -> list[Part]:
    """Return what is to be done, the most important first."""
    gpu = here.device.type == "cuda"

    def agree(*ways: str) -> Part:
        return [
            (f"{method}: {way} against the CPU", partial(_agrees, here, cpu, method, way))
            for method in args.gpu_methods
            for way in ways
        ]

    alike: Part = []
    for method in args.gpu_methods:
        alike.append((f"{method}: two runs agree to the bit", partial(_repeats, here, method)))
        alike.append((f"{method}: no wait in a step", partial(_never_waits, here, method)))
    others = sorted(set(TRAINER_REGISTRY) - set(args.gpu_methods)) if not args.no_others else ()
    steps: Part = [(f"{method}: two steps", partial(_two_steps, here, method)) for method in others]
    # On a CPU the compiler needs minutes for each, so nothing is timed there that it made.
    ways = ("plain", "ours", "flex", "compiled", "compiled flex", "cuda graph") if gpu else ("ours", "plain")
    times: Part = [
        (f"{method}, {classes} classes, {way}: time", partial(_time, here, method, classes, way))
        for classes in args.gpu_classes
        for method in args.gpu_methods
        for way in ways
    ]
    reading: Part = [("pictures per second", partial(_reading, here, args))]
    if gpu:
        imagenet: Part = [
            (f"CoOp as on ImageNet, {precision}, {way}: time", partial(_time_imagenet, here, precision, way, kept=kept))
            for precision, way, kept in _IMAGENET
        ]
        return [agree(*TOLERANCES), alike, imagenet, steps, times, reading]
    return [agree("fp32", "bf16", "fp16", "flex"), alike, steps, times, reading, agree("compiled")]


def _trainer(
    world: World, method: str, classes: int, *opts: object, size: int = _BATCH, kept: bool = False
) -> tuple[PromptTrainer, dict[str, Tensor]]:
    """Return a trainer and a batch, the same whatever device draws it; with ``kept`` of image features in place of pictures."""
    trainer = world.trainer(method, classes, *opts)
    torch.manual_seed(1)
    pictures = torch.randn(world.batch(trainer, size, features=kept)["img"].shape)
    return trainer, {"img": pictures.to(world.device), "label": torch.arange(size, device=world.device) % classes}


def numbers(
    trainer: PromptTrainer, batch: dict[str, Tensor], step: CompiledStep | None = None, *, learns: bool = True
) -> list[Tensor]:
    """Return logits, loss and, where it learns, all gradients of a batch through ``step`` or an eager one, on the CPU."""
    with trainer.precision.autocast(), torch.set_grad_enabled(learns):
        if step is not None:
            terms = step.loss(batch["img"], batch["label"])
        else:
            terms = trainer.model.loss(trainer.model.step(batch["img"], batch["label"]))
    if not learns:
        return [part.float().cpu() for part in (terms.logits, terms.total)]
    scale = 1.0 if trainer.precision.scaler is None else 1024.0  # small fp16 gradients vanish unscaled
    (terms.total * scale).backward()
    gradients = [p.grad / scale for p in trainer.model.parameters() if p.grad is not None]
    return [part.detach().float().cpu() for part in (terms.logits, terms.total, *gradients)]


def _agrees(here: World, cpu: World, method: str, way: str) -> Check:
    learns = way != "flex" or here.device.type == "cuda"  # PyTorch's FlexAttention has no gradient on a CPU
    name = f"{method}: {way} against the CPU's fp32" + ("" if learns else ", without gradients")
    if way == "fp16" and here.device.type != "cuda":
        return Check(name, None, "fp16 needs a GPU")
    convolutions = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False  # which PyTorch allows by default, so that fp32 is not fp32 in the first layer
    try:
        expected = numbers(*_trainer(cpu, method, _CHECKED_CLASSES), learns=learns)
        trainer, batch = _trainer(here, method, _CHECKED_CLASSES, *_OPTS[way])
        step = CompiledStep(trainer.model, ()) if way.startswith("compiled") else None
        found = numbers(trainer, batch, step, learns=learns)
    except ConfigError as error:
        return Check(name, None, str(error))
    except Exception as error:  # whatever a device or a compiler raises is an answer
        return Check(name, False, f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")
    finally:
        torch.backends.cudnn.allow_tf32 = convolutions
    off = max(distance(a, b) for a, b in zip(expected, found, strict=True))
    return Check(name, off <= TOLERANCES[way], f"largest difference {off:.1e}, allowed {TOLERANCES[way]:.0e}")


def distance(expected: Tensor, found: Tensor) -> float:
    """Return the largest difference over the largest number; infinite where something is not finite."""
    if not expected.numel():
        return 0.0
    off = float((expected - found).abs().max() / expected.abs().max().clamp_min(1e-12))
    return off if off == off else float("inf")


def _repeats(here: World, method: str) -> Check:
    name = f"{method}: two trainings of two steps agree to the bit (TRAIN.DETERMINISTIC)"
    use_repeatable_kernels(True)
    try:
        first, second = (_learned(here, method) for _ in range(2))
    except ConfigError as error:
        return Check(name, None, str(error))
    except RuntimeError as error:  # an operator that has no such kernel
        return Check(name, False, str(error).strip().splitlines()[0])
    finally:
        use_repeatable_kernels(False)
    off = max(distance(a, b) for a, b in zip(first, second, strict=True))
    return Check(name, all(map(torch.equal, first, second)), f"largest difference {off:.1e}")


def _learned(here: World, method: str) -> list[Tensor]:
    trainer, batch = _trainer(here, method, _CHECKED_CLASSES)
    if not any(parameter.requires_grad for parameter in trainer.model.parameters()):
        raise UserError("learns nothing by steps")
    for _ in range(2):
        trainer.forward_backward(batch)
    return [p.detach().cpu() for p in trainer.model.parameters()]


def _never_waits(here: World, method: str) -> Check:
    name = f"{method}: no step waits for the device"
    if here.device.type != "cuda":
        return Check(name, None, "only a GPU is waited for; tests/engine/test_no_sync.py stands in")
    try:
        trainer, batch = _trainer(here, method, _CHECKED_CLASSES)
    except ConfigError as error:
        return Check(name, None, str(error))
    trainer.forward_backward(batch)  # what is made once may wait
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.forward_backward(batch)
    except RuntimeError as error:
        return Check(name, False, str(error).strip().splitlines()[0])
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return Check(name, True, "")


def _two_steps(here: World, method: str) -> Check:
    name = f"{method}: two steps"
    try:
        learned = _learned(here, method)
    except UserError as error:  # a method that wants another data set, another backbone, or all pictures first
        return Check(name, None, str(error))
    except Exception as error:
        return Check(name, False, f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")
    return Check(name, all(bool(part.isfinite().all()) for part in learned), f"{len(learned)} learned tensors")


def _time_imagenet(here: World, precision: str, way: str, *, kept: bool, classes: int = 1000) -> Timing:
    features = ", kept image features" if kept else ""
    return _time(here, "CoOp", classes, way, *_OPTS[precision], size=_IMAGENET_BATCH, kept=kept, note=f", {precision}{features}")


def _time(
    here: World, method: str, classes: int, way: str, *opts: object, size: int = _BATCH, kept: bool = False, note: str = ""
) -> Timing:
    work = f"{method}, batch {size}, {classes} classes{note}"
    try:
        trainer, batch = _trainer(here, method, classes, *_OPTS.get(way, ()), *opts, size=size, kept=kept)
        with plain_towers(trainer.clip) if way == "plain" else nullcontext():
            needs, free = _memory(trainer, size)
            if needs > free:
                return Timing(work, way, error=f"needs {needs:,.0f} MiB of memory, and {free:,.0f} are free")
            return _measured(trainer, batch, work, way)
    except ConfigError as error:
        return Timing(work, way, error=str(error))
    except RuntimeError as error:  # out of memory, most likely, and the next way needs less
        return Timing(work, way, error=str(error).strip().splitlines()[0])


def _memory(trainer: PromptTrainer, size: int) -> tuple[float, float]:
    """Return what a step will need and what is free, in MiB; a GPU says so itself, where a CPU's process would be killed."""
    free = memory.available_mb() if trainer.device.type == "cpu" else None
    if free is None:
        return 0.0, 0.0
    with without_numbers(trainer):
        return HEAP * step_count(trainer, size).live_mb, free


def _measured(trainer: PromptTrainer, batch: dict[str, Tensor], work: str, way: str) -> Timing:
    def step() -> None:
        trainer.forward_backward(batch)

    eager = way in ("plain", "ours")
    for _ in range(1 if eager else 3):  # references, graphs
        step()
    counted = count(step) if eager else None
    on_gpu = trainer.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    times: list[float] = []
    end = time.monotonic() + SECONDS
    while len(times) < 3 or (time.monotonic() < end and len(times) < 100):
        begin = time.perf_counter()
        step()
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    median = sorted(times)[len(times) // 2]
    peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else None
    if counted is None:
        return Timing(work, way, 1e3 * median, peak)
    return Timing(work, way, 1e3 * median, peak, counted.operations.launches, counted.gflops / 1e3 / median)


def _reading(here: World, args: Namespace) -> dict[str, float]:
    """Return pictures read and transformed in a second, for each number of workers."""
    found = {}
    for workers in (0, *args.workers):
        opts = ("DATALOADER.TRAIN_X.BATCH_SIZE", 25, "DATALOADER.NUM_WORKERS", workers)
        trainer = here.trainer("CoOp", args.pictures, *opts)
        list(trainer.train_loader_x)  # workers that stay are started once
        begin = time.perf_counter()
        read = sum(len(batch["label"]) for batch in trainer.train_loader_x)
        found[f"{workers} workers"] = round(read / (time.perf_counter() - begin), 1)
    return found


def shown(result: Result) -> str:
    """Return the result as lines."""
    marks = {True: "ok", False: "FAILED", None: "not asked"}
    lines = [f"device: {result.device}"]
    lines += [f"{marks[check.passed]:9} {check.name}: {check.detail}".rstrip(": ") for check in result.checks]
    for timing in result.timings:
        given = (("ms", timing.milliseconds), ("MiB", timing.peak_mb), ("launches", timing.launches), ("TFLOP/s", timing.tflops))
        numbers = ", ".join(f"{value:,.4g} {unit}" for unit, value in given if value is not None)
        lines.append(f"{timing.work}, {timing.way}: {numbers or timing.error}")
    lines += [f"pictures a second, {workers}: {rate:,.0f}" for workers, rate in result.pictures_per_second.items()]
    if result.not_reached:
        lines.append(f"not reached in time: {'; '.join(result.not_reached)}")
    lines.append(f"{len(result.failed)} of {len(result.checks)} checks failed")
    return "\n".join(lines)


def as_json(result: Result) -> dict[str, Any]:
    """Return the result as plain data."""
    return asdict(result)
