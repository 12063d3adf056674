"""What a run will need, before it runs: memory and operations of a step counted by shapes, seconds by the machine's numbers."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from yacs.config import CfgNode

from promptmix.clip.vision import are_pictures
from promptmix.cost import memory
from promptmix.cost.count import Count, count
from promptmix.cost.machine import measure_machine
from promptmix.cost.work import Work, work_of
from promptmix.errors import UserError, is_out_of_memory
from promptmix.files.digests import digest_of
from promptmix.utils import get_logger

#: Resident memory that a step takes for each byte of its live tensors: scratch inside kernels, and holes in the heap.
HEAP = 1.5

#: Classes in memory at a time that the message proposes.
_CHUNK = 64
#: Numbers of a model below which a step is counted while it runs: by shapes it would take five to ten times as long.
_SMALL = 50_000_000
#: Nodes of the config that no step reads; the data set's words are asked for themselves.
_NO_SHAPES = ("SEED", "OUTPUT_DIR", "RESUME", "DATASET", "PROTOCOL", "TEST", "LOGGER")
#: Operations of a step, by what they follow from: the seeds of an experiment have the same, and counting takes a second.
_counted: dict[tuple[type, type, str], float] = {}


class Counted(Protocol):
    """What is read of a trainer (a ``PromptTrainer``, which knows this module)."""

    cfg: CfgNode
    clip: Any
    model: Any
    device: torch.device
    precision: Any
    train_loader_x: Any
    waits_to_check: bool

    @property
    def num_classes(self) -> int:
        """Number of classes."""

    def build_optimizer(self, model: Any) -> torch.optim.Optimizer:
        """Return the optimizer of the learned tensors."""

    def take_gradients(self, loss: torch.Tensor, terms: Any) -> None:
        """Put gradients into the learned tensors."""


@dataclass(frozen=True)
class Estimate:
    """What training is expected to need.

    Attributes:
        step: a step on pictures, with the optimizer's part.
        ran: whether the step ran to be counted, since shapes don't tell what it does.
        weights_mb: the frozen model, the learned tensors, their gradients and the optimizer's moments, in MiB.
        peak_mb: peak of the process's resident memory, in MiB; None on a GPU, or where the system doesn't tell.
        batches: steps of an epoch.
        step_seconds: a step, by the machine's numbers.
        seconds_per_picture: reading and transforming, in one process.
        epoch_seconds: steps and reading of an epoch, one after the other.
        dispatch_us: the host's microseconds for an operator, as measured.
    """

    step: Work
    ran: bool
    weights_mb: float
    peak_mb: float | None
    batches: int
    step_seconds: float
    seconds_per_picture: float
    epoch_seconds: float
    dispatch_us: float

    @property
    def step_gflops(self) -> float:
        """Operations of a step, in 10^9."""
        return self.step.gflops

    @property
    def step_mb(self) -> float:
        """Peak of live tensors in a step, in MiB."""
        return self.step.live_mb


def estimate(trainer: Counted) -> Estimate:
    """Return what training is expected to need; the trainer is not to be used afterwards.

    Raises:
        UserError: the method learns nothing by steps, or a step of it can't be counted.
    """
    cfg, loader = trainer.cfg, trainer.train_loader_x
    if not any(parameter.requires_grad for parameter in trainer.model.parameters()):
        raise UserError(f"{cfg.TRAINER.NAME} learns nothing by steps of a training, so there is no step to estimate")
    reading = _reading(loader)
    with trainer.precision.autocast():
        machine = measure_machine(trainer.clip)
    memory.reset_peak()
    resident = memory.resident_mb() if trainer.device.type == "cpu" else None
    learned = sum(p.numel() for p in trainer.model.parameters()) * 4
    frozen = sum(p.numel() for p in trainer.clip.parameters()) * 4
    size = min(loader.batch_size or 1, len(loader.dataset))
    try:
        step, ran = training_step(trainer, size)
        image = _image_work(trainer, size) if cfg.INPUT.CACHED_VIEWS else Work()
    except (RuntimeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0][:120]
        raise UserError(f"{cfg.TRAINER.NAME} can't be estimated, since a step of it can't be counted ({reason})") from error
    batches, epochs, views = len(loader), max(cfg.OPTIM.MAX_EPOCH, 1), cfg.INPUT.CACHED_VIEWS
    # Cached views: pictures are read and encoded for K epochs only.
    share = min(views / epochs, 1.0) if views else 1.0
    seconds = machine.seconds(step)
    steps = batches * (seconds - (1 - share) * machine.seconds(image))
    reading_seconds = batches * size * reading * share / max(loader.num_workers, 1)
    return Estimate(
        step,
        ran,
        (frozen + 4 * learned) / 2**20,
        None if resident is None else peak_of(resident, step.live_mb),
        batches,
        seconds,
        reading,
        steps + reading_seconds,
        machine.dispatch_us,
    )


def peak_of(resident_mb: float, live_mb: float) -> float:
    """Return the peak of resident memory in MiB.

    Args:
        resident_mb: before the first step, with weights and PyTorch itself.
        live_mb: counted peak of live tensors in a step.
    """
    return resident_mb + HEAP * live_mb


def training_step(trainer: Counted, size: int) -> tuple[Work, bool]:
    """Count a whole step on ``size`` pictures, with the optimizer's part, and tell whether it had to run.

    Shapes tell what most methods do; where numbers decide, the step runs once on the trainer's device.
    """
    second: int = getattr(trainer, "outer_batch", 0)  # pictures of another loss in each step (bilevel training)
    try:
        with without_numbers(trainer):
            return _whole_step(trainer, [size, *([second] if second else [])]), False
    except (RuntimeError, NotImplementedError):
        get_logger().debug("The step can't be counted by shapes", exc_info=True)
    return _whole_step(trainer, [size, *([second] if second else [])]), True


def _whole_step(trainer: Counted, sizes: Sequence[int]) -> Work:
    batches = [_batch(trainer, size) for size in sizes]
    optimizer = trainer.build_optimizer(trainer.model)

    def step() -> None:
        for images, labels in batches:
            terms = trainer.model.loss(trainer.model.step(images, labels))
            optimizer.zero_grad()
            trainer.take_gradients(terms.total, terms)
        optimizer.step()

    trainer.waits_to_check = True  # no look at a loss that may have no number
    step()  # what is built once
    return work_of(step)


def _image_work(trainer: Counted, size: int) -> Work:
    with without_numbers(trainer), torch.no_grad():
        images = _batch(trainer, size)[0]
        return work_of(lambda: trainer.clip.encode_image(images))


@contextlib.contextmanager
def without_numbers(trainer: Counted) -> Iterator[None]:
    """Take the numbers away from a trainer's models in the context, so that what they do is counted at no cost."""
    modules = [*trainer.clip.modules(), *trainer.model.modules()]
    kept = [(dict(module._parameters), dict(module._buffers)) for module in modules]
    device = trainer.device
    on_meta(trainer)
    try:
        yield
    finally:
        trainer.device = device
        for module, (parameters, buffers) in zip(modules, kept, strict=True):
            module._parameters.update(parameters)
            module._buffers.update(buffers)


