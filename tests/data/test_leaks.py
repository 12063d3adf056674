"""What makes numbers wrong without an error: copies across parts and labels, names that are one, pictures that nobody reads."""

from __future__ import annotations

import logging
import os
import shutil
import zipfile

import pytest

from promptmix.config.flags import make_config
from promptmix.data import Datum, build_dataset
from promptmix.data.leaks import alike, find_copies, find_leaks
from promptmix.errors import ConfigError, DataError
from promptmix.runs.run import run
from tests.data.trees import build, config, tiny_jpeg


@pytest.fixture
def said(caplog):
    """What is warned of, line by line."""
    from promptmix.utils import get_logger

    logger = get_logger()
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.WARNING)
    yield lambda: [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    logger.removeHandler(caplog.handler)


def photos(root, classes=("ant", "bee", "cat"), count=10, below=""):
    """Different pictures: each of its own size."""
    for name in classes:
        for k in range(count):
            tiny_jpeg(root / name / below / f"{k:02}.jpg", size=(10 + k + 50 * bool(below), 10 + ord(name[0]) - ord("A")))
    return root


def divided(root, classes=("ant", "bee")):
    for place, part in enumerate(("train", "val", "test")):
        for label, name in enumerate(classes):
            for k in range(4):
                tiny_jpeg(root / part / name / f"{k}.jpg", size=(10 + place, 10 + 10 * label + k))
    return root


# Copies


def test_copies_are_found_by_content_alone(tmp_path):
    big = os.urandom(70_000)
    content = {
        "a.bin": big,
        "same": big,
        "other end": big[:-1] + bytes([big[-1] ^ 1]),
        "other start": bytes([big[0] ^ 1]) + big[1:],
        "shorter": big[:-1],
        "small": b"x" * 9,
        "small too": b"x" * 9,
        "small other": b"y" * 9,
        "empty": b"",
        "empty too": b"",
    }
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
    with zipfile.ZipFile(tmp_path / "pack.zip", "w", zipfile.ZIP_DEFLATED) as pack:
        pack.writestr("m.bin", big)
    os.mkfifo(tmp_path / "pipe")
    paths = [str(tmp_path / name) for name in (*content, "pipe", "gone", "pack.zip::m.bin", "pack.zip::gone")]
    groups = [[os.path.basename(path) for path in group] for group in find_copies(paths)]
    assert groups == [["a.bin", "same", "pack.zip::m.bin"], ["small", "small too"]]


def test_only_files_of_one_size_are_opened(tmp_path, monkeypatch):
    from promptmix.data import leaks

    for k in range(50):
        (tmp_path / str(k)).write_bytes(b"z" * (k + 1 if k < 48 else 1000))
    opened = []
    digest = leaks._digest
    monkeypatch.setattr(leaks, "_digest", lambda path, count: opened.append(path) or digest(path, count))
    assert len(find_copies([str(tmp_path / str(k)) for k in range(50)])) == 1
    assert len(opened) == 2


def test_every_leak_is_counted_with_an_example(tmp_path):
    (tmp_path / "x").write_bytes(b"one")
    for name in ("copy", "again"):
        shutil.copy(tmp_path / "x", tmp_path / name)
    (tmp_path / "y").write_bytes(b"two")

    def item(name, label=0):
        return Datum(str(tmp_path / name), label, 0, "ab"[label])

    assert find_leaks({"train": [item("x")], "val": [], "test": [item("y")]}) == []
    across = find_leaks({"train": [item("x")], "val": [item("y")], "test": [item("copy"), item("y")]})
    assert [line.split(",")[0] for line in across] == [
        "1 of 2 pictures of test is in train too",
        "1 of 2 pictures of test is in val too",
    ]
    assert f"{tmp_path}/copy, which is {tmp_path}/x" in across[0]
    labels = find_leaks({"train": [item("x"), item("copy", 1)], "test": [item("y")]})
    assert labels == [
        f"1 picture stands under two labels, such as {tmp_path}/x as 'a' and {tmp_path}/copy as 'b'; leave each under one"
    ]
    again = find_leaks({"train": [item("x"), item("copy"), item("again"), item("y"), item("y")], "test": []})
    assert again[0].startswith("3 pictures of train are copies of others there, such as")


def test_a_val_part_that_is_the_test_part_is_no_leak(tmp_path):
    (tmp_path / "x").write_bytes(b"one")
    items = [Datum(str(tmp_path / "x"))]
    assert find_leaks({"train": [], "val": items, "test": [Datum(items[0].impath)]}) == []


def test_own_pictures_warn_of_leaks(tmp_path, said):
    divided(tmp_path)
    build("ImageFolder", tmp_path)
    assert said() == []
    shutil.copy(tmp_path / "train" / "ant" / "0.jpg", tmp_path / "test" / "ant" / "9.jpg")
    shutil.copy(tmp_path / "train" / "ant" / "1.jpg", tmp_path / "train" / "bee" / "9.jpg")
    build("ImageFolder", tmp_path)
    assert [("1 of 9 pictures of test is in train too" in line, "two labels" in line) for line in said()] == [
        (True, False),
        (False, True),
    ]


# Names and classes


def test_names_that_differ_in_case_underscores_and_spaces_only():
    assert alike(["Barn owl", "barn_owl", "barn  Owl", "cat", "dog", "Straße", "STRASSE", "cats"]) == [
        ["Barn owl", "barn_owl", "barn  Owl"],
        ["Straße", "STRASSE"],
    ]
    assert alike(["caf\u00e9", "cafe\u0301", "bee", "bee\u200b"]) == [["caf\u00e9", "cafe\u0301"], ["bee", "bee\u200b"]]


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        (("barn_owl", "Barn owl", "cat"), "1 class names appear more than once .* 'Barn owl' and 'barn_owl'"),
        (("ant",), "one class, 'ant'"),
    ],
)
def test_what_no_prompt_can_tell_apart_is_refused(tmp_path, classes, words):
    with pytest.raises(DataError, match=words) as caught:
        build("ImageFolder", photos(tmp_path, classes))
    assert "\n" not in str(caught.value)


