"""Reading pictures, batches and loaders on a small data set of generated PNGs."""

import os
import random
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision import transforms as T

from promptmix.config import get_cfg_default
from promptmix.data import (
    DATASET_REGISTRY,
    DataManager,
    DatasetBase,
    DatasetWrapper,
    Datum,
    build_data_loader,
    build_dataset,
    read_image,
    require_folder,
)
from promptmix.data.reading.manager import _seed_worker
from promptmix.errors import ConfigError, DataError, RegistryError
from promptmix.utils import set_random_seed


@pytest.fixture
def items(tmp_path):
    made = []
    for n in range(10):
        path = tmp_path / f"{n}.png"
        Image.new("RGB", (12, 8), (20 * n, 10, 255 - 20 * n)).save(path)
        made.append(Datum(str(path), n % 3, n % 2, f"c{n % 3}"))
    return made


@pytest.fixture
def cfg(items, tmp_path):
    class PngToy(DatasetBase):
        def __init__(self, cfg):
            super().__init__(train_x=items, train_u=items[:4], val=items[:3], test=items)

    DATASET_REGISTRY.register(PngToy, force=True)
    cfg = get_cfg_default()
    cfg.DATASET.NAME, cfg.DATASET.ROOT = "PngToy", str(tmp_path)
    cfg.INPUT.SIZE, cfg.INPUT.TRANSFORMS = (8, 8), ("normalize",)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.DATALOADER.TRAIN_X.BATCH_SIZE = 4
    cfg.DATALOADER.TEST.BATCH_SIZE = 4
    yield cfg
    DATASET_REGISTRY._entries.pop("PngToy")


def test_manager_has_dassls_attributes(cfg, capsys):
    dm = DataManager(cfg)
    assert (dm.num_classes, dm.num_source_domains, dm.lab2cname) == (3, 0, {0: "c0", 1: "c1", 2: "c2"})
    # Training leaves the last, smaller batch out; evaluation doesn't.
    assert [len(loader) for loader in (dm.train_loader_x, dm.train_loader_u, dm.val_loader, dm.test_loader)] == [2, 1, 1, 3]
    out = capsys.readouterr().out
    assert "Loading dataset: PngToy" in out
    assert "# train_x  10" in out


def test_batches_have_dassls_keys(cfg, items):
    batch = next(iter(DataManager(cfg).test_loader))
    assert sorted(batch) == ["domain", "img", "impath", "index", "label"]
    assert batch["img"].shape == (4, 3, 8, 8)
    assert batch["label"].tolist() == [0, 1, 2, 0]
    assert batch["domain"].tolist() == [0, 1, 0, 1]
    assert batch["index"].tolist() == [0, 1, 2, 3]
    assert batch["impath"] == [item.impath for item in items[:4]]


def test_batch_order_depends_on_the_seed_alone(cfg):
    def order(seed):
        set_random_seed(seed)
        loader = DataManager(cfg).train_loader_x
        return [batch["index"].tolist() for _ in range(2) for batch in loader]

    # Recorded with Dassl's sampler in a DataLoader over 10 items, batches of 4, the last left out, two epochs, seed 1.
    assert order(1) == [[4, 2, 0, 6], [8, 7, 9, 1], [4, 8, 1, 5], [0, 2, 3, 6]]
    assert order(1) != order(2)


def test_few_items_make_one_small_batch(cfg, items):
    loader = build_data_loader(cfg, "RandomSampler", items[:3], batch_size=8, tfm=T.ToTensor(), is_train=True)
    assert [len(batch["label"]) for batch in loader] == [3]


def test_several_transforms_copies_and_img0(cfg, items):
    cfg.DATALOADER.K_TRANSFORMS, cfg.DATALOADER.RETURN_IMG0 = 2, True
    wrapper = DatasetWrapper(cfg, items, transform=[T.ToTensor(), T.Compose([T.ToTensor(), T.CenterCrop(4)])], is_train=True)
    item = wrapper[2]
    assert [copy.shape for copy in item["img"]] == [(3, 8, 12)] * 2
    assert [copy.shape for copy in item["img2"]] == [(3, 4, 4)] * 2
    assert item["img0"].shape == (3, 8, 8)
    # Evaluation never repeats.
    assert DatasetWrapper(cfg, items, transform=T.ToTensor(), is_train=False)[2]["img"].shape == (3, 8, 12)
    with pytest.raises(ConfigError, match="K_TRANSFORMS is 2"):
        DatasetWrapper(cfg, items, transform=None, is_train=True)


def test_without_transform_the_picture_itself_comes(cfg, items):
    assert DatasetWrapper(cfg, items)[0]["img"].getpixel((0, 0)) == (0, 10, 255)


def test_custom_transforms_and_wrapper(cfg, capsys):
    class Labels(Dataset):
        def __init__(self, cfg, data_source, transform=None, is_train=False):
            self.items, self.is_train = data_source, is_train

        def __len__(self):
            return len(self.items)

        def __getitem__(self, index):
            return {"label": self.items[index].label, "train": self.is_train}

    dm = DataManager(cfg, T.ToTensor(), T.ToTensor(), dataset_wrapper=Labels)
    assert next(iter(dm.test_loader))["train"].tolist() == [False] * 4
    assert next(iter(dm.train_loader_x))["train"].tolist() == [True] * 4
    out = capsys.readouterr().out
    assert "* Using custom transform for training" in out
    assert "* Using custom transform for testing" in out


