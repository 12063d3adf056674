"""Any number of workers, staying or started anew each epoch, gives the same batches and the same random states."""

from __future__ import annotations

import copy
import gc
import itertools
import os
import random
import signal
import time
import traceback
from multiprocessing import active_children

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, get_worker_info

from promptmix.config import get_cfg_default
from promptmix.data import DataManager, DatasetBase, DatasetWrapper, Datum, build_data_loader, build_transform
from promptmix.data.features.views import in_order
from promptmix.data.reading.loaders import TrainLoader
from promptmix.data.reading.streams import get_streams
from promptmix.errors import DataError
from promptmix.registry import DATASET_REGISTRY
from promptmix.utils import set_random_seed

BOTH = (False, True)


class Drawing(DatasetWrapper):
    """Pictures with augmentations, with numbers from each random stream beside them and who drew them."""

    def __getitem__(self, idx):
        info = get_worker_info()
        drawn = [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.randn(()).item()]
        item = {"drawn": torch.tensor([*drawn, np.random.randint(1 << 40)], dtype=torch.float64)}
        who = {"worker": torch.tensor([info.seed, info.id] if info else []), "kind": type(info.dataset).__name__ if info else ""}
        return {**super().__getitem__(idx), **item, **who, "pid": os.getpid()}


@pytest.fixture
def items(tmp_path):
    made = []
    pixels = np.random.RandomState(0)
    for n in range(22):
        path = tmp_path / f"{n}.png"
        Image.fromarray(pixels.randint(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
        made.append(Datum(str(path), n % 3, n % 2, f"c{n % 3}"))
    return made


@pytest.fixture
def cfg():
    cfg = get_cfg_default()
    cfg.INPUT.SIZE = (12, 12)
    cfg.INPUT.TRANSFORMS = ("random_resized_crop", "random_flip", "colorjitter", "randaugment", "normalize")
    cfg.DATALOADER.NUM_WORKERS = 2
    return cfg


@pytest.fixture
def build(cfg, items):
    def made(stay, sampler="RandomSampler", wrapper=Drawing, workers=2, streams=True, **options):
        cfg.DATALOADER.PERSISTENT_WORKERS, cfg.DATALOADER.NUM_WORKERS, cfg.DATALOADER.SAMPLE_STREAMS = stay, workers, streams
        set_random_seed(3)
        loader = build_data_loader(cfg, sampler, items, 4, tfm=build_transform(cfg), dataset_wrapper=wrapper, **options)
        assert type(loader) is (TrainLoader if streams or stay else DataLoader)
        return loader

    yield made
    gc.collect()  # an error's traceback holds the pass that it came from
    assert not active_children()  # the test's loader is gone, and its workers with it


def pids(batches):
    return {pid for batch in batches for pid in batch["pid"].tolist()}


def assert_same(plain, staying, keys=("img", "index", "label", "drawn", "worker")):
    """Compare lists of epochs, each a list of batches and the random states after it."""
    assert len(plain) == len(staying)
    for (batches, streams), (others, their_streams) in zip(plain, staying, strict=True):
        assert len(batches) == len(others) > 0
        for batch, other in zip(batches, others, strict=True):
            assert batch["impath"] == other["impath"]
            assert batch["kind"] == other["kind"] or "worker" not in keys
            assert all(torch.equal(batch[key], other[key]) for key in keys)
        assert all(torch.equal(streams[name], their_streams[name]) for name in streams)


SAMPLERS = ["RandomSampler", "SequentialSampler", "RandomDomainSampler", "RandomClassSampler"]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_any_number_of_workers_gives_the_same_epochs(build, sampler):
    seen = []
    for workers in (0, 1, 2):
        loader, epochs = build(workers == 2, sampler, workers=workers), []
        for _ in range(2):
            batches = []
            for batch in loader:
                batches.append(batch)
                torch.rand(1), random.random(), np.random.rand()  # a method that draws while it learns
            epochs.append((batches, get_streams()))
        seen.append(epochs)
        drawn = torch.cat([batch["drawn"] for batches, _ in epochs for batch in batches])
        assert len(drawn.unique(dim=0)) == len(drawn) > 30  # no two pictures share a stream
        assert abs(torch.corrcoef(drawn[:, [2, 4]].T)[0, 1]) < 0.5  # nor numpy and torch
    for other in seen[1:]:
        assert_same(seen[0], other, keys=("img", "index", "label", "drawn"))


def test_pictures_read_together_have_a_stream_for_the_batch(build):
    class Together(Drawing):
        def __getitems__(self, indices):
            return [self[index] for index in indices]

    seen = [[(list(build(False, wrapper=Together, workers=workers)), get_streams())] for workers in (0, 2)]
    assert_same(*seen, keys=("img", "index", "label", "drawn"))


def test_two_loaders_read_in_turn_are_the_same_for_any_number_of_workers(build):
    """As TrainerXU reads them: both are started before either is read."""
    seen = []
    for workers in (0, 2):
        one, other = build(False, workers=workers), build(False, workers=workers)
        set_random_seed(4)
        pairs = list(zip(iter(one), iter(other), strict=True))
        seen.append([([a for a, _ in pairs], {}), ([b for _, b in pairs], get_streams())])
    assert_same(*seen, keys=("img", "index", "label", "drawn"))


def test_dassls_streams_are_a_key_away(build, cfg):
    """One stream for each process: without workers, augmentations draw where the order is drawn."""
    loader = build(False, workers=0, streams=False)
    set_random_seed(3)
    batches = list(loader)
    set_random_seed(3)
    plain = list(DataLoader(loader.dataset, batch_size=4, sampler=loader.sampler, drop_last=True))
    assert_same([(batches, {})], [(plain, {})])
    assert_same([(list(build(False, streams=False)), get_streams())], [(list(build(True, streams=False)), get_streams())])


@pytest.mark.parametrize(
    ("sampler", "streams"), [("RandomSampler", True), ("RandomClassSampler", True), ("RandomSampler", False)]
)
def test_batches_and_random_states_are_those_of_new_workers(build, sampler, streams):
    seen = []
    for stay in BOTH:
        loader = build(stay, sampler, streams=streams)
        epochs = []
        for epoch in range(3):
            epochs.append((list(loader), get_streams()))
            torch.rand(epoch), random.random()  # what training itself draws
        seen.append(epochs)
        assert len({batch["img"].sum().item() for batches, _ in epochs for batch in batches}) == sum(len(b) for b, _ in epochs)
        started = [pids(batches) for batches, _ in epochs]
        assert all(len(each) == 2 for each in started) and len(set.union(*started)) == (2 if stay else 6)
    assert_same(*seen)
    assert len(loader) == len(iter(loader))


def test_the_same_seed_at_the_start_of_each_epoch_gives_the_same_epoch(build):
    seen = []
    for stay in BOTH:
        loader, epochs = build(stay), []
        for _ in range(2):
            torch.manual_seed(8)
            epochs.append((list(loader), {}))
        assert_same(epochs[:1], epochs[1:])
        seen.append(epochs)
    assert_same(*seen)


@pytest.mark.parametrize("read", [1, 4])
def test_after_an_abandoned_epoch_the_next_is_right(build, read):
    seen = []
    for stay in BOTH:
        loader = build(stay)
        epochs = [(list(itertools.islice(loader, read)), get_streams())]
        epochs += [(list(loader), get_streams()) for _ in range(2)]
        seen.append(epochs)
        assert len(set.union(*(pids(batches) for batches, _ in epochs[1:]))) == (2 if stay else 4)
    assert_same(*seen)


def test_two_passes_at_once_do_not_disturb_each_other(build):
    seen = []
    for stay in BOTH:
        loader = build(stay)
        epochs = [(list(loader), get_streams())]
        pairs = list(zip(loader, loader, strict=True))
        epochs += [([one for one, _ in pairs], {}), ([other for _, other in pairs], get_streams())]
        outer = iter(loader)
        first = next(outer)
        epochs.append((list(loader), get_streams()))
        epochs.append(([first, *outer], get_streams()))
        assert next(outer, None) is None
        epochs.append((list(loader), get_streams()))
        seen.append(epochs)
    assert_same(*seen)


def test_what_is_set_on_the_data_set_reaches_the_workers(build, cfg):
    seen = []
    for stay in BOTH:
        loader = build(stay)
        epochs = [(list(loader), get_streams())]
        loader.dataset.transform = build_transform(cfg, is_train=False)
        epochs.append((list(loader), get_streams()))
        seen.append(epochs)
    assert_same(*seen)
    img = seen[1][1][0][0]["img"]
    assert torch.equal(img, torch.stack([loader.dataset.transform(Image.open(path)) for path in seen[1][1][0][0]["impath"]]))


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C is sent in another way there")
def test_workers_that_ended_are_started_anew(build):
    loader = build(True)
    gone = pids(loader)
    for pid in gone:
        os.kill(pid, signal.SIGTERM)  # not SIGINT, which jobs in the background ignore
    while active_children():
        time.sleep(0.01)
    assert len(pids(loader) - gone) == 2


def test_workers_end_with_the_loader_and_when_it_is_closed(build):
    loader = build(True)
    next(iter(loader))
    assert len(active_children()) == 2
    loader.close()
    assert not active_children()
    batches = iter(loader)
    loader.close()
    assert len(list(batches)) == 5  # a pass keeps its workers
    del batches
    assert not active_children()
    first = pids(loader)
    assert pids(copy.deepcopy(loader)).isdisjoint(first)
    del loader
    assert not active_children()


class Broken(Drawing):
    """One picture can't be read, the first time."""

    def __getitem__(self, idx):
        if idx == 5 and not os.path.exists(self.data_source[0].impath + ".read"):
            open(self.data_source[0].impath + ".read", "w").close()
            raise DataError("picture 5 is broken")
        return super().__getitem__(idx)


def test_an_error_in_a_worker_arrives_and_the_next_epoch_is_right(build, items):
    seen = []
    for stay in BOTH:
        loader = build(stay, wrapper=Broken)
        with pytest.raises(DataError, match="picture 5 is broken") as caught:
            list(loader)
        # Its frames hold the pass; left to the garbage collector, the workers would take 5 s each to end.
        traceback.clear_frames(caught.tb)
        del caught
        seen.append([(list(loader), get_streams())])
        os.remove(items[0].impath + ".read")
    assert_same(*seen)


def test_only_training_loaders_with_workers_keep_them(cfg, items, build):
    class Pngs(DatasetBase):
        def __init__(self, cfg):
            super().__init__(train_x=items, train_u=items, val=items, test=items)

    DATASET_REGISTRY.register(Pngs, name="LoaderPngs")
    try:
        cfg.DATASET.NAME = "LoaderPngs"
        dm = DataManager(cfg)
        assert [type(loader) for loader in (dm.train_loader_x, dm.train_loader_u)] == [TrainLoader] * 2
        assert [type(loader) for loader in (dm.val_loader, dm.test_loader)] == [DataLoader] * 2
        assert dm.train_loader_x.dataset.data_source is items  # not what lies around it in the workers
        assert dm.train_loader_x.persistent_workers and not in_order(dm.train_loader_x).persistent_workers
        cfg.DATALOADER.NUM_WORKERS = 0
        assert not DataManager(cfg).train_loader_x.persistent_workers
    finally:
        DATASET_REGISTRY._entries.pop("LoaderPngs")
