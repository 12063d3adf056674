"""What a run will need, before it runs: memory and operations of a step counted by shapes, seconds from a short calibration."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from yacs.config import CfgNode

from promptmix.cost.count import Count, count
from promptmix.errors import UserError, is_out_of_memory
from promptmix.files.digests import digest_of
from promptmix.utils import get_logger

#: Classes in memory at a time that the message proposes.
_CHUNK = 64
#: Nodes of the config that no step reads; the data set's words are asked for themselves.
_NO_SHAPES = ("SEED", "OUTPUT_DIR", "RESUME", "DATASET", "PROTOCOL")
#: Operations of a step, by what they follow from: the seeds of an experiment have the same, and counting takes a second.
_counted: dict[tuple[type, type, str], float] = {}


class Counted(Protocol):
    """What is read of a trainer (a ``PromptTrainer``, which knows this module)."""

    cfg: CfgNode
    clip: Any
    model: Any
    device: torch.device
    train_loader_x: Any

    @property
    def num_classes(self) -> int:
        """Number of classes."""


@dataclass(frozen=True)
class Estimate:
    """What training is expected to need.

    Attributes:
        step_gflops: operations of a step on pictures, in 10^9.
        step_mb: peak of live tensors in a step, in MiB.
        weights_mb: the frozen model, the learned tensors, their gradients and two moments of the optimizer, in MiB.
        batches: steps of an epoch.
        gflops_per_second: what the calibration reached.
        seconds_per_picture: reading and transforming, in one process.
        epoch_seconds: steps and reading of an epoch, one after the other.
    """

    step_gflops: float
    step_mb: float
    weights_mb: float
    batches: int
    gflops_per_second: float
    seconds_per_picture: float
    epoch_seconds: float


def estimate(trainer: Counted) -> Estimate:
    """Return what training is expected to need. The trainer has no numbers afterwards and can't be used.

    Raises:
        UserError: the method learns nothing by steps, or computes something that can't be counted by shapes.
    """
    cfg, loader = trainer.cfg, trainer.train_loader_x
    if not any(parameter.requires_grad for parameter in trainer.model.parameters()):
        raise UserError(f"{cfg.TRAINER.NAME} learns nothing by steps of a training, so there is no step to estimate")
    reading = _reading(loader)
    speed = _speed(trainer)
    learned = sum(p.numel() for p in trainer.model.parameters()) * 4
    frozen = sum(p.numel() for p in trainer.clip.parameters()) * 4
    size = min(loader.batch_size or 1, len(loader.dataset))
    views = cfg.INPUT.CACHED_VIEWS
    on_meta(trainer)
    try:
        step = step_count(trainer, size)
        second: int = getattr(trainer, "outer_batch", 0)  # pictures of another loss in each step (bilevel training)
        outer = step_count(trainer, second).gflops if second else 0.0
        image = count(lambda: trainer.clip.encode_image(_images(trainer, size))).gflops if views else 0.0
    except (RuntimeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0][:120]
        raise UserError(
            f"{cfg.TRAINER.NAME} can't be estimated, since a step of it can't be counted by shapes ({reason})"
        ) from error
    batches, epochs = len(loader), max(cfg.OPTIM.MAX_EPOCH, 1)
    # Cached views: pictures are read and encoded for K epochs only.
    share = min(views / epochs, 1.0) if views else 1.0
    gflops = step.gflops + outer
    seconds = batches * (gflops - image * (1 - share)) / speed
    reading_seconds = batches * size * reading * share / max(loader.num_workers, 1)
    return Estimate(
        gflops,
        step.live_mb,
        (frozen + 4 * learned) / 2**20,
        batches,
        speed,
        reading,
        seconds + reading_seconds,
    )


def step_gflops(trainer: Any) -> float | None:  # any class with Dassl's interface
    """Return a training step's operations in 10^9, None where they can't be counted; the trainer has no numbers afterwards."""
    loader = getattr(trainer, "train_loader_x", None)
    if not hasattr(trainer, "clip") or loader is None or trainer.cfg.MODEL.COMPILE:
        return None
    try:
        size = min(loader.batch_size or 1, len(loader.dataset))
        key = type(trainer), type(trainer.model), _shapes(trainer, size)
        if key not in _counted:
            on_meta(trainer)
            _counted[key] = round(step_count(trainer, size).gflops, 3)
        return _counted[key]
    except (RuntimeError, NotImplementedError, ValueError, AttributeError):  # a training that ended is not lost over a count
        get_logger().debug("The step can't be counted", exc_info=True)
        return None


def _shapes(trainer: Any, size: int) -> str:
    """Return a digest of all that the operations of a step on ``size`` pictures follow from.

    Seed and training pictures are no part of it: what is learned of them has shapes of its own.
    """
    model, task = trainer.model, trainer.model.task
    words: list[Any] = [task.classnames, task.all_classnames, task.templates, task.template_groups, task.open_world]
    words.append(task.descriptions.plain(task.all_classnames))
    tensors = [*model.named_parameters(), *model.named_buffers(), *trainer.clip.named_parameters()]
    shapes = [(name, tuple(tensor.shape), tensor.requires_grad) for name, tensor in tensors]
    config = {key: str(value) for key, value in trainer.cfg.items() if key not in _NO_SHAPES}
    return digest_of([size, getattr(model, "taken", 0), words, shapes, config])


def on_meta(trainer: Counted) -> None:
    """Take the numbers away from a trainer's models, so that its steps can be counted at no cost."""
    trainer.clip.to("meta")
    trainer.model.to("meta")
    trainer.device = torch.device("meta")
    trainer.model.train()