def test_workers_give_the_same_order(cfg):
    orders = []
    for workers in (0, 2):
        cfg.DATALOADER.NUM_WORKERS = workers
        set_random_seed(4)
        loader = DataManager(cfg).train_loader_x
        orders.append([batch["index"].tolist() for batch in loader])
    assert orders[0] == orders[1]


def test_workers_seed_python_and_numpy():
    torch.manual_seed(12)
    _seed_worker(0)
    first = random.random(), np.random.rand()
    torch.manual_seed(12)
    _seed_worker(3)
    assert (random.random(), np.random.rand()) == first
    torch.manual_seed(13)
    _seed_worker(0)
    assert random.random() != first[0]


def test_unknown_dataset_lists_choices(cfg):
    cfg.DATASET.NAME = "PngToi"
    with pytest.raises(RegistryError, match="unknown dataset 'PngToi'; did you mean 'PngToy'"):
        build_dataset(cfg)


def test_missing_root_says_what_to_set(cfg):
    cfg.DATASET.ROOT = "/no/such/place"
    with pytest.raises(DataError, match="no folder /no/such/place; set --root"):
        build_dataset(cfg)


def test_require_folder(tmp_path):
    assert require_folder(tmp_path, "Toy") == tmp_path
    (tmp_path / "pets").mkdir()
    with pytest.raises(DataError, match="data set Toy: no folder .*cars .*holds pets.*--root"):
        require_folder(tmp_path / "cars", "Toy")


def test_empty_split_is_refused(cfg):
    with pytest.raises(DataError, match="a split of data set PngToy is empty"):
        build_data_loader(cfg, data_source=[])


def test_samplers_that_fill_no_batch_are_refused(cfg, items):
    # Two classes of four make eight indices in an epoch, fewer than a batch of nine.
    with pytest.raises(DataError, match="RandomClassSampler: no whole batch of 9 in 10 items"):
        build_data_loader(cfg, "RandomClassSampler", items, batch_size=9, n_ins=4)


def test_read_image_from_file_and_zip(items, tmp_path):
    pack = tmp_path / "pack.zip"
    with zipfile.ZipFile(pack, "w") as file:
        file.write(items[3].impath, "styles/3.png")
    for path in (items[3].impath, f"{pack}::styles/3.png"):
        img = read_image(path)
        assert (img.mode, img.size, img.getpixel((0, 0))) == ("RGB", (12, 8), (60, 10, 195))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="workers are forked on this system only")
def test_zip_handles_are_not_shared_by_workers(cfg, tmp_path):
    pack = tmp_path / "pack.zip"
    with zipfile.ZipFile(pack, "w") as file:
        for n in range(40):
            png = tmp_path / "one.png"
            Image.new("RGB", (32, 32), (n, 2 * n, 3 * n)).save(png)
            file.write(png, f"{n}.png")
    source = [Datum(f"{pack}::{n}.png", n) for n in range(40)]
    read_image(source[0].impath)  # the parent's handle is open before the workers start
    cfg.DATALOADER.NUM_WORKERS = 2
    loader = build_data_loader(cfg, data_source=source, batch_size=5, tfm=T.PILToTensor(), is_train=False)
    for batch in loader:
        assert batch["img"][:, 0, 0, 0].tolist() == batch["label"].tolist()


@pytest.mark.parametrize("path", ["gone.png", "gone.zip::a.png", "pack.zip::gone.png", "text.png", "text.png::a.png"])
def test_unreadable_pictures_are_named(tmp_path, path):
    (tmp_path / "text.png").write_text("no picture")
    with zipfile.ZipFile(tmp_path / "pack.zip", "w") as file:
        file.writestr("a.txt", "no picture")
    with pytest.raises(DataError, match=path.split("::")[-1] if "pack" in path else path.split("::")[0]):
        read_image(str(tmp_path / path))


def test_download_unpacks_beside_the_archive(tmp_path, items, capsys):
    source = tmp_path / "source.zip"
    with zipfile.ZipFile(source, "w") as file:
        file.write(items[0].impath, "images/0.png")
    dataset = DatasetBase(train_x=items)
    target = tmp_path / "data" / "toy" / "toy.zip"
    dataset.download_data(source.as_uri(), str(target), from_gdrive=False)
    assert (target.parent / "images" / "0.png").is_file()
    assert f"File extracted to {target.parent}" in capsys.readouterr().out
    with pytest.raises(DataError, match="can't get .*gone.zip.*unpack it in"):
        dataset.download_data((tmp_path / "gone.zip").as_uri(), str(tmp_path / "data" / "gone.zip"), from_gdrive=False)
    assert sorted(entry.name for entry in (tmp_path / "data").iterdir()) == ["toy"]


def test_download_from_drive_without_gdown_says_so(tmp_path, items, monkeypatch):
    monkeypatch.setitem(sys.modules, "gdown", None)
    with pytest.raises(DataError, match="takes the package gdown"):
        DatasetBase(train_x=items).download_data("https://drive.example/x", str(tmp_path / "x.zip"))
