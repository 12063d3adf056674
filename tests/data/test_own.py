"""ImageFolder and CSV: layouts, shots, base and new, domains, and what they refuse."""

import json
import random

import pytest

from promptmix.config import merge_opts, validate
from promptmix.data import build_dataset
from promptmix.data.datasets.tables import picture_paths, table_of
from promptmix.errors import ConfigError, DataError
from promptmix.utils import set_random_seed
from tests.data.trees import build, config, tiny_jpeg

CLASSES = ("ant", "bee", "cat", "dog", "elk")


def folder(root, prefix="", count=10, classes=CLASSES):
    for name in classes:
        for k in range(count):
            tiny_jpeg(root / prefix / name / f"{k:02}.jpg")
    return root


def own(name, root, opts=(), **keys):
    cfg = config(name, root, **keys)
    merge_opts(cfg, list(opts))
    return build_dataset(cfg)


def test_one_folder_is_split_by_ratio_and_its_own_seed(tmp_path):
    folder(tmp_path)
    random.seed(3)
    state = random.getstate()
    dataset = build("ImageFolder", tmp_path)
    assert random.getstate() == state
    assert [len(items) for items in (dataset.train_x, dataset.val, dataset.test)] == [25, 10, 15]
    assert dataset.classnames == dataset.all_classnames == list(CLASSES)
    paths = [i.impath for items in (dataset.train_x, dataset.val, dataset.test) for i in items]
    assert len(set(paths)) == 50
    again = own("ImageFolder", tmp_path, SEED=7)
    assert [i.impath for i in again.test] == [i.impath for i in dataset.test]
    other = own(
        "ImageFolder", tmp_path, ["DATASET.IMAGEFOLDER.SPLIT_SEED", "2", "DATASET.IMAGEFOLDER.SPLIT_RATIO", "(0.8, 0, 0.2)"]
    )
    assert other.val is None and len(other.test) == 10
    assert {i.impath for i in other.test} != {i.impath for i in dataset.test}


def test_train_val_test_folders_shots_base_and_new(tmp_path):
    for part, count in (("train", 6), ("val", 5), ("test", 2)):
        folder(tmp_path, part, count)
    set_random_seed(1)
    base = build("ImageFolder", tmp_path, NUM_SHOTS=3, SUBSAMPLE_CLASSES="base")
    assert [len(items) for items in (base.train_x, base.val, base.test)] == [9, 9, 6]
    assert base.classnames == ["ant", "bee", "cat"] and base.all_classnames == list(CLASSES)
    new = build("ImageFolder", tmp_path, NUM_SHOTS=3, SUBSAMPLE_CLASSES="new")
    assert new.classnames == ["dog", "elk"] and {i.label for i in new.test} == {0, 1}


def test_train_and_val_alone_test_on_val(tmp_path):
    folder(tmp_path, "train", 2)
    folder(tmp_path, "val", 1)
    dataset = build("ImageFolder", tmp_path)
    assert [i.impath for i in dataset.test] == [i.impath for i in dataset.val]


def test_parts_are_called_so_however_they_are_capitalised(tmp_path, caplog):
    for part, count in (("Train", 3), ("VALID", 1), ("Test", 2)):
        folder(tmp_path, part, count, ("1", "2"))
    dataset = build("ImageFolder", tmp_path)
    assert [len(items) for items in (dataset.train_x, dataset.val, dataset.test)] == [6, 2, 4]
    assert "the class names are numbers" in caplog.text


def test_a_class_called_train_is_a_class(tmp_path):
    folder(tmp_path, classes=("train", "bus"))
    assert build("ImageFolder", tmp_path).classnames == ["bus", "train"]


def test_domains_of_folders(tmp_path):
    folder(tmp_path, "photo")
    folder(tmp_path, "sketch", classes=CLASSES[:4])
    opts = ["DATASET.IMAGEFOLDER.DOMAINS", "True"]
    both = own("ImageFolder", tmp_path, opts)
    assert both.domains == ["photo", "sketch"] and {i.domain for i in both.train_x} == {0, 1}
    cross = own("ImageFolder", tmp_path, opts, SOURCE_DOMAINS=("sketch",), TARGET_DOMAINS=("sketch",))
    assert cross.classnames == list(CLASSES[:4]) and {i.domain for i in cross.test} == {1}
    with pytest.raises(DataError, match="'elk' has test but no training"):
        own("ImageFolder", tmp_path, opts, SOURCE_DOMAINS=("sketch",), TARGET_DOMAINS=("photo",))
    with pytest.raises(ConfigError, match="photo, sketch"):
        own("ImageFolder", tmp_path, opts, SOURCE_DOMAINS=("painting",))


