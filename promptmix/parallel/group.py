"""The processes of one training: who has which part of a batch, how features come together, and who writes.

With P processes, features gathered from all parts get P times their gradient on the way back into a process's own part, and the
gradients of parameters are averaged over processes. Whatever was computed from a part then has the sum over all parts, and
whatever every process computed from everything has its own gradient, as on one device: exactly, up to rounding.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from promptmix.errors import ConfigError, TrainingError
from promptmix.parallel import launch

Returned = TypeVar("Returned")


class LostProcessError(TrainingError):
    """Another process of the training is gone, or did not answer in time."""


@dataclass(frozen=True)
class _Group:
    rank: int
    size: int
    #: Names the method in messages.
    what: str
    #: What tensors on GPUs go through; those on a CPU go through gloo.
    gpus: Any = None


_group: _Group | None = None
_paused = False


def size() -> int:
    """Return the number of processes that this training has."""
    return 1 if _group is None else _group.size


def writes() -> bool:
    """Tell whether this process writes files, logs and prints; all others are quiet."""
    return _group is None or _group.rank == 0


def divides() -> bool:
    """Tell whether work is divided at the moment."""
    return _group is not None and not _paused


@contextlib.contextmanager
def joined(device: torch.device, what: str) -> Iterator[None]:
    """Be one of the training's processes inside the context; nothing, where there is one process.

    Args:
        device: that this process computes on.
        what: the method, for messages.

    Raises:
        ConfigError: the processes don't compute on devices of one kind, such as fewer GPUs than processes.
        LostProcessError: another process is gone.
    """
    global _group
    rank, count = launch.place()
    if count == 1:
        yield
        return
    on_gpu = device.type == "cuda"
    patience = timedelta(seconds=launch.patience())
    meet = partial(dist.init_process_group, "gloo", init_method=launch.meeting_point(), rank=rank, world_size=count)
    _guarded(
        partial(meet, timeout=patience), f"the {count} processes did not all meet", "start all of them at a free MASTER_PORT"
    )
    _group = _Group(rank, count, what)
    try:
        kinds = _everyone(torch.tensor(float(on_gpu)))
        if 0 < kinds.sum() < count:
            raise ConfigError(
                f"{count} processes, but only {int(kinds.sum())} of them have a GPU; ask for as many (--devices), or for "
                "--device cpu"
            )
        if on_gpu:
            _group = replace(_group, gpus=_guarded(partial(dist.new_group, timeout=patience, backend="nccl")))
        yield
    except LostProcessError:
        launch.leave_quietly()
        raise
    finally:
        _group = None
        dist.destroy_process_group()


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """Compute everything in this process inside the context, as where others don't take part."""
    global _paused
    before, _paused = _paused, True
    try:
        yield
    finally:
        _paused = before


def part(count: int) -> slice:
    """Return which of ``count`` pictures or classes this process has; sizes differ by one at most, and may be 0."""
    if not divides() or _group is None:
        return slice(0, count)
    return _part(count, _group.rank, _group.size)


def _part(count: int, rank: int, processes: int) -> slice:
    return slice(count * rank // processes, count * (rank + 1) // processes)


def shared(count: int, encode: Callable[[slice], Any], dim: int = 0, what: str = "pictures") -> Any:
    """Return what ``encode`` gives for all ``count`` pictures or classes, of which it is asked for this process's part.

    Args:
        count: of all.
        encode: part -> features, or several tensors of features, each with the part along ``dim``. Without a part of its own a
            process encodes the first, which nobody reads.
        dim: axis along which parts lie.
        what: the parts are of, for messages.

    Raises:
        ConfigError: ``encode`` draws random numbers, which would be others than one process draws.
    """
    own = part(count)
    found = _encoded(own, encode, what)
    if isinstance(found, Tensor):
        return _gathered(found, own, count, dim)
    return tuple(_gathered(one, own, count, dim) for one in found)


def _encoded(own: slice, encode: Callable[[slice], Any], what: str) -> Any:
    before = _random_states()
    found = encode(own if own.stop > own.start else slice(0, 1))
    if any(not torch.equal(a, b) for a, b in zip(before, _random_states(), strict=True)):
        name = _group.what if _group is not None else ""
        raise ConfigError(
            f"{name} draws random numbers while it encodes {what} (dropout), so that --devices would give other numbers than one "
            "device; switch dropout off, or leave --devices out"
        )
    return found


def _random_states() -> list[Tensor]:
    states = [torch.get_rng_state()]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states.append(torch.cuda.get_rng_state())
    return states


def _gathered(found: Tensor, own: slice, count: int, dim: int) -> Tensor:
    held = own.stop - own.start
    if found.shape[dim] != max(held, 1):
        raise ValueError(f"features of a part of {max(held, 1)} have the shape {tuple(found.shape)}")
    gathered: Tensor = _Gather.apply(found, own, count, dim)
    return gathered


class _Gather(torch.autograd.Function):
    """All parts, one after another; back goes this process's own part of the gradient, times the number of processes."""

    @staticmethod
    def forward(ctx: Any, found: Tensor, own: slice, count: int, dim: int) -> Tensor:
        ctx.own, ctx.dim, ctx.held = own, dim, found.shape[dim]
        return _all_parts(found, count, dim)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        held = ctx.own.stop - ctx.own.start
        mine = gradient.narrow(ctx.dim, ctx.own.start, held) if held else gradient.narrow(ctx.dim, 0, ctx.held) * 0
        return mine * size(), None, None, None


def _all_parts(found: Tensor, count: int, dim: int) -> Tensor:
    """Return the parts of all processes, joined along ``dim``."""
    spans = [_part(count, rank, size()) for rank in range(size())]
    sizes = [span.stop - span.start for span in spans]
    rows = found.detach().movedim(dim, 0)[: sizes[dist.get_rank()]]
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in sizes]
    _guarded(partial(dist.all_gather, parts, padded, group=_way(padded)))
    return torch.cat([one[:held] for one, held in zip(parts, sizes, strict=True)]).movedim(0, dim)