def step_gflops(trainer: Any) -> float | None:  # any class with Dassl's interface
    """Return a training step's operations in 10^9, None where they can't be counted; the trainer is not to be used afterwards."""
    loader = getattr(trainer, "train_loader_x", None)
    if not hasattr(trainer, "clip") or loader is None or trainer.cfg.MODEL.COMPILE:
        return None
    try:
        stages = getattr(trainer, "stages", None)
        if stages is not None:
            stages.turn_to(stages.bounds[-1])  # a training that went on behind its end has entered none
        size = min(loader.batch_size or 1, len(loader.dataset))
        key = type(trainer), type(trainer.model), _shapes(trainer, size)
        if key not in _counted:
            if trainer.device.type == "cpu" and sum(p.numel() for p in trainer.clip.parameters()) < _SMALL:
                trainer.model.train()
            else:
                on_meta(trainer)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)  # some steps leave things out by chance
                _counted[key] = round(_step_gflops(trainer, size), 3)
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
    words.append(task.descriptions.as_lists(task.all_classnames))
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
    """Count a step on ``size`` pictures, which costs nothing for a trainer on device ``meta``.

    Args:
        trainer: what ``on_meta`` left, or one whose step may run.
        size: pictures in the batch.
        class_chunk: as ``MODEL.CLASS_CHUNK``; None leaves it as it is.
    """
    tower = trainer.clip.text
    before = tower.class_chunk
    tower.class_chunk = before if class_chunk is None else class_chunk
    try:
        count(lambda: _step(trainer, 2))  # what is built once
        return count(lambda: _step(trainer, size))
    finally:
        tower.class_chunk = before


def _step_gflops(trainer: Counted, size: int) -> float:
    """Return ``step_count(trainer, size).gflops``, a frozen image tower asked for one picture: it does the same for each."""
    model, others = trainer.model, 0.0
    encode = model.features

    def features(images: torch.Tensor) -> torch.Tensor:
        nonlocal others
        if not (model.image_is_frozen and are_pictures(images)):
            given: torch.Tensor = encode(images)
            return given
        found: list[torch.Tensor] = []
        others += (len(images) - 1) * count(lambda: found.append(encode(images[:1]))).gflops
        return found[0].expand(len(images), *found[0].shape[1:]).contiguous()

    with contextlib.ExitStack() as stack:
        model.features = features
        stack.callback(delattr, model, "features")
        if trainer.device.type == "meta":  # where what nobody counts runs in Python
            count(lambda: _step(trainer, 2))
        else:
            _step(trainer, 2)  # what is built once
        others = 0.0
        return count(lambda: _step(trainer, size)).gflops + others


def _step(trainer: Counted, size: int) -> None:
    """Do a step on ``size`` pictures that leaves gradients and no more."""
    images, labels = _batch(trainer, size)
    trainer.model.loss(trainer.model.step(images, labels)).total.backward()


def _batch(trainer: Counted, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return made-up pictures (B, 3, S, S) and labels (B,) on the trainer's device."""
    images = torch.zeros(size, 3, *trainer.cfg.INPUT.SIZE, device=trainer.device)
    return images, torch.zeros(size, dtype=torch.long, device=trainer.device)


def _reading(loader: Any) -> float:
    """Return the median of the seconds for a picture; the first ones also wait for what is imported and opened once."""
    seconds = []
    for index in range(0, len(loader.dataset), max(len(loader.dataset) // 8, 1)):
        begin = time.perf_counter()
        loader.dataset[index]
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds) if seconds else 0.0


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