def test_class_names_from_a_file_and_templates(tmp_path):
    folder(tmp_path, classes=("n1", "n2"))
    (tmp_path / "names.txt").write_text("n1 great white shark\nn2 hen\n")
    dataset = own(
        "ImageFolder",
        tmp_path,
        ["DATASET.IMAGEFOLDER.CLASSNAMES", "names.txt", "DATASET.IMAGEFOLDER.TEMPLATES", "('a drawing of a {}.',)"],
    )
    assert dataset.classnames == ["great white shark", "hen"] and dataset.templates == ["a drawing of a {}."]


def table(root, header, lines, name="labels.csv"):
    (root / name).write_text("\n".join([header, *lines]) + "\n")


def test_csv_with_splits_and_domains(tmp_path):
    lines = []
    for k in range(12):
        tiny_jpeg(tmp_path / "pics" / f"{k}.jpg")
        label, part, domain = ("cat", "big dog")[k % 2], ("train", "val", "test")[k // 4], ("day", "night")[k // 2 % 2]
        lines.append(f'./pics/{k}.jpg, "{label}", {part}, {domain}')
    table(tmp_path, "path,label,split,domain", lines)
    dataset = build("CSV", tmp_path)
    assert [len(items) for items in (dataset.train_x, dataset.val, dataset.test)] == [4, 4, 4]
    assert dataset.classnames == ["big dog", "cat"] and dataset.domains == ["day", "night"]
    night = build("CSV", tmp_path, SOURCE_DOMAINS=("day",), TARGET_DOMAINS=("night",), NUM_SHOTS=1)
    assert {i.domain for i in night.train_x} == {0} and {i.domain for i in night.test} == {1}


def test_csv_without_a_split_and_with_numbers_for_labels(tmp_path):
    lines = []
    for k in range(30):
        tiny_jpeg(tmp_path / f"{k}.jpg")
        lines.append(f"{k}.jpg,{(2, 10, 9)[k % 3]}")
    table(tmp_path, "path,label", lines, "mine.csv")
    dataset = own("CSV", tmp_path, ["DATASET.CSV.FILE", "mine.csv"])
    assert dataset.classnames == ["2", "9", "10"] and len(dataset.train_x) == 15
    assert own("CSV", "", ["DATASET.CSV.FILE", str(tmp_path / "mine.csv")]).num_classes == 3


def test_csv_names_may_hold_line_ends_of_unicode_and_quoted_ones(tmp_path):
    lines = []
    for k in range(8):
        name = ("a\nb.jpg", "c\u2028d.jpg")[k % 2]
        tiny_jpeg(tmp_path / f"{k}" / name)
        lines.append(f'"{k}/{name}",{"cat" if k % 2 else "dog"}')
    table(tmp_path, "path,label", lines)
    assert len(build("CSV", tmp_path).train_x) == 4


def listed(root, name, rows):
    """Write rows in the format that ``name`` ends with."""
    for row in rows:
        tiny_jpeg(root / next(iter(row.values())))
    if name.endswith("json"):
        text = json.dumps(rows)
    elif name.endswith("jsonl"):
        text = "\n".join(map(json.dumps, rows))
    else:
        mark = "\t" if name.endswith("tsv") else ","
        text = "\n".join(mark.join(map(str, row)) for row in (rows[0], *(row.values() for row in rows)))
    (root / name).write_text(text + "\n")


@pytest.mark.parametrize("name", ["l.csv", "l.tsv", "l.json", "l.jsonl"])
def test_tables_in_other_formats_and_words(tmp_path, name):
    rows = [{"file_name": f"a/{k}.jpg", "text": "a caption", "label": (7, 11)[k % 2], "extra": 0.5} for k in range(8)]
    listed(tmp_path, name, rows)
    assert own("CSV", tmp_path, ["DATASET.CSV.FILE", name]).classnames == ["7", "11"]
    assert len(list(picture_paths(tmp_path / name))) == 8
    assert table_of(tmp_path) is None and table_of(tmp_path / name) == tmp_path / name


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_hugging_faces_metadata_beside_the_pictures(tmp_path, name):
    for part, count in (("train", 4), ("validation", 2), ("test", 2)):
        (tmp_path / part).mkdir()
        listed(tmp_path / part, name, [{"file_name": f"{k}.jpg", "label": f"Vögel {k % 2}"} for k in range(count)])
    assert table_of(tmp_path) == tmp_path / name
    dataset = own("CSV", tmp_path, ["DATASET.CSV.FILE", name])
    assert [len(part) for part in (dataset.train_x, dataset.val, dataset.test)] == [4, 2, 2]
    assert dataset.classnames == ["Vögel 0", "Vögel 1"] and dataset.comes_in_parts


def test_captions_are_no_labels(tmp_path):
    folder(tmp_path, count=3)
    (tmp_path / "metadata.csv").write_text("file_name,text\nant/00.jpg,an ant\n")
    assert table_of(tmp_path) is None


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("l.json", "{", r"l.json: Expecting property name .*; write \{\"path\": \"a.jpg\""),
        ("l.jsonl", '["a.jpg", "cat"]', r"line 1: \['a.jpg', 'cat'\] is not an object; write"),
        ("l.jsonl", '{"path": "a.jpg", "name": "cat"}', "no column 'label' or 'class'; write"),
        ("l.json", '[{"path": "a.jpg", "label": ["cat"]}]', "line 1: needs path,label"),
        ("l.json", '[{"path": "../a.jpg", "label": "cat"}]', "lies outside"),
        ("l.json", "[" * 100_000, "l.json: .*recursion"),
    ],
)
def test_json_refuses_in_one_line(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=words) as caught:
        own("CSV", tmp_path, ["DATASET.CSV.FILE", name])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("header", "lines", "words"),
    [
        ("path,name", ["a.jpg,cat"], "no column 'label'"),
        ("path,label,split", ["a.jpg,cat,training"], "line 2"),
        ("path,label,split", ["a.jpg,cat,train", "a.jpg,cat,"], "some rows have a split"),
        ("path,label", ["a.jpg,"], "line 2"),
        ("path,label", [], "no pictures"),
        ("path,label", ["a.jpg,cat"], "1 picture of 'cat': too few to train on and to test on"),
        ("path,label,split", ["gone.jpg,cat,train", "a.jpg,cat,test"], "gone.jpg: missing"),
        ("path,label,split", ["a.jpg,cat,train"], "no test pictures"),
    ],
)
def test_csv_refuses_in_one_line(tmp_path, header, lines, words):
    tiny_jpeg(tmp_path / "a.jpg")
    table(tmp_path, header, lines)
    with pytest.raises(DataError, match=words) as caught:
        build("CSV", tmp_path)
    assert "\n" not in str(caught.value)


