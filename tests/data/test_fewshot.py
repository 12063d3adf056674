"""Few-shot picks, base/new classes and split files against Dassl's and CoOp's for the same seed."""

import json
import random

import pytest

from promptmix.data import Datum, generate_fewshot, load_split, save_split, subsample_classes
from promptmix.data.base import DatasetBase
from promptmix.errors import ConfigError, DataError
from promptmix.utils import set_random_seed

LABEL_AND_DOMAIN = [(3, 0), (1, 1), (4, 0), (0, 2), (1, 0), (2, 1)]


def toy_items(count=60):
    """Five classes in scrambled order, three domains; item n is called pNN."""
    pairs = [LABEL_AND_DOMAIN[(n * n + n // 7) % 6] for n in range(count)]
    return [Datum(f"p{n:02d}", label, domain, f"c{label}") for n, (label, domain) in enumerate(pairs)]


def numbers(items):
    return [int(item.impath[1:]) for item in items]


# Recorded with Dassl's DatasetBase.generate_fewshot_dataset on the same items: seed, then 3 shots of the first 40 items,
# then 2 shots with repetition of the last 20, then the next random number.
PICKS = {
    1: (
        [14, 6, 37, 2, 23, 30, 24, 38, 3, 11, 18, 7, 29, 36, 8],
        [59, 45, 48, 42, 51, 43, 53, 49, 50, 57],
        0.6495461355254983,
    ),
    2: (
        [0, 6, 37, 12, 4, 9, 19, 17, 38, 7, 28, 32, 10, 29, 31],
        [59, 45, 58, 56, 51, 46, 49, 55, 52, 57],
        0.9318465539698684,
    ),
}


@pytest.mark.parametrize("seed", PICKS)
def test_picks_are_dassls(seed):
    items = toy_items()
    dataset = DatasetBase(train_x=items, test=items)
    set_random_seed(seed)
    train = dataset.generate_fewshot_dataset(items[:40], num_shots=3)
    val = dataset.generate_fewshot_dataset(items[40:], num_shots=2, repeat=True)
    assert (numbers(train), numbers(val), random.random()) == PICKS[seed]


def test_several_sources_and_no_shots():
    items = toy_items()
    dataset = DatasetBase(train_x=items, test=items)
    assert dataset.generate_fewshot_dataset(items, num_shots=0) is items
    assert dataset.generate_fewshot_dataset(items, items[:3], num_shots=-1) == (items, items[:3])
    both = dataset.generate_fewshot_dataset(items, items, num_shots=1)
    assert [len(split) for split in both] == [5, 5]


def test_small_classes_are_taken_whole_or_repeated():
    items = [Datum("a", 0), Datum("b", 0), Datum("c", 1)]
    assert [item.impath for item in generate_fewshot(items, 4)] == ["a", "b", "c"]
    repeated = generate_fewshot(items, 4, repeat=True)
    assert [item.label for item in repeated] == [0] * 4 + [1] * 4


# Recorded with CoOp's OxfordPets.subsample_classes on items 0-19 and 20-39: (number, new label).
SUBSAMPLES = {
    "base": (
        "1:1 2:1 3:0 4:1 5:1 8:2 9:1 10:2 12:1 15:2 17:0 19:0",
        "22:1 23:1 24:0 25:1 26:1 29:2 30:1 31:2 33:1 36:2 38:0",
    ),
    "new": ("0:0 6:0 7:1 11:1 13:1 14:0 16:0 18:1", "20:0 21:0 27:0 28:1 32:1 34:1 35:0 37:0 39:1"),
}


@pytest.mark.parametrize("subsample", SUBSAMPLES)
def test_base_and_new_classes_are_coops(subsample):
    items = toy_items(40)
    splits = subsample_classes(items[:20], items[20:], subsample=subsample)
    shown = [" ".join(f"{int(i.impath[1:])}:{i.label}" for i in split) for split in splits]
    assert tuple(shown) == SUBSAMPLES[subsample]
    domains = {item.impath: item.domain for item in items}
    assert all(item.domain == domains[item.impath] for split in splits for item in split)


def test_subsample_all_and_unknown():
    items = toy_items(10)
    assert subsample_classes(items, items[:2]) == [items, items[:2]]
    with pytest.raises(ConfigError, match="SUBSAMPLE_CLASSES is 'old'.*all, base, new"):
        subsample_classes(items, subsample="old")


def test_split_file_round_trip(tmp_path):
    root = tmp_path / "images"
    items = [Datum(str(root / "a" / "1.png"), 0, 0, "ant"), Datum("/elsewhere/2.png", 1, 2, "bee")]
    path = tmp_path / "split_fewshot" / "shot_1-seed_1.json"
    save_split(path, {"train": items, "val": []}, root)
    assert json.loads(path.read_text()) == {"train": [["a/1.png", 0, "ant"], ["/elsewhere/2.png", 1, "bee", 2]], "val": []}
    again = load_split(path, root)
    assert [repr(item) for item in again["train"]] == [repr(item) for item in items]
    assert again["val"] == []


ODD_ROWS = ('["a.png", 0]', '[1, 0, "ant"]', '["a.png", 1.5, "ant"]', '["a.png", -1, "ant"]', '["a.png", true, "ant"]', '"a1c"')


@pytest.mark.parametrize("content", ["not json", "[]", "5", *(f'{{"train": [{row}]}}' for row in ODD_ROWS)])
def test_bad_split_file_is_named(tmp_path, content):
    path = tmp_path / "split.json"
    path.write_text(content)
    with pytest.raises(DataError, match="split.json"):
        load_split(path)


def test_dataset_attributes():
    dataset = DatasetBase(train_x=toy_items(), test=toy_items(5))
    assert (dataset.num_classes, dataset.classnames) == (5, ["c0", "c1", "c2", "c3", "c4"])
    assert dataset.lab2cname == dict(enumerate(dataset.classnames))
    assert (dataset.val, dataset.train_u, len(dataset.test)) == (None, None, 5)
    assert {key: len(group) for key, group in dataset.split_dataset_by_domain(dataset.test).items()} == {0: 3, 1: 1, 2: 1}
    with pytest.raises(DataError, match="no training data"):
        DatasetBase(train_x=[])


def test_domains_are_checked():
    class Styles(DatasetBase):
        domains = ["flat", "black"]

    dataset = Styles(train_x=toy_items())
    dataset.check_input_domains(["flat"], ["black"])
    with pytest.raises(ConfigError, match="unknown domain 'red' of Styles .choices: flat, black"):
        dataset.check_input_domains(["flat"], ["red"])
    with pytest.raises(ConfigError, match="DATASET.SOURCE_DOMAINS is empty"):
        dataset.check_input_domains([], ["black"])


def test_datum_cannot_be_changed():
    item = Datum("a.png", 1, 2, "ant")
    with pytest.raises(AttributeError):
        item.label = 3
    with pytest.raises(AttributeError):
        item.extra = 1