# Folders


def test_pictures_at_any_depth_belong_to_their_class(tmp_path, said):
    photos(tmp_path, count=8)
    flat = [item.impath for item in build("ImageFolder", tmp_path).train_x]
    photos(tmp_path / "deep", ("ant",), 3, "2023/may")
    shutil.move(tmp_path / "deep" / "ant" / "2023", tmp_path / "ant" / "2023")
    (tmp_path / "deep" / "ant").rmdir()
    (tmp_path / "deep").rmdir()
    tiny_jpeg(tmp_path / "ant" / ".thumbs" / "hidden.jpg")
    os.symlink(tmp_path / "ant", tmp_path / "ant" / "2023" / "loop")
    dataset = build("ImageFolder", tmp_path)
    paths = {item.impath for items in (dataset.train_x, dataset.val, dataset.test) for item in items}
    assert len(paths) == 27 and sum("2023/may" in path for path in paths) == 3
    assert dataset.classnames == ["ant", "bee", "cat"]
    assert not any("left out" in line for line in said())
    shutil.rmtree(tmp_path / "ant" / "2023")
    assert [item.impath for item in build("ImageFolder", tmp_path).train_x] == flat  # flat folders are split as ever


def test_what_is_left_out_is_said(tmp_path, said):
    photos(tmp_path)
    tiny_jpeg(tmp_path / "loose.jpg")
    for k in range(3):
        (tmp_path / "ant" / f"{k}.HEIC").write_bytes(b"x")
    (tmp_path / "ant" / "notes.txt").write_text("x")
    build("ImageFolder", tmp_path)
    loose, other = said()
    assert "1 picture is not in class folders and is left out, such as" in loose and loose.endswith("loose.jpg")
    assert "4 files are of no picture format" in other and "3 .heic, 1 .txt); save .heic as .jpg or .png to have" in other


@pytest.mark.parametrize(("val", "test"), [("valid", "test"), ("validation", "testing")])
def test_other_names_of_the_parts(tmp_path, val, test):
    divided(tmp_path)
    (tmp_path / "val").rename(tmp_path / val)
    (tmp_path / "test").rename(tmp_path / test)
    dataset = build("ImageFolder", tmp_path)
    assert [len(items) for items in (dataset.train_x, dataset.val, dataset.test)] == [8, 8, 8]
    assert dataset.classnames == ["ant", "bee"]


def test_a_lone_train_folder_of_class_folders_lacks_its_test_part(tmp_path):
    photos(tmp_path / "train")
    with pytest.raises(DataError, match="no test pictures"):
        build("ImageFolder", tmp_path)


