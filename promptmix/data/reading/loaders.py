"""Training batches that depend on the seed alone: not on how many workers read them, nor on how long those have lived.

A pass over a loader draws two numbers from torch's generator, as a ``DataLoader`` does: a seed, then the sampler's. Each
picture's augmentation has a random stream of its own, made of that seed and of the picture's place in the pass, so that 0, 1 or 8
workers give the same pixels. (Dassl has one stream for each process, which no other number of workers can reproduce: where a
picture's stream begins depends on what the pictures before it in the same process drew. ``DATALOADER.SAMPLE_STREAMS False`` is
that.)

Workers may stay from pass to pass. torch's ``persistent_workers`` alone gives other batches: workers go on with the random
numbers of the last pass, and the main process draws one number less in each. Only public parts of torch are used (>= 2.4): a
second ``DataLoader`` lies inside, whose batch sampler sends seed and places along and whose data set reads them where the picture
is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from promptmix.parallel import group

__all__ = ["ReadyLoader", "TrainLoader", "end_quietly", "seed_streams", "streams_kept"]


@dataclass(frozen=True)
class _Batch:
    """What is asked of the data set: ``indices`` of the items, as batch of one pass.

    Attributes:
        number: of the pass. It tells passes apart whose seeds are the same, as after ``torch.manual_seed`` at the start of each.
        seed: of the pass.
        place: of the first item in the pass.
        indices: of the items.
    """

    number: int
    seed: int
    place: int
    indices: list[int]


class ReadyLoader(DataLoader[Any]):
    """A loader that calls its data set's ``make_ready``, where it has one, before anything is read."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self._make_ready()
        return super().__iter__()

    def _make_ready(self) -> None:
        make_ready: Callable[[], None] | None = getattr(self.dataset, "make_ready", None)
        if make_ready:
            make_ready()


class TrainLoader(ReadyLoader):
    """A loader whose batches and whose effect on torch's generator are the same for any number of workers.

    It takes what ``DataLoader`` takes, with a batch size. ``persistent_workers`` keeps workers from pass to pass;
    ``worker_init_fn`` is called in a worker at the start of each pass and has to seed numpy, since torch's own way to do so has
    no public name. The order of a whole pass is drawn when the pass begins.

    Workers that stay are started anew where the old ones would not do: when a pass begins while another one is still held (each
    then keeps its own), when they have ended (Ctrl-C reaches them too), and when an attribute of the loader or of its data set
    was set since. What workers can't see is a change further inside, of a transform's own attributes or of another module, and
    what a data set remembers in a worker is not forgotten; ``DATALOADER.PERSISTENT_WORKERS False`` is for those.

    Args:
        args: as ``DataLoader`` takes them.
        sample_streams: give each item a random stream of its own; False leaves one to each process, as Dassl has it.
        options: as ``DataLoader`` takes them.
    """

    _staying: _Staying | None = None

    def __init__(self, *args: Any, sample_streams: bool = True, **options: Any) -> None:
        self.sample_streams = sample_streams
        super().__init__(*args, **options)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self._make_ready()
        seed = int(torch.empty((), dtype=torch.int64).random_(generator=self.generator))
        order = list(self.batch_sampler or ())
        if not self.persistent_workers:
            return iter(self._start(_Batches(seed, order)))
        staying, made_of = self._staying, self._made_of()
        if staying is None or not staying.fit(made_of):
            self.close()
            others = active_children()
            batches = _Batches(seed, order)
            loader = self._start(batches)
            started = _Pass(loader)
            workers = [child for child in active_children() if child not in others]
            self._staying = staying = _Staying(loader, batches, made_of, workers)
        else:
            staying.batches.turn_to(seed, order)
            started = _Pass(staying.loader)
        staying.last = weakref.ref(started)
        return started

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_staying": None}  # a copy has no workers yet

    def close(self) -> None:
        """End the workers that stay, once no pass holds them; a later pass starts new ones."""
        self._staying = None

    def _start(self, batches: _Batches) -> DataLoader[Any]:
        return DataLoader(
            _Seeded(self.dataset, self.worker_init_fn, self.sample_streams),
            batch_sampler=batches,  # type: ignore[arg-type]  # a batch with its seed and place, which _Seeded understands
            num_workers=self.num_workers,
            collate_fn=self.collate_fn,
            pin_memory=self.pin_memory,
            timeout=self.timeout,
            multiprocessing_context=self.multiprocessing_context,
            prefetch_factor=self.prefetch_factor,
            persistent_workers=self.persistent_workers,
            worker_init_fn=end_quietly,
            generator=torch.Generator(),  # torch draws a seed of its own, which nobody reads
        )

    def _made_of(self) -> list[object]:
        """Return the objects that workers get a copy of, or are told, when they are started."""
        own = [self.num_workers, self.worker_init_fn, self.collate_fn, self.pin_memory, self.timeout, self.prefetch_factor]
        own += [self.multiprocessing_context, self.generator, self.sample_streams]
        return [*own, *getattr(self.dataset, "__dict__", {}).values()]


