"""Decoded pictures on disk: the batches of a run without them, to the bit; nothing believed that is not what was written."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from promptmix.cli import main
from promptmix.config import get_cfg_default
from promptmix.data import Datum, build_data_loader, read_image
from promptmix.data.features.cache import cache_folder
from promptmix.data.features.pictures import PictureCache, split_transform
from promptmix.data.reading.transforms import build_transform
from promptmix.errors import UserError
from promptmix.utils import set_random_seed
from tests import forked

TRANSFORMS = {
    "resized at first": ("normalize", "random_flip"),
    "cropped at random": ("random_resized_crop", "random_flip", "colorjitter", "normalize"),
    "shifted": ("random_translation", "normalize"),
    "augmented": ("random_resized_crop", "randaugment", "cutout", "normalize"),
}


@pytest.fixture
def items(tmp_path):
    """Twelve pictures: photographs of several sizes, one that lies on its side, one that is partly transparent, one twice."""
    made = []
    for n in range(11):
        rng = np.random.RandomState(n)
        coarse = Image.fromarray(rng.randint(0, 256, (5, 6, 3), dtype=np.uint8))
        path = tmp_path / f"{n}.{'png' if n == 10 else 'jpg'}"
        picture = coarse.resize((40 + 3 * n, 61 - 2 * n), Image.Resampling.BICUBIC)
        exif = Image.Exif()
        exif[0x0112] = 6 if n == 9 else 1
        if n == 10:
            picture.putalpha(Image.fromarray(rng.randint(0, 256, picture.size[::-1], dtype=np.uint8)))
        picture.save(path, exif=exif)
        made.append(Datum(str(path), n % 3, 0, f"c{n % 3}"))
    return [*made, made[0]]


@pytest.fixture
def loader(items, tmp_path):
    def make(kept, *, workers=0, names=TRANSFORMS["cropped at random"], **keys):
        cfg = get_cfg_default()
        cfg.INPUT.SIZE, cfg.INPUT.TRANSFORMS = (32, 32), names
        cfg.INPUT.PICTURE_CACHE, cfg.INPUT.FEATURE_CACHE_DIR = kept, str(tmp_path / "cache")
        cfg.DATALOADER.NUM_WORKERS = workers
        for key, value in keys.items():
            node, _, name = key.partition("__")
            cfg[node][name] = value
        set_random_seed(3)
        tfm = build_transform(cfg, is_train=True)
        return build_data_loader(cfg, "RandomSampler", items, batch_size=4, tfm=tfm, is_train=True)

    return make


def files(tmp_path):
    return sorted((tmp_path / "cache" / "pictures").glob("*"))


def batches(loader, epochs=2):
    found = [batch for _ in range(epochs) for batch in loader]
    return found, torch.get_rng_state()


def tensors(batch):
    img = batch["img"] if isinstance(batch["img"], list) else [batch["img"]]
    return [*img, batch["index"], *([batch["img0"]] if "img0" in batch else [])]


def same(one, other):
    pairs = [(a, b) for x, y in zip(one[0], other[0], strict=True) for a, b in zip(tensors(x), tensors(y), strict=True)]
    return all(torch.equal(a, b) for a, b in pairs) and torch.equal(one[1], other[1])


def only_from_the_cache(monkeypatch):
    monkeypatch.setattr("promptmix.data.features.pictures.read_image", None)
    monkeypatch.setattr("promptmix.data.reading.manager.read_image", None)


@pytest.mark.parametrize("names", TRANSFORMS.values(), ids=list(TRANSFORMS))
@pytest.mark.parametrize("reading", ["benchmark", "upright"])
def test_batches_are_the_same_to_the_bit(names, reading, loader, tmp_path, monkeypatch):
    plain = batches(loader(False, names=names, INPUT__READING=reading))
    assert not files(tmp_path)
    assert same(plain, batches(loader(True, names=names, INPUT__READING=reading)))
    assert len(files(tmp_path)) == 1
    only_from_the_cache(monkeypatch)  # no picture is opened any more
    assert same(plain, batches(loader(True, names=names, INPUT__READING=reading)))


@pytest.mark.parametrize("keys", [{"DATALOADER__K_TRANSFORMS": 2}, {"DATALOADER__RETURN_IMG0": True}], ids=["copies", "img0"])
def test_copies_and_the_plain_picture_are_the_same(keys, loader, tmp_path):
    names = TRANSFORMS["resized at first"]
    assert same(batches(loader(False, names=names, **keys)), batches(loader(True, names=names, **keys)))
    assert len(files(tmp_path)) == 1


@pytest.mark.parametrize("keys", [{}, {"DATALOADER__SAMPLE_STREAMS": False, "DATALOADER__PERSISTENT_WORKERS": False}])
def test_workers_read_what_the_main_process_mapped(keys, loader, tmp_path, monkeypatch):
    plain = batches(loader(False, workers=2, **keys))
    first = loader(True, workers=2, **keys)
    first.dataset.make_ready()
    only_from_the_cache(monkeypatch)
    assert same(plain, batches(loader(True, workers=2, **keys)))


def test_a_new_process_maps_the_file_itself(loader, items, tmp_path):
    data = loader(True).dataset
    data.make_ready()
    copied = pickle.loads(pickle.dumps(data.kept))
    assert len(pickle.dumps(data.kept)) < 10_000  # no pixels travel
    for item in items:
        assert copied.picture(item.impath).tobytes() == data.kept.picture(item.impath).tobytes()
    (tmp_path / "kept").write_bytes(pickle.dumps(data.kept))

    def size(words):  # with a promptmix of its own, which has mapped nothing
        kept = pickle.loads(Path(words[0]).read_bytes())
        print(kept.picture(words[1]).size)
        return 0

    done = forked.run([str(tmp_path / "kept"), items[4].impath], work=size)
    assert done.stdout.strip() == str(data.kept.picture(items[4].impath).size), done.stderr


DAMAGES = {
    "a pixel": lambda raw: raw[:5000] + bytes([raw[5000] ^ 1]) + raw[5001:],
    "a size": lambda raw: raw[:-16] + (7).to_bytes(8, "little") + raw[-8:],
    "cut off": lambda raw: raw[:-9],
    "empty": lambda raw: b"",
    "another file": lambda raw: b"hello",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=list(DAMAGES))
def test_a_damaged_file_is_made_anew(damage, loader, tmp_path, capsys):
    plain = batches(loader(False))
    batches(loader(True))
    (path,) = files(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert same(plain, batches(loader(True)))
    assert "Cached pictures in" in capsys.readouterr().out and path.read_bytes() == whole


@pytest.mark.parametrize("sizes", [[[1 << 40, 1 << 40]] * 11, [[0, 5]] * 11, [[-3, -3]] * 11, [[2, 2]] * 11])
def test_sizes_that_do_not_fit_the_pixels_are_not_believed(sizes, loader, tmp_path):
    plain = batches(loader(False))
    batches(loader(True))
    (path,) = files(tmp_path)
    PictureCache(path.parent).put(path.stem, {"pixels": torch.zeros(64, dtype=torch.uint8), "sizes": torch.tensor(sizes)}, "")
    assert same(plain, batches(loader(True)))  # with a digest that is right


@pytest.mark.parametrize("what", ["picture", "reading", "size"])
def test_other_pictures_or_pixels_get_another_file(what, loader, items, tmp_path):
    names = TRANSFORMS["resized at first"]
    batches(loader(True, names=names))
    keys = {"reading": {"INPUT__READING": "upright"}, "size": {"INPUT__SIZE": (16, 24)}}.get(what, {})
    if what == "picture":
        Image.new("RGB", (50, 50), (1, 2, 3)).save(items[5].impath)
    assert same(batches(loader(False, names=names, **keys)), batches(loader(True, names=names, **keys)))
    assert len(files(tmp_path)) == 2


def test_another_method_shares_the_file_and_what_is_random_makes_no_other(loader, tmp_path):
    for names in (TRANSFORMS["cropped at random"], TRANSFORMS["augmented"]):
        batches(loader(True, names=names))
    assert len(files(tmp_path)) == 1


def test_more_than_the_limit_is_not_kept(loader, tmp_path, capsys):
    plain = batches(loader(False))
    assert same(plain, batches(loader(True, INPUT__PICTURE_CACHE_GB=2e-5)))
    assert not files(tmp_path) and "exceed INPUT.PICTURE_CACHE_GB" in capsys.readouterr().out


@pytest.mark.skipif(os.name == "nt", reason="no such limit on this system")
def test_a_full_disk_costs_only_the_saving(loader, tmp_path, capsys):
    import resource

    plain = batches(loader(False))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        kept = batches(loader(True))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert same(plain, kept) and not files(tmp_path) and "Pictures can't be kept" in capsys.readouterr().out


def test_a_picture_that_can_not_be_read_is_named_and_leaves_nothing(loader, items, tmp_path):
    with open(items[4].impath, "wb") as file:
        file.write(b"no picture")
    with pytest.raises(UserError, match=r"can't read picture .*4\.jpg"):
        batches(loader(True))
    assert not files(tmp_path)


def test_a_file_removed_meanwhile_costs_only_time(loader, items, tmp_path):
    data = loader(True).dataset
    data.make_ready()
    copied = pickle.loads(pickle.dumps(data.kept))
    files(tmp_path)[0].unlink()
    assert data.kept.picture(items[0].impath) is not None  # mapped
    assert copied.picture(items[0].impath) is None


def test_evaluation_keeps_no_pictures(loader, items, tmp_path):
    cfg = loader(True).dataset.cfg
    list(build_data_loader(cfg, data_source=items, tfm=build_transform(cfg, is_train=False), is_train=False))
    assert not files(tmp_path)


def test_only_steps_without_chance_are_done_ahead():
    cfg = get_cfg_default()
    cfg.INPUT.TRANSFORMS = ("random_flip", "normalize")
    steps, rest = split_transform(build_transform(cfg, is_train=True))
    assert [type(step).__name__ for step in steps] == ["Resize"]
    assert [type(step).__name__ for step in rest.transforms] == ["RandomHorizontalFlip", "ToTensor", "Normalize"]
    own = object()
    assert split_transform(own) == ((), own)


def test_the_command_lists_and_clears_pictures(loader, tmp_path, capsys):
    batches(loader(True, DATASET__NAME="Toy"))
    folder = cache_folder(str(tmp_path / "cache"))
    capsys.readouterr()
    assert main(["cache", "--dir", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "pictures" in shown and "Toy, 11 training pictures" in shown and "1 file, 0.1 MB" in shown
    assert main(["cache", "clear", "--dir", str(folder)]) == 0
    assert "removed 1 file (0.1 MB)" in capsys.readouterr().out and not files(tmp_path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forked, so that torch is imported once")
def test_processes_that_decode_at_once_and_a_killed_one_leave_one_whole_file(loader, items, tmp_path):
    context = multiprocessing.get_context("fork")
    killed = context.Process(target=_killed_while_it_writes, args=(loader(True).dataset,))
    killed.start()
    killed.join()
    (left,) = files(tmp_path)
    assert killed.exitcode == 7 and left.suffix == ".tmp"
    found = context.Queue()
    processes = [context.Process(target=_compare, args=(loader(True).dataset, items, found)) for _ in range(3)]
    for process in processes:
        process.start()
    assert [found.get(timeout=60) for _ in processes] == [True] * 3
    for process in processes:
        process.join()
    assert [path.suffix for path in files(tmp_path)] == [".tmp", ".safetensors"]  # what is left goes after a day


def _killed_while_it_writes(data):
    decode, seen = data.kept._decode, []

    def dying(item):
        seen.append(item)
        return decode(item) if len(seen) < 5 else os._exit(7)

    data.kept._decode = dying
    data.make_ready()


def _compare(data, items, found):
    data.make_ready()
    found.put(all(data.kept.picture(item.impath).tobytes() == read_image(item.impath).tobytes() for item in items))