@torch.no_grad()
def average(tensors: Iterable[Tensor | None]) -> None:
    """Average gradients over processes, in place; every process has the same ones, and None where nothing was propagated."""
    if not divides():
        return
    by_kind: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        if tensor is not None:
            by_kind.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for same in by_kind.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in same])
        _guarded(partial(dist.all_reduce, flat, group=_way(flat)))
        for tensor, whole in zip(same, (flat / size()).split([tensor.numel() for tensor in same]), strict=True):
            tensor.copy_(whole.view_as(tensor))


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Average the gradients of ``parameters`` over processes; one that several optimizers hold counts once."""
    if divides():
        average({id(parameter): parameter.grad for parameter in parameters}.values())


def agree(value: bool) -> bool:
    """Return whether every process says so: what decides whether they work together must be the same for all."""
    return bool(_everyone(torch.tensor(float(value))).all()) if divides() else value


def wait() -> None:
    """Wait until every process is here, such as for a file that one of them writes."""
    if divides():
        _everyone(torch.zeros(()))


@contextlib.contextmanager
def one_first() -> Iterator[None]:
    """Have the writing process go through the context before the others, which then find what it has made."""
    if not writes():
        wait()
    yield
    if writes():
        wait()


def same_seed() -> int:
    """Return a random seed that all processes know."""
    seed = random.SystemRandom().randrange(2**31)
    return seed if _group is None else int(_everyone(torch.tensor(float(seed), dtype=torch.float64))[0])


def refuse_differences(numbers: Sequence[Tensor], exact: Sequence[Tensor] = ()) -> None:
    """Stop a training whose processes went different ways: then its numbers would not be those of one device.

    Args:
        numbers: that all processes computed from the whole batch, equal up to rounding, such as loss and scores.
        exact: the learned tensors, which the same gradients moved.

    Raises:
        ConfigError: they differ.
    """
    if not divides() or _group is None:
        return
    near = torch.cat([torch.zeros(1), *(number.detach().cpu().reshape(-1) for number in numbers)]).double()
    sums = [torch.stack([one.detach().double().sum(), one.detach().double().square().sum()]).cpu() for one in exact]
    same = bool((_everyone(torch.tensor(float(len(near)))) == len(near)).all())
    if same:
        every = _everyone(torch.cat([near, *sums]))
        spread = (every.amax(0) - every.amin(0)).nan_to_num(0.0)
        same = bool((spread[: len(near)] <= 1e-3 * (1 + near.abs().amax())).all() and (spread[len(near) :] == 0).all())
    if not same:
        raise ConfigError(
            f"{_group.what} comes to different numbers in the {_group.size} processes of --devices, since it works beside the "
            "towers that they share; leave --devices out"
        )


def _way(tensor: Tensor) -> Any:
    """Return the process group that ``tensor`` goes through."""
    return _group.gpus if _group is not None and tensor.is_cuda else None


def _everyone(value: Tensor) -> Tensor:
    """Return the CPU tensor ``value`` of every process, stacked."""
    found = [torch.empty_like(value) for _ in range(size())]
    _guarded(partial(dist.all_gather, found, value))
    return torch.stack(found)


def _guarded(
    call: Callable[[], Returned],
    what: str = "another process of this training is gone or did not answer",
    remedy: str = "the same command goes on from the last epoch",
) -> Returned:
    """Make one line of what torch says when another process is gone."""
    try:
        return call()
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise LostProcessError(f"{what} ({reason}); {remedy}") from error
