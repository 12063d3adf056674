"""Both ways of reading a picture: as people see it, and as the benchmark's code does, bit for bit."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as T

import promptmix
from promptmix.config import merge_opts
from promptmix.data import DatasetWrapper, Datum, read_image
from promptmix.data.base import reading_of
from promptmix.data.features.cache import feature_key
from promptmix.data.reading.images import READINGS
from promptmix.errors import ConfigError
from promptmix.registry import DATASET_REGISTRY
from tests.data.trees import config

#: What a camera stores for a picture that is upright after undoing EXIF orientation 1 to 8.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def quarters() -> Image.Image:
    """A picture (24, 16) whose four quarters have different colours."""
    pixels = np.zeros((16, 24, 3), dtype=np.uint8)
    pixels[:8, :12], pixels[:8, 12:], pixels[8:, :12], pixels[8:, 12:] = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)
    return Image.fromarray(pixels)


def turned(path, orientation, form, **options):
    way = STORED[orientation]
    image = quarters() if way is None else quarters().transpose(way)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(path, form, exif=exif, **options)
    return path


def saved(path, image, form="PNG", **options):
    image.save(path, form, **options)
    return str(path)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", STORED)
def test_phones_pictures_are_turned_upright(tmp_path, form, orientation):
    options = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.get(form, {})
    path = turned(tmp_path / "a.bin", orientation, form, **options)
    image = read_image(str(path), "upright")
    assert (image.mode, image.size) == ("RGB", (24, 16))
    assert np.abs(np.asarray(image, int)[2::8, 3::12] - np.asarray(quarters(), int)[2::8, 3::12]).max() < 40


@pytest.mark.parametrize("exif", [b"", b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01" * 9])
def test_damaged_exif_leaves_the_picture_as_stored(tmp_path, exif):
    path = saved(tmp_path / "a.jpg", quarters(), "JPEG", exif=exif)
    assert np.array_equal(read_image(path, "upright"), read_image(path))


def test_what_is_transparent_lies_on_white(tmp_path):
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 200, 0, 0])
    pictures = {
        (255, 255, 255): [
            saved(tmp_path / "rgba.png", clear),
            saved(tmp_path / "rgba.webp", clear, "WEBP", lossless=True),
            saved(tmp_path / "la.png", clear.convert("LA")),
            saved(tmp_path / "p.png", palette, transparency=1),
            saved(tmp_path / "p.gif", palette, "GIF", transparency=1),
            saved(tmp_path / "pb.png", palette, transparency=bytes([255, 0])),
            saved(tmp_path / "rgb.png", Image.new("RGB", (4, 4), (1, 2, 3)), transparency=(1, 2, 3)),
            saved(tmp_path / "l.png", Image.new("L", (4, 4), 9), transparency=9),
        ],
        (127, 127, 127): [saved(tmp_path / "half.png", half)],
        (200, 0, 0): [saved(tmp_path / "opaque.png", palette), saved(tmp_path / "other.png", palette, transparency=0)],
    }
    for colour, paths in pictures.items():
        assert {path: read_image(path, "upright").getpixel((1, 1)) for path in paths} == dict.fromkeys(paths, colour)
    assert read_image(pictures[255, 255, 255][0]).getpixel((1, 1)) == (0, 0, 0)  # the benchmark's


def test_deep_grey_keeps_its_tones(tmp_path):
    ramp = np.linspace(0, 65535, 256).reshape(16, 16)
    paths = [
        saved(tmp_path / "16.png", Image.fromarray(ramp.astype(np.uint16))),
        saved(tmp_path / "16.tif", Image.fromarray(ramp.astype(np.uint16)), "TIFF"),
        saved(tmp_path / "32.tif", Image.fromarray(ramp.astype(np.int32)), "TIFF"),
        saved(tmp_path / "f.tif", Image.fromarray((ramp / 65535).astype(np.float32)), "TIFF"),
        saved(tmp_path / "f255.tif", Image.fromarray((ramp / 257).astype(np.float32)), "TIFF"),
    ]
    for path in paths:
        grey = np.asarray(read_image(path, "upright"), int)
        assert np.abs(grey[..., 0].ravel() - np.arange(256)).max() <= 1, path
    black = saved(tmp_path / "black.png", Image.fromarray(np.zeros((4, 4), np.uint16)))
    assert not np.asarray(read_image(black, "upright")).any()


def test_other_modes_and_moving_pictures(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    gif = saved(tmp_path / "a.gif", frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert read_image(gif, "upright").getpixel((0, 0)) == (255, 0, 0)
    for mode in ("1", "L", "CMYK", "YCbCr", "LAB"):
        path = saved(tmp_path / f"{mode}.tif", quarters().convert(mode), "TIFF")
        assert np.array_equal(read_image(path, "upright"), read_image(path)), mode


def odd_pictures(folder):
    """Pictures that the two readings read differently, and one that both read alike."""
    rgba = Image.new("RGBA", (8, 8), (9, 8, 7, 0))
    deep = Image.fromarray(np.full((8, 8), 300, np.uint16))
    return [
        str(turned(folder / "6.jpg", 6, "JPEG")),
        saved(folder / "a.png", rgba),
        saved(folder / "d.png", deep),
        saved(folder / "plain.png", quarters()),
    ]


def test_the_benchmarks_reading_is_pillows_conversion_bit_for_bit(tmp_path):
    paths = odd_pictures(tmp_path)
    for path in paths:
        with Image.open(path) as image:
            assert np.array_equal(read_image(path), image.convert("RGB"))
    differs = [not np.array_equal(read_image(path), read_image(path, "upright")) for path in paths]
    assert differs == [True, True, True, False]
    with zipfile.ZipFile(tmp_path / "pack.zip", "w") as pack:
        pack.write(paths[0], "6.jpg")
    assert read_image(f"{tmp_path}/pack.zip::6.jpg", "upright").size == (24, 16)


@pytest.mark.parametrize(
    ("name", "chosen", "expected"),
    [
        ("ImageFolder", "auto", "upright"),
        ("CSV", "auto", "upright"),
        ("OxfordPets", "auto", "benchmark"),
        ("ImageNet", "auto", "benchmark"),
        ("EmojiFamilies", "auto", "benchmark"),
        ("ImageFolder", "benchmark", "benchmark"),
        ("OxfordPets", "upright", "upright"),
    ],
)
def test_every_data_set_says_how_it_is_read(tmp_path, name, chosen, expected):
    cfg = config(name, "")
    merge_opts(cfg, ["INPUT.READING", chosen])
    assert reading_of(cfg) == expected
    path = odd_pictures(tmp_path)[0]
    image = DatasetWrapper(cfg, [Datum(path, 0)], T.PILToTensor())[0]["img"]
    assert image.shape[1:] == ((16, 24) if expected == "upright" else (24, 16))


def test_all_benchmark_data_sets_keep_their_reading():
    from promptmix.data.datasets.descriptions import DESCRIPTIONS

    assert len(DESCRIPTIONS) == 15
    assert {DATASET_REGISTRY.get(name).reading for name in DESCRIPTIONS} == {"benchmark"}


def test_cached_features_know_the_reading(tmp_path):
    items = [Datum(odd_pictures(tmp_path)[0], 0)]
    tower = torch.nn.Linear(2, 2)
    keys = {}
    for name, chosen in (("CSV", "auto"), ("CSV", "upright"), ("CSV", "benchmark"), ("OxfordPets", "auto")):
        cfg = config(name, "")
        cfg.INPUT.READING = chosen
        keys[name, chosen] = feature_key(cfg, tower, items, T.PILToTensor())
    assert keys["CSV", "auto"] == keys["CSV", "upright"] != keys["CSV", "benchmark"] == keys["OxfordPets", "auto"]


EIGHT = ["DATASET.NAME", "EmojiConcepts", "DATASET.EMOJI.NUM_CONCEPTS", "8"]


@pytest.fixture(scope="module")
def emoji_run(tmp_path_factory):
    """A zero-shot run on embedded pictures."""
    from promptmix.config.flags import make_config
    from promptmix.runs.run import run

    out = tmp_path_factory.mktemp("run")
    cfg = make_config(["configs/trainers/ZeroshotCLIP/tiny.yaml"], {}, ["OUTPUT_DIR", str(out), "SEED", "1", *EIGHT])
    run(cfg, quiet=True)
    return out


def test_predictions_read_upright_whatever_the_run_was_trained_on(emoji_run, tmp_path):
    predictor = promptmix.load(emoji_run)
    assert predictor.reading == "upright"
    upright = saved(tmp_path / "0.png", quarters())
    [expected] = predictor.predict([upright])
    [found] = predictor.predict([str(turned(tmp_path / "6.png", 6, "PNG"))])
    assert found.probabilities == expected.probabilities
    memory = io.BytesIO()
    turned(memory, 8, "PNG")
    [given] = predictor.predict([Image.open(memory)])
    assert given.probabilities == expected.probabilities
    stored = promptmix.load(emoji_run, reading="benchmark")
    [sideways] = stored.predict([str(tmp_path / "6.png")])
    assert sideways.probabilities != expected.probabilities
    with pytest.raises(ConfigError, match="reading is 'sideways'; choose from 'benchmark', 'upright'"):
        promptmix.load(emoji_run, reading="sideways")


def test_of_a_strip_the_middle_is_read(tmp_path):
    strip = Image.new("RGB", (5000, 2), "black")
    strip.paste("white", (2300, 0, 2700, 2))
    strip.save(tmp_path / "strip.png")
    for reading in READINGS:
        found = read_image(str(tmp_path / "strip.png"), reading)
        assert found.size == (400, 2) and found.getextrema() == ((255, 255),) * 3
