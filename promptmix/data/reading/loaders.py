"""Training batches from worker processes that stay from epoch to epoch, and are those of workers started anew each epoch.

torch's ``persistent_workers`` alone gives other batches: workers go on with the random numbers of the last epoch, and the main
process draws one number less in each. Here every pass draws the workers' seed where a new iterator would, and each worker takes
it with its first batch of the pass. Only public parts of torch are used (>= 2.4): a second ``DataLoader`` with
``persistent_workers`` lies inside, whose batch sampler sends the seed along and whose data set reads it in the worker.
"""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

__all__ = ["PersistentLoader"]

#: Which pass a batch belongs to, the seed of its workers, and the items.
TaggedBatch = tuple[int, int, list[int]]


class PersistentLoader(DataLoader[Any]):
    """A loader whose workers stay, with the batches and the random states of one whose workers don't.

    It takes what ``DataLoader`` takes, with workers and a batch size. ``worker_init_fn`` is called at the start of each pass and
    has to seed numpy, since torch's own way to do so has no public name.

    Workers are started anew where the old ones would not do: when a pass begins while another one is still held (each then
    keeps its own), when they have ended (Ctrl-C reaches them too), and when an attribute of the loader or of its data set was
    set since. What workers can't see is a change further inside, of a transform's own attributes or of another module, and what
    a data set remembers in a worker is not forgotten; ``DATALOADER.PERSISTENT_WORKERS False`` is for those.
    """

    _staying: _Staying | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        staying, made_of = self._staying, self._made_of()
        if staying is None or not staying.fit(made_of):
            self.close()
            others = active_children()
            loader = self._start()
            batches = _Pass(loader)
            self._staying = staying = _Staying(loader, made_of, [child for child in active_children() if child not in others])
        else:
            batches = _Pass(staying.loader)
        staying.last = weakref.ref(batches)
        return batches

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_staying": None}  # a copy has no workers yet

    def close(self) -> None:
        """End the workers, once no pass holds them; a later pass starts new ones."""
        self._staying = None

    def _start(self) -> DataLoader[Any]:
        tagged: Any = _TaggedBatches(self.batch_sampler, self.generator)
        return DataLoader(
            _Reseeded(self.dataset, self.worker_init_fn),
            batch_sampler=tagged,
            num_workers=self.num_workers,
            collate_fn=self.collate_fn,
            pin_memory=self.pin_memory,
            timeout=self.timeout,
            multiprocessing_context=self.multiprocessing_context,
            prefetch_factor=self.prefetch_factor,
            persistent_workers=True,
            generator=torch.Generator(),  # torch draws a seed of its own, once, which nobody reads
        )

    def _made_of(self) -> list[object]:
        """Return the objects that workers get a copy of, or are told, when they are started."""
        own = [self.num_workers, self.worker_init_fn, self.collate_fn, self.pin_memory, self.timeout, self.prefetch_factor]
        return [*own, self.multiprocessing_context, self.generator, *getattr(self.dataset, "__dict__", {}).values()]


@dataclass
class _Staying:
    """Workers that stay.

    Attributes:
        loader: torch's loader that has them.
        made_of: what they were started with.
        workers: their processes.
        last: the latest pass over them.
    """

    loader: DataLoader[Any]
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

    def __next__(self) -> Any:  # noqa: ANN401
        if self.ended:
            raise StopIteration
        try:
            return next(self.batches)
        except StopIteration:
            self.ended = True
            raise

    def __len__(self) -> int:
        return len(self.batches)


class _TaggedBatches(Sampler[TaggedBatch]):
    """The batches of a sampler with the number of the pass and the seed of its workers.

    The number tells passes apart whose seeds are the same, as after ``torch.manual_seed`` at the start of each.
    """

    def __init__(self, batches: Any, generator: torch.Generator | None) -> None:  # noqa: ANN401
        self.batches, self.generator = batches, generator
        self.number = 0

    def __iter__(self) -> Iterator[TaggedBatch]:
        # torch takes the first batches while it makes or resets an iterator, so this is drawn when a new one would draw its own:
        # before the sampler draws anything.
        seed = int(torch.empty((), dtype=torch.int64).random_(generator=self.generator))
        self.number += 1
        number = self.number
        for indices in self.batches:
            yield number, seed, indices

    def __len__(self) -> int:
        return len(self.batches)


class _Reseeded(Dataset[Any]):
    """A data set in a worker, which seeds the worker as torch seeds a new one whenever a pass begins.

    Args:
        dataset: the data set itself.
        seed_more: the loader's ``worker_init_fn``.
    """

    def __init__(self, dataset: Dataset[Any], seed_more: Callable[[int], None] | None) -> None:
        self.dataset, self.seed_more = dataset, seed_more
        self.number = 0

    def __getitems__(self, batch: TaggedBatch) -> Sequence[Any]:
        number, seed, indices = batch
        if number != self.number:
            self.number = number
            self._reseed(seed)
        together: Callable[[list[int]], Sequence[Any]] | None = getattr(self.dataset, "__getitems__", None)
        return together(indices) if together else [self.dataset[index] for index in indices]

    def _reseed(self, seed: int) -> None:
        info: Any = get_worker_info()
        # Read-only, since torch sets it once; a data set or worker_init_fn may ask for it.
        object.__setattr__(info, "seed", seed + info.id)
        object.__setattr__(info, "dataset", self.dataset)
        random.seed(info.seed)
        torch.manual_seed(info.seed)
        if self.seed_more:
            self.seed_more(info.id)