def test_two_or_three_pictures_a_class_are_enough_and_empty_folders_are_named(tmp_path, caplog):
    for name, count in (("cat", 2), ("dog", 3), ("owl", 4)):
        for k in range(count):
            tiny_jpeg(tmp_path / name / f"{k}.jpg", (40 * k, len(name), count))
    (tmp_path / "fox" / "later").mkdir(parents=True)
    with caplog.at_level("WARNING", "promptmix"):
        dataset = own("ImageFolder", tmp_path)
    assert [len(part) for part in (dataset.train_x, dataset.val, dataset.test)] == [5, 1, 3]
    assert not dataset.comes_in_parts and dataset.classnames == ["cat", "dog", "owl"]
    said = " ".join(caplog.messages)
    assert "2 classes have too few pictures for a val part, such as 'cat'" in said
    assert f"1 folder holds no picture and is no class: {tmp_path / 'fox'}" in said


def test_folders_refuse(tmp_path):
    with pytest.raises(DataError, match="DATASET.ROOT is not set"):
        build("ImageFolder", "")
    with pytest.raises(DataError, match="no pictures"):
        build("ImageFolder", tmp_path)
    folder(tmp_path)
    with pytest.raises(ConfigError, match="SPLIT_RATIO"):
        own("ImageFolder", tmp_path, ["DATASET.IMAGEFOLDER.SPLIT_RATIO", "(0.5, 0.2, 0.2)"])
    with pytest.raises(DataError, match="no file|No such file"):
        build("CSV", tmp_path)


@pytest.mark.parametrize(
    ("name", "words"), [("my.zip", "my.zip is an archive; unpack it"), ("a.JPG", "a.JPG is one picture; name the folder")]
)
def test_what_is_no_table_says_what_to_name(tmp_path, name, words):
    (tmp_path / name).write_bytes(b"PK\3\4\0\xff")
    with pytest.raises(DataError, match=words):
        own("CSV", tmp_path, ["DATASET.CSV.FILE", name])


def test_settings_of_another_data_set_are_refused(tmp_path):
    cfg = config("OxfordPets", tmp_path)
    cfg.TRAINER.NAME = "ZeroshotCLIP"
    merge_opts(cfg, ["DATASET.CSV.FILE", "a.csv"])
    with pytest.raises(ConfigError, match="DATASET.CSV.FILE .* would be ignored by data set OxfordPets"):
        validate(cfg)


def test_skip_bad_leaves_out_and_a_class_never_vanishes(tmp_path):
    for part in ("train", "test"):
        folder(tmp_path, part, 2)
    (tmp_path / "train" / "ant" / "00.jpg").write_bytes(b"")
    with pytest.raises(DataError, match="00.jpg: empty file"):
        build("ImageFolder", tmp_path)
    assert len(build("ImageFolder", tmp_path, SKIP_BAD=True).train_x) == 9
    (tmp_path / "train" / "ant" / "01.jpg").write_bytes(b"\xff\xd8 cut")
    with pytest.raises(DataError, match="no training picture of 'ant'"):
        build("ImageFolder", tmp_path, SKIP_BAD=True)
