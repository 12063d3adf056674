"""Orders of an epoch against Dassl's samplers for the same seed."""

import pytest
from torch.utils.data import DataLoader

from promptmix.data import Datum, build_sampler
from promptmix.errors import ConfigError
from promptmix.utils import set_random_seed

LABEL_AND_DOMAIN = [(3, 0), (1, 1), (4, 0), (0, 2), (1, 0), (2, 1)]
ITEMS = [Datum(f"p{n}", *LABEL_AND_DOMAIN[(n * n + n // 7) % 6]) for n in range(30)]

# Recorded with Dassl's build_sampler on the same items: seed 5, sampler made, a first epoch, the start of a second.
ORDERS = {
    "RandomDomainSampler": (
        {"batch_size": 4, "n_domain": 2},
        [23, 14, 17, 24, 4, 18, 19, 3],
        [0, 11, 17, 3, 13, 7, 29, 10],
    ),
    "SeqDomainSampler": (
        {"batch_size": 6},
        [13, 21, 29, 5, 17, 3, 23, 6, 12, 10, 19, 24],
        [9, 4, 8, 26, 17, 3, 0, 27],
    ),
    "RandomClassSampler": (
        {"batch_size": 8, "n_ins": 4},
        [19, 3, 17, 24, 16, 14, 21, 20, 29, 10, 8, 15, 11, 28, 7, 18],
        [10, 15, 8, 29, 5, 22, 9, 26],
    ),
    "RandomSampler": (
        {},
        [7, 14, 29, 10, 18, 28, 5, 2, 23, 26, 22, 12, 25, 15, 3, 8, 0, 21, 13, 1, 6, 11, 27, 20, 17, 16, 24, 19, 9, 4],
        [8, 3, 16, 29, 11, 5, 14, 19],
    ),
    "SequentialSampler": ({}, list(range(30)), list(range(8))),
}


@pytest.mark.parametrize("name", ORDERS)
def test_orders_are_dassls(name):
    keys, first, second = ORDERS[name]
    set_random_seed(5)
    sampler = build_sampler(name, data_source=ITEMS, **keys)
    assert list(sampler) == first
    assert list(sampler)[:8] == second


def test_length_is_that_of_the_epoch_drawn_first():
    set_random_seed(5)
    assert len(build_sampler("SeqDomainSampler", data_source=ITEMS, batch_size=6)) == 12


def test_batches_of_a_loader_are_dassls():
    # Recorded with Dassl's sampler in a DataLoader without workers, seed 3: an epoch, then the next epoch's first batch.
    set_random_seed(3)
    sampler = build_sampler("RandomSampler", data_source=ITEMS)
    loader = DataLoader(range(30), batch_size=8, sampler=sampler, drop_last=True)
    assert [batch.tolist() for batch in loader] == [
        [26, 21, 22, 13, 8, 6, 0, 24],
        [14, 15, 28, 17, 20, 23, 19, 18],
        [12, 25, 1, 2, 7, 11, 29, 27],
    ]
    assert next(iter(loader)).tolist() == [3, 0, 15, 6, 10, 7, 14, 12]


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("RandomSampler2", {}, "unknown sampler 'RandomSampler2'.*RandomClassSampler"),
        ("RandomDomainSampler", {"batch_size": 5, "n_domain": 2}, "BATCH_SIZE is 5.*multiple of 2"),
        ("RandomDomainSampler", {"batch_size": 8, "n_domain": 4}, "N_DOMAIN is 4.*3 domains"),
        ("SeqDomainSampler", {"batch_size": 30}, "10 pictures per domain.*lower BATCH_SIZE"),
        ("RandomClassSampler", {"batch_size": 4, "n_ins": 8}, "BATCH_SIZE is 4.*at least N_INS"),
        ("RandomClassSampler", {"batch_size": 16, "n_ins": 2}, "takes 8 classes.*there are 5"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(name, keys, message):
    with pytest.raises(ConfigError, match=message):
        build_sampler(name, data_source=ITEMS, **keys)