@dataclass
class _Staying:
    """Workers that stay.

    Attributes:
        loader: torch's loader that has them.
        batches: what it asks them for.
        made_of: what they were started with.
        workers: their processes.
        last: the latest pass over them.
    """

    loader: DataLoader[Any]
    batches: _Batches
    made_of: list[object]
    workers: list[BaseProcess]
    last: weakref.ref[_Pass] | None = None

    def fit(self, made_of: list[object]) -> bool:
        """Tell whether these workers can begin another pass, for a loader made of ``made_of``."""
        last = self.last() if self.last else None
        same = len(made_of) == len(self.made_of) and all(a is b for a, b in zip(made_of, self.made_of, strict=True))
        return same and (last is None or last.ended) and all(worker.is_alive() for worker in self.workers)


class _Pass(Iterator[Any]):
    """One pass over a loader. torch has one iterator for all passes, which can't tell whether somebody still reads it."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.batches = iter(loader)
        self.ended = False

    def __next__(self) -> Any:
        if self.ended:
            raise StopIteration
        try:
            return next(self.batches)
        except StopIteration:
            self.ended = True
            raise

    def __len__(self) -> int:
        return len(self.batches)


class _Batches(Sampler[_Batch]):
    """The batches of the present pass.

    Args:
        seed: of the first pass.
        order: its batches of indices.
    """

    def __init__(self, seed: int, order: list[list[int]]) -> None:
        self.number = 0
        self.turn_to(seed, order)

    def turn_to(self, seed: int, order: list[list[int]]) -> None:
        """Begin another pass."""
        self.number += 1
        self.seed, self.order = seed, order

    def __iter__(self) -> Iterator[_Batch]:
        number, seed, place = self.number, self.seed, 0
        for indices in self.order:
            yield _Batch(number, seed, place, indices)
            place += len(indices)

    def __len__(self) -> int:
        return len(self.order)


class _Seeded(Dataset[Any]):
    """A data set, read with the random streams that belong to each pass and item.

    Args:
        dataset: the data set itself.
        seed_more: the loader's ``worker_init_fn``.
        sample_streams: see ``TrainLoader``.
    """

    def __init__(self, dataset: Dataset[Any], seed_more: Callable[[int], None] | None, sample_streams: bool) -> None:
        self.dataset, self.seed_more, self.sample_streams = dataset, seed_more, sample_streams
        self.number = 0

    def __getitems__(self, batch: _Batch) -> Sequence[Any]:
        if get_worker_info() is None:
            with streams_kept() if self.sample_streams else contextlib.nullcontext():
                return self._read(batch)
        if batch.number != self.number:
            self.number = batch.number
            self._seed_worker(batch.seed)
        return self._read(batch)

    def _read(self, batch: _Batch) -> Sequence[Any]:
        together: Callable[[list[int]], Sequence[Any]] | None = getattr(self.dataset, "__getitems__", None)
        if together:
            if self.sample_streams:
                seed_streams(batch.seed, batch.place)
            return together(batch.indices)
        if self.sample_streams:  # what a picture draws changes nothing for others, so that this process may leave some out
            return read_part(self.dataset, batch.indices, lambda place: seed_streams(batch.seed, batch.place + place))
        return [self.dataset[index] for index in batch.indices]

    def _seed_worker(self, seed: int) -> None:
        """Seed this worker as torch seeds a new one."""
        info: Any = get_worker_info()
        # Read-only, since torch sets it once; a data set or worker_init_fn may ask for it.
        object.__setattr__(info, "seed", seed + info.id)
        object.__setattr__(info, "dataset", self.dataset)
        random.seed(info.seed)
        torch.manual_seed(info.seed)
        if self.seed_more:
            self.seed_more(info.id)


def read_part(dataset: Any, indices: list[int], before: Callable[[int], None] = lambda place: None) -> list[Any]:
    """Read a batch; of a training on several devices this process's part, with blank pictures in the places of the others.

    The towers encode the very same part (``promptmix.parallel.group.part``), so that nobody looks at what is blank.

    Args:
        dataset: with a method ``blank(index, like)`` where it can do without a picture; otherwise all are read.
        indices: of the batch's items.
        before: called with the place in the batch of each item that is read.
    """
    part = group.part(len(indices)) if hasattr(dataset, "blank") else slice(0, len(indices))
    own = range(part.start, max(part.stop, part.start + 1)) if part.stop > part.start else range(1)
    items: list[Any] = [None] * len(indices)
    for place in own:
        before(place)
        items[place] = dataset[indices[place]]
    like = items[own[0]]
    return [dataset.blank(index, like) if item is None else item for index, item in zip(indices, items, strict=True)]


def end_quietly(_worker: int = 0) -> None:
    """Have SIGTERM end this worker without an error.

    A whole process group gets that signal where Slurm or ``timeout`` sends it. torch's workers die of it, and raise errors in the
    main process that is ending too.
    """
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))


def seed_streams(seed: int, place: int | str) -> None:
    """Begin the streams of python, numpy and torch (CPU) that belong to ``place`` in the pass of ``seed``."""
    digest = hashlib.blake2b(f"{seed} {place}".encode(), digest_size=24).digest()
    random.seed(digest[:8])
    np.random.seed(np.frombuffer(digest[8:16], dtype="<u4"))
    # Not torch.manual_seed, which would seed the GPUs too: those belong to the training.
    torch.default_generator.manual_seed(int.from_bytes(digest[16:], "little"))


@contextlib.contextmanager
def streams_kept() -> Iterator[None]:
    """Leave the streams of this process as they were: without workers, pictures are read where the training draws."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
