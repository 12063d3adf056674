"""``INPUT.PIPELINE fast``: near the exact pictures, the same for any number of workers and with kept pictures, and stated."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torchvision import transforms as T

from promptmix.config import get_cfg_default
from promptmix.data import Datum, build_data_loader, read_image
from promptmix.data.reading.fast import FAST, FastTransform, Head, read_head
from promptmix.data.reading.transforms import INTERPOLATION_MODES, build_transform
from promptmix.errors import ConfigError, DataError
from promptmix.runs.run import run
from promptmix.utils import set_random_seed
from tests.trainers.toy import toy_cfg

ALL = ("random_resized_crop", "random_flip", "normalize")


def picture(path, size, **options):
    coarse = torch.randint(0, 256, (6, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(size[0]))
    Image.fromarray(coarse.numpy()).resize(size, Image.Resampling.BICUBIC).save(path, **options)
    return str(path)


@pytest.fixture
def items(tmp_path):
    made = [picture(tmp_path / f"{n}.jpg", (50 + n, 40 + 2 * n), quality=95) for n in range(8)]
    made.append(picture(tmp_path / "large.jpg", (400, 300), quality=95))
    made.append(picture(tmp_path / "plain.png", (60, 50)))
    return [Datum(path, n % 3, 0, "c") for n, path in enumerate(made)]


@pytest.fixture
def cfg(tmp_path):
    def make(names=ALL, **keys):
        cfg = get_cfg_default()
        cfg.INPUT.SIZE, cfg.INPUT.TRANSFORMS, cfg.INPUT.PIPELINE = (32, 32), names, "fast"
        cfg.INPUT.FEATURE_CACHE_DIR = str(tmp_path / "cache")
        cfg.DATALOADER.NUM_WORKERS = 0
        for key, value in keys.items():
            node, _, name = key.partition("__")
            cfg[node][name] = value
        return cfg

    return make


def epochs(cfg, items):
    set_random_seed(5)
    loader = build_data_loader(cfg, "RandomSampler", items, batch_size=5, tfm=build_transform(cfg), is_train=True)
    return torch.stack([torch.stack([batch["img"] for batch in loader]) for _ in range(2)])


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_without_chance_pictures_are_the_exact_ones_but_for_rounding(mode, cfg, items):
    node = cfg(("normalize",), INPUT__INTERPOLATION=mode)
    fast = build_transform(node)
    exact = build_transform(cfg(("normalize",), INPUT__INTERPOLATION=mode, INPUT__PIPELINE="exact"))
    assert isinstance(fast, FastTransform) and isinstance(exact, T.Compose)
    for item in items:
        near = fast(fast.read(item.impath, "benchmark"))
        right = exact(read_image(item.impath))
        # In units of 1/255; a large JPEG is scaled by its own decoder, which does it otherwise.
        off = ((near - right) * torch.tensor(node.INPUT.PIXEL_STD).view(3, 1, 1) * 255).abs()
        assert near.shape == right.shape == (3, 32, 32) and near.is_contiguous()
        assert off.max() <= (40 if "large" in item.impath else 1.01) and off.mean() < 3


def test_bytes_become_the_same_floats(cfg):
    node = cfg(("normalize",)).INPUT
    values = torch.arange(256, dtype=torch.uint8).repeat(4).view(1, 32, 32).repeat(3, 1, 1)
    found = FastTransform(node, ("normalize",), INTERPOLATION_MODES["bilinear"])(values)
    exact = T.Normalize(node.PIXEL_MEAN, node.PIXEL_STD)(values / 255)
    assert torch.allclose(found, exact, atol=1e-6)
    assert torch.allclose(FastTransform(node, (), INTERPOLATION_MODES["bilinear"])(values), values / 255, atol=1e-7)


def test_a_large_jpeg_is_decoded_smaller_and_a_small_one_whole(cfg, items, tmp_path):
    large = items[8].impath
    whole, cropped = (build_transform(cfg(names)) for names in (("normalize",), ALL))
    assert whole.decode(large, "benchmark").shape == (3, 38, 50)  # an eighth, not below 32
    assert cropped.decode(large, "benchmark").shape == (3, 75, 100)  # a quarter, not below 64
    for item in items[:8]:
        assert whole.decode(item.impath, "benchmark").shape[:0:-1] == Image.open(item.impath).size
    exif = Image.Exif()
    exif[0x0112] = 6
    side = picture(tmp_path / "side.jpg", (400, 300), exif=exif)
    assert whole.decode(side, "upright").shape == (3, 50, 38) and whole.decode(side, "benchmark").shape == (3, 38, 50)


def test_what_is_no_colour_jpeg_is_read_as_ever(cfg, tmp_path):
    fast = build_transform(cfg())
    for mode in ("L", "CMYK"):
        path = tmp_path / f"{mode}.jpg"
        Image.open(picture(tmp_path / "a.png", (50, 40))).convert(mode).save(path)
        assert torch.equal(fast.decode(str(path), "benchmark"), T.PILToTensor()(read_image(str(path))))
    for content in (b"", b"no picture", (tmp_path / "L.jpg").read_bytes()[:300]):
        (tmp_path / "bad.jpg").write_bytes(content)
        with pytest.raises(DataError, match=r"can't read picture .*bad\.jpg"):
            fast.read(str(tmp_path / "bad.jpg"), "benchmark")
    with pytest.raises(DataError, match=r"no picture .*gone\.jpg"):
        fast.read(str(tmp_path / "gone.jpg"), "benchmark")


def test_the_head_of_a_jpeg_says_what_pillow_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for number, options in enumerate([{}, {"progressive": True}, {"exif": exif}, {"comment": b"x" * 300, "subsampling": 0}]):
        path = picture(tmp_path / f"{number}.jpg", (53 + number, 300), **options)
        content = (tmp_path / f"{number}.jpg").read_bytes()
        head = read_head(memoryview(content))
        assert head == Head(Image.open(path).size, 3, 8, "exif" in options)
        assert head.plain("benchmark") and head.plain("upright") == ("exif" not in options)
        assert read_head(memoryview(content[:20])) is None
        filled = content[:2] + b"\xff\xff\xff" + content[2:]  # filling bytes before a marker
        assert read_head(memoryview(filled)) == head
    Image.open(path).convert("L").save(path)
    grey = read_head(memoryview((tmp_path / "3.jpg").read_bytes()))
    assert grey.colours == 1 and not grey.plain("benchmark")
    assert not Head((20_000, 20_000), 3, 8, False).plain("benchmark")  # Pillow refuses it
    assert read_head(memoryview(b"\x89PNG")) is None and read_head(memoryview(b"")) is None


def test_batches_follow_from_the_seed_for_any_workers_and_with_kept_pictures(cfg, items, monkeypatch):
    first = epochs(cfg(), items)
    assert torch.equal(first, epochs(cfg(), items)) and not torch.equal(first[0], first[1])
    assert torch.equal(first, epochs(cfg(DATALOADER__NUM_WORKERS=2), items))
    assert torch.equal(first, epochs(cfg(INPUT__PICTURE_CACHE=True), items))
    monkeypatch.setattr(FastTransform, "read", None)
    assert torch.equal(first, epochs(cfg(INPUT__PICTURE_CACHE=True), items))


def test_exact_and_fast_keep_pictures_apart(cfg, items, tmp_path):
    exact = epochs(cfg(INPUT__PIPELINE="exact"), items)
    epochs(cfg(INPUT__PICTURE_CACHE=True), items)
    assert torch.equal(exact, epochs(cfg(INPUT__PIPELINE="exact", INPUT__PICTURE_CACHE=True), items))
    assert len(list((tmp_path / "cache" / "pictures").iterdir())) == 2


def test_the_plain_picture_and_copies_stay_as_they_are(cfg, items):
    for way in ("fast", "exact"):
        keys = {"DATALOADER__RETURN_IMG0": True, "DATALOADER__K_TRANSFORMS": 2, "INPUT__PIPELINE": way}
        node = cfg(**keys)
        loader = build_data_loader(node, data_source=items, batch_size=5, tfm=build_transform(node), is_train=True)
        batch = next(iter(loader))
        assert [copy.shape for copy in batch["img"]] == [(5, 3, 32, 32)] * 2
        plain = batch["img0"] if way == "fast" else plain  # noqa: F821  (of the round before)
        assert torch.equal(plain, batch["img0"])


def test_evaluation_is_exact(cfg):
    assert isinstance(build_transform(cfg(), is_train=False), T.Compose)


@pytest.mark.parametrize("name", ["cutout", "colorjitter", "randaugment"])
def test_what_there_is_no_fast_way_for_is_refused(name, cfg):
    with pytest.raises(ConfigError, match=f"INPUT.PIPELINE is 'fast', which knows {', '.join(FAST)}, but .*'{name}'"):
        build_transform(cfg((name, "normalize")))


def test_a_run_says_so(room, tmp_path):
    opts = ["INPUT.TRANSFORMS", ALL, "INPUT.FEATURE_CACHE", False, "OPTIM.MAX_EPOCH", 1]
    for way in ("fast", "exact"):
        result = run(toy_cfg(room, "CoOp", *opts, "INPUT.PIPELINE", way, "OUTPUT_DIR", str(tmp_path / way)), quiet=True)
        assert any("INPUT.PIPELINE fast" in line for line in result.approximations) == (way == "fast")


def test_what_is_resized_at_first_is_kept_small(cfg, items, tmp_path):
    names = ("random_flip", "normalize")
    first = epochs(cfg(names), items)
    assert torch.equal(first, epochs(cfg(names, INPUT__PICTURE_CACHE=True), items))
    (path,) = (tmp_path / "cache" / "pictures").iterdir()
    assert path.stat().st_size < 10 * 32 * 32 * 3 + 5000
