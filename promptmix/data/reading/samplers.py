"""The order of pictures in an epoch: Dassl's samplers, with its random calls."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import RandomSampler, Sampler, SequentialSampler
from yacs.config import CfgNode

from promptmix.config.core import SAMPLERS
from promptmix.data.datum import Datum
from promptmix.errors import ConfigError

__all__ = [
    "RandomClassSampler",
    "RandomDomainSampler",
    "RandomSampler",
    "SeqDomainSampler",
    "SequentialSampler",
    "build_sampler",
]


def _indices(data_source: Sequence[Datum], attribute: str) -> dict[int, list[int]]:
    """Return attribute value -> positions of its items, in order of first appearance."""
    groups: dict[int, list[int]] = {}
    for index, item in enumerate(data_source):
        groups.setdefault(getattr(item, attribute), []).append(index)
    return groups


class _DomainSampler(Sampler[int]):
    """Batches with the same number of pictures from each of several domains, until a domain runs short.

    Args:
        data_source: the items.
        batch_size: pictures per batch, a multiple of the number of domains in it.
        n_domain: domains per batch; below 1 means all.

    Raises:
        ConfigError: sizes that don't go together.
    """

    def __init__(self, data_source: Sequence[Datum], batch_size: int, n_domain: int | None) -> None:
        self.data_source = data_source
        self.domain_dict = _indices(data_source, "domain")
        self.domains = list(self.domain_dict)
        if n_domain is None or n_domain <= 0:
            n_domain = len(self.domains)
        if n_domain > len(self.domains):
            raise ConfigError(f"N_DOMAIN is {n_domain}, but the training data has {len(self.domains)} domains")
        if batch_size % n_domain:
            kind = type(self).__name__
            raise ConfigError(f"{kind}: BATCH_SIZE is {batch_size}, but must be a multiple of {n_domain} (domains)")
        self.batch_size = batch_size
        self.n_domain = n_domain
        self.n_img_per_domain = batch_size // n_domain
        fewest = min(len(indices) for indices in self.domain_dict.values())
        if fewest < self.n_img_per_domain:
            raise ConfigError(
                f"{type(self).__name__}: a batch takes {self.n_img_per_domain} pictures per domain, "
                f"but one has only {fewest}; lower BATCH_SIZE"
            )
        # The length is found by drawing an epoch. Dassl does so too, and so both are at the same random state after it.
        self.length = len(list(iter(self)))

    def choose_domains(self) -> list[int]:
        """Return the domains of the next batch."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[int]:
        left = {domain: list(indices) for domain, indices in self.domain_dict.items()}
        order: list[int] = []
        short = False
        while not short:
            for domain in self.choose_domains():
                chosen = random.sample(left[domain], self.n_img_per_domain)
                order += chosen
                taken = set(chosen)
                left[domain] = [index for index in left[domain] if index not in taken]
                short = short or len(left[domain]) < self.n_img_per_domain
        return iter(order)

    def __len__(self) -> int:
        return self.length


class RandomDomainSampler(_DomainSampler):
    """Each batch takes ``n_domain`` domains at random and as many pictures of each."""

    def choose_domains(self) -> list[int]:
        """Return a random choice of domains."""
        return random.sample(self.domains, self.n_domain)


class SeqDomainSampler(_DomainSampler):
    """Each batch takes all domains in ascending order and as many pictures of each.

    Args:
        data_source: the items.
        batch_size: pictures per batch, a multiple of the number of domains.
    """

    def __init__(self, data_source: Sequence[Datum], batch_size: int) -> None:
        super().__init__(data_source, batch_size, n_domain=0)

    def choose_domains(self) -> list[int]:
        """Return all domains in ascending order."""
        return sorted(self.domains)


class RandomClassSampler(Sampler[int]):
    """Each batch takes some classes at random and ``n_ins`` pictures of each.

    Args:
        data_source: the items.
        batch_size: pictures per batch.
        n_ins: pictures per class; a class with fewer is drawn from with replacement.

    Raises:
        ConfigError: sizes that don't go together.
    """

    def __init__(self, data_source: Sequence[Datum], batch_size: int, n_ins: int) -> None:
        if batch_size < n_ins:
            raise ConfigError(f"RandomClassSampler: BATCH_SIZE is {batch_size}, but must be at least N_INS ({n_ins})")
        self.data_source = data_source
        self.batch_size = batch_size
        self.n_ins = n_ins
        self.ncls_per_batch = batch_size // n_ins
        self.index_dic = _indices(data_source, "label")
        self.labels = list(self.index_dic)
        if len(self.labels) < self.ncls_per_batch:
            raise ConfigError(
                f"RandomClassSampler: a batch takes {self.ncls_per_batch} classes (BATCH_SIZE // N_INS), but there are "
                f"{len(self.labels)}; raise N_INS or lower BATCH_SIZE"
            )
        self.length = len(list(iter(self)))  # by drawing an epoch, as Dassl does

    def __iter__(self) -> Iterator[int]:
        chunks: dict[int, list[list[int]]] = {label: self._chunks(label) for label in self.labels}
        open_labels = list(self.labels)
        order: list[int] = []
        while len(open_labels) >= self.ncls_per_batch:
            for label in random.sample(open_labels, self.ncls_per_batch):
                order += chunks[label].pop(0)
                if not chunks[label]:
                    open_labels.remove(label)
        return iter(order)

    def _chunks(self, label: int) -> list[list[int]]:
        """Shuffle a class and cut it into pieces of ``n_ins``; a shorter rest is left out."""
        indices: Any = list(self.index_dic[label])
        if len(indices) < self.n_ins:
            indices = np.random.choice(indices, size=self.n_ins, replace=True)
        random.shuffle(indices)
        whole = len(indices) // self.n_ins * self.n_ins
        return [[int(i) for i in indices[start : start + self.n_ins]] for start in range(0, whole, self.n_ins)]

    def __len__(self) -> int:
        return self.length


def build_sampler(
    sampler_type: str,
    cfg: CfgNode | None = None,
    data_source: Sequence[Datum] = (),
    batch_size: int = 32,
    n_domain: int = 0,
    n_ins: int = 16,
) -> Sampler[int]:
    """Build a sampler by the name that ``DATALOADER.*.SAMPLER`` gives.

    Raises:
        ConfigError: no such sampler, or sizes that don't go together.
    """
    if sampler_type == "RandomSampler":
        return RandomSampler(data_source)
    if sampler_type == "SequentialSampler":
        return SequentialSampler(data_source)
    if sampler_type == "RandomDomainSampler":
        return RandomDomainSampler(data_source, batch_size, n_domain)
    if sampler_type == "SeqDomainSampler":
        return SeqDomainSampler(data_source, batch_size)
    if sampler_type == "RandomClassSampler":
        return RandomClassSampler(data_source, batch_size, n_ins)
    raise ConfigError(f"unknown sampler {sampler_type!r} in DATALOADER (choices: {', '.join(SAMPLERS)})")