def test_folders_that_may_be_domains_are_pointed_out(tmp_path, said):
    for domain in ("photo", "sketch"):
        photos(tmp_path / domain, ("cat", "dog"), 6)
    assert build("ImageFolder", tmp_path).classnames == ["photo", "sketch"]
    assert any("photo, sketch each hold cat, dog" in line and "DATASET.IMAGEFOLDER.DOMAINS True" in line for line in said())


# What one data set's config says about it alone


@pytest.mark.parametrize("file", ["configs/quickstart.yaml", "configs/trainers/CoOp/tiny.yaml"])
def test_own_data_inherits_neither_domain_nor_classes(tmp_path, file):
    photos(tmp_path)
    cfg = make_config([file], {"--root": ("DATASET.ROOT", str(tmp_path))}, ["DATASET.NAME", "ImageFolder"])
    node = cfg.DATASET
    assert (node.SOURCE_DOMAINS, node.TARGET_DOMAINS, node.SUBSAMPLE_CLASSES, node.NUM_SHOTS) == ((), (), "all", 16)
    assert build_dataset(cfg).num_classes == 3
    same = make_config([file], {}, ["DATASET.NAME", "EmojiFamilies"])
    assert (same.DATASET.SOURCE_DOMAINS, same.DATASET.SUBSAMPLE_CLASSES) == (("openmoji_color",), "base")
    kept = make_config([file], {}, ["DATASET.NAME", "ImageFolder", "DATASET.SUBSAMPLE_CLASSES", "new"])
    assert kept.DATASET.SUBSAMPLE_CLASSES == "new" and kept.DATASET.SOURCE_DOMAINS == ()


def test_a_data_sets_file_stands_against_the_quick_starts(tmp_path):
    (tmp_path / "own.yaml").write_text("DATASET: {NAME: ImageFolder, SOURCE_DOMAINS: [day]}\n")
    cfg = make_config([str(tmp_path / "own.yaml"), "configs/quickstart.yaml"], {}, [])
    assert (cfg.DATASET.NAME, cfg.DATASET.SOURCE_DOMAINS, cfg.DATASET.SUBSAMPLE_CLASSES) == ("ImageFolder", ("day",), "all")
    cfg = make_config(["configs/datasets/eurosat.yaml", "configs/trainers/CoOp/vit_b16.yaml"], {}, [])
    assert (cfg.DATASET.NAME, cfg.DATASET.SUBSAMPLE_CLASSES) == ("EuroSAT", "all")


# Shots and the choice of an epoch


def test_classes_with_fewer_pictures_than_shots_are_counted(tmp_path, said):
    photos(tmp_path, ("ant", "bee"), 10)
    photos(tmp_path, ("cat",), 40)
    build("ImageFolder", tmp_path, NUM_SHOTS=8)
    assert said() == ["8 shots: 2 of 3 classes have fewer training pictures (5) and give all of theirs"]
    build_dataset(make_config(["configs/quickstart.yaml"], {}, ["SEED", "1"]))
    assert "16 shots: 31 of 41 classes have fewer training pictures" in said()[-1]


def train(tmp_path, *opts):
    cfg = config("ImageFolder", tmp_path / "photos")
    from promptmix.config import merge_file, merge_opts
    from promptmix.config.flags import resolve_config

    merge_file(cfg, resolve_config("configs/trainers/CoOp/tiny.yaml"))
    plain = [
        "DATASET.NAME",
        "ImageFolder",
        "DATASET.SOURCE_DOMAINS",
        (),
        "DATASET.SUBSAMPLE_CLASSES",
        "all",
        "OPTIM.MAX_EPOCH",
        1,
    ]
    merge_opts(cfg, [*plain, "OUTPUT_DIR", str(tmp_path / "out"), "TEST.FINAL_MODEL", "best_val", *opts])
    return run(cfg)


def test_the_best_epoch_is_never_chosen_on_test_pictures_in_silence(tmp_path, said):
    divided(tmp_path / "photos")
    shutil.move(tmp_path / "photos" / "val", tmp_path / "val")
    with pytest.raises(ConfigError, match="'best_val', but ImageFolder has no val part here"):
        train(tmp_path)
    assert not (tmp_path / "out").exists()
    shutil.rmtree(tmp_path / "photos" / "test")
    shutil.move(tmp_path / "val", tmp_path / "photos" / "val")
    train(tmp_path)
    assert any("8 val pictures of ImageFolder are test pictures" in line for line in said())