def step_count(trainer: Counted, size: int, class_chunk: int | None = None) -> Count:
    """Count a step on ``size`` pictures, for a trainer on device ``meta``.

    Args:
        trainer: what ``on_meta`` left.
        size: pictures in the batch.
        class_chunk: as ``MODEL.CLASS_CHUNK``; None leaves it as it is.
    """
    images, labels = _images(trainer, size), torch.zeros(size, dtype=torch.long, device="meta")
    tower = trainer.clip.text
    before = tower.class_chunk
    tower.class_chunk = before if class_chunk is None else class_chunk

    def step() -> None:
        trainer.model.loss(trainer.model.step(images, labels)).total.backward()

    try:
        step()  # what is built once
        return count(step)
    finally:
        tower.class_chunk = before


def _images(trainer: Counted, size: int) -> torch.Tensor:
    return torch.empty(size, 3, *trainer.cfg.INPUT.SIZE, device="meta")


def _speed(trainer: Counted) -> float:
    """Return GFLOP per second of a small forward and backward pass through both towers."""
    clip = trainer.clip
    names = clip.tokenizer.class_tokens([f"class {i}" for i in range(20)])
    context = torch.zeros(1, 8, clip.text.width, device=trainer.device)
    images = torch.zeros(2, 3, *trainer.cfg.INPUT.SIZE, device=trainer.device)

    def work() -> None:
        F.normalize(clip.text(clip.text.compose(context.requires_grad_(), names)), dim=-1).sum().backward()
        with torch.no_grad():
            clip.encode_image(images)

    gflops = count(work).gflops
    best = float("inf")
    for _ in range(2):
        begin = time.perf_counter()
        work()
        if trainer.device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return gflops / best


def _reading(loader: Any) -> float:
    items = range(0, len(loader.dataset), max(len(loader.dataset) // 8, 1))
    begin = time.perf_counter()
    for index in items:
        loader.dataset[index]
    return (time.perf_counter() - begin) / max(len(items), 1)


@contextlib.contextmanager
def explained(trainer: Counted) -> Iterator[None]:
    """Turn a lack of memory inside the context into one line that says which settings help.

    Raises:
        UserError: memory did not suffice.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        advice = advise(trainer)
    else:
        return
    raise UserError(advice)


def advise(trainer: Counted) -> str:
    """Return what would need less memory than the step of ``trainer`` that failed; its numbers are gone afterwards."""
    kind = "the GPU's" if trainer.device.type == "cuda" else "this machine's"
    start = (
        f"out of memory: a step of {trainer.cfg.TRAINER.NAME} with {trainer.num_classes} classes does not fit into {kind} memory"
    )
    size = trainer.cfg.DATALOADER.TRAIN_X.BATCH_SIZE
    chunk = _CHUNK if trainer.num_classes > _CHUNK else max(trainer.num_classes // 2, 1)
    ways = {
        f"MODEL.CLASS_CHUNK {chunk}": (size, chunk),
        f"DATALOADER.TRAIN_X.BATCH_SIZE {max(size // 2, 1)}": (max(size // 2, 1), None),
    }
    try:
        on_meta(trainer)
        now = step_count(trainer, size).live_mb
        found = [(way, step_count(trainer, *settings).live_mb) for way, settings in ways.items()]
    except (RuntimeError, NotImplementedError):  # a method that can't be counted by shapes
        get_logger().debug("The step can't be counted", exc_info=True)
        return f"{start}; set {' or '.join(ways)}"
    shown = " or ".join(f"{way} ({mb:,.0f} MiB)" for way, mb in sorted(found, key=lambda pair: pair[1]))
    return f"{start} ({now:,.0f} MiB beside the weights, by count); set {shown}"
