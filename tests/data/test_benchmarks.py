"""The 15 data sets against the authors' counts and Dassl's picks, on folders made from the real split files."""

import csv
import hashlib
import json
import os
import pickle
import random
from pathlib import Path

import pytest

from promptmix.data.datasets.benchmarks import Benchmark
from promptmix.data.datasets.descriptions import DESCRIPTIONS
from promptmix.data.datasets.readers import PACKAGED, packaged_text, read_classnames, read_splits
from promptmix.data.datum import Datum
from promptmix.data.fewshot import generate_fewshot, subsample_classes
from promptmix.errors import DataError
from promptmix.registry import DATASET_REGISTRY
from promptmix.utils import set_random_seed
from tests.data.trees import PARTS, build, link_all, rows, tiny_jpeg

COUNTS = {row["dataset"]: row for row in csv.DictReader((PACKAGED / "split_counts.csv").read_text().splitlines())}
PICKS = json.loads((Path(__file__).parent / "fewshot_picks.json").read_text())
WNIDS = read_classnames(packaged_text("imagenet_classnames.txt"))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """All pictures of Pets, DTD and EuroSAT; the empty folders of the others."""
    root = tmp_path_factory.mktemp("data")
    for name, about in DESCRIPTIONS.items():
        images = root / about.folder / about.images
        images.mkdir(parents=True, exist_ok=True)
        if name in ("OxfordPets", "DescribableTextures", "EuroSAT"):
            link_all(root / "one" / name, (row[0] for items in rows(name).values() for row in items), images)
    return root


@pytest.mark.parametrize("name", COUNTS)
def test_items_classes_and_base_new_are_the_authors(name, root):
    expected, about = COUNTS[name], DESCRIPTIONS[name]
    splits = read_splits(about, root)
    assert {part: len(splits[part]) for part in PARTS} == {part: int(expected[part]) for part in PARTS} == about.expected
    assert len({item.label for item in splits["train"]}) == int(expected["classes"]) == about.classes
    for half in ("base", "new"):
        train, test = subsample_classes(splits["train"], splits["test"], subsample=half)
        assert len({item.label for item in train}) == int(expected[f"{half}_classes"])
        assert len(test) == int(expected[f"test_{half}"])
    if about.split:
        text = packaged_text(f"{about.split_file}.gz")
        assert hashlib.sha256(text.encode()).hexdigest() == expected["sha256"]
        for part in PARTS:
            prefix = os.path.join(root, about.folder, about.images)
            assert [[os.path.relpath(i.impath, prefix), i.label, i.classname] for i in splits[part][::97]] == json.loads(text)[
                part
            ][::97]


@pytest.mark.parametrize("name", COUNTS)
def test_fewshot_picks_are_dassls(name, root):
    about = DESCRIPTIONS[name]
    splits = read_splits(about, root)
    prefix = os.path.join(root, about.folder, about.images).rstrip("/") + "/"
    for seed in (1, 2, 3):
        for shots in (1, 2, 4, 8, 16):
            set_random_seed(seed)
            drawn = generate_fewshot(splits["train"], shots), generate_fewshot(splits["val"], min(shots, 4))
            lines = ["\n".join(f"{i.impath.removeprefix(prefix)} {i.label}" for i in items) for items in drawn]
            digest = hashlib.sha256("\n--\n".join(lines).encode()).hexdigest()[:16]
            assert digest == PICKS[name][f"seed {seed} shots {shots}"]


@pytest.mark.parametrize("name", ["OxfordPets", "DescribableTextures", "EuroSAT"])
@pytest.mark.parametrize("half", ["base", "new"])
def test_whole_data_sets_build(name, half, root):
    dataset = build(name, root, SUBSAMPLE_CLASSES=half)
    expected = COUNTS[name]
    assert dataset.num_classes == int(expected[f"{half}_classes"])
    assert len(dataset.test) == int(expected[f"test_{half}"])
    base = int(expected["base_classes"])
    assert dataset.classnames == (dataset.all_classnames[:base] if half == "base" else dataset.all_classnames[base:])
    assert len(dataset.all_classnames) == int(expected["classes"])


def test_a_run_draws_dassls_picks_and_keeps_them_as_json(root):
    set_random_seed(1)
    dataset = build("OxfordPets", root, NUM_SHOTS=4, SEED=1)
    prefix = str(root / "oxford_pets" / "images") + "/"
    lines = ["\n".join(f"{i.impath.removeprefix(prefix)} {i.label}" for i in items) for items in (dataset.train_x, dataset.val)]
    assert hashlib.sha256("\n--\n".join(lines).encode()).hexdigest()[:16] == PICKS["OxfordPets"]["seed 1 shots 4"]
    kept = root / "oxford_pets" / "split_fewshot" / "shot_4-seed_1.json"
    assert json.loads(kept.read_text())["train"][0][0].startswith("images/")
    set_random_seed(1)
    before = [(i.impath, i.label) for i in dataset.train_x]
    again = build("OxfordPets", root, NUM_SHOTS=4, SEED=1)
    after_kept = random.random()
    assert [(i.impath, i.label) for i in again.train_x] == before
    kept.unlink()
    set_random_seed(1)
    build("OxfordPets", root, NUM_SHOTS=4, SEED=1)
    assert random.random() == after_kept  # a run's numbers don't depend on whether the file is there


def test_a_folder_that_cannot_be_written_draws_all_the_same(root, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError("read-only")

    monkeypatch.setattr("promptmix.data.records.save_split", refuse)
    assert len(build("DescribableTextures", root, NUM_SHOTS=1, SEED=3).train_x) == 47


def test_a_split_file_in_the_folder_wins(root):
    path = root / "eurosat" / "split_zhou_EuroSAT.json"
    ours = {part: [row for row in items if row[1] < 2] for part, items in rows("EuroSAT").items()}
    path.write_text(json.dumps(ours))
    try:
        assert build("EuroSAT", root).classnames == ["Annual Crop Land", "Forest"]
        path.write_text('{"train": []}')
        with pytest.raises(DataError, match="split_zhou_EuroSAT.json"):
            build("EuroSAT", root)
    finally:
        path.unlink()


@pytest.mark.parametrize("name", ["Caltech101", "OxfordFlowers", "StanfordCars", "SUN397", "UCF101"])
def test_a_sample_of_the_other_data_sets(name, tmp_path):
    about = DESCRIPTIONS[name]
    sample = {part: items[:: len(items) // 300] for part, items in rows(name).items()}
    kept = {row[1] for row in sample["train"]}
    sample = {part: [row for row in items if row[1] in kept] for part, items in sample.items()}
    link_all(tmp_path / "one", {row[0] for items in sample.values() for row in items}, tmp_path / about.folder / about.images)
    (tmp_path / about.folder / about.split_file).write_text(json.dumps(sample))
    dataset = build(name, tmp_path)
    assert [(i.label, i.classname) for i in dataset.test] == [(row[1], row[2]) for row in sample["test"]]
    dataset_class = DATASET_REGISTRY.get(name)
    assert issubclass(dataset_class, Benchmark) and type(dataset) is dataset_class
    assert dataset.templates[0] == about.template


def test_a_sample_of_aircraft(tmp_path):
    folder = tmp_path / "fgvc_aircraft"
    folder.mkdir()
    for part in PARTS:
        lines = packaged_text(f"images_variant_{part}.txt").splitlines()[::33]
        (folder / f"images_variant_{part}.txt").write_text("\n".join(lines))
        link_all(tmp_path / part, (f"{line.split()[0]}.jpg" for line in lines), folder / "images")
    dataset = build("FGVCAircraft", tmp_path)
    assert len(dataset.test) == 101 and dataset.classnames[0] == "707-320" and "Boeing 717" in dataset.classnames


def test_missing_pictures_are_named_with_the_remedy(root):
    with pytest.raises(DataError, match=r"UCF101: 13,320 pictures .*missing.*promptmix data prepare UCF101.*--skip-bad"):
        build("UCF101", root)


def test_folder_paths_are_coops(root):
    first = {name: os.path.relpath(read_splits(DESCRIPTIONS[name], root)["train"][0].impath, root) for name in COUNTS}
    assert first["Caltech101"] == "caltech-101/101_ObjectCategories/Faces/image_0274.jpg"
    assert first["StanfordCars"] == "stanford_cars/cars_train/05266.jpg"
    assert first["FGVCAircraft"].startswith("fgvc_aircraft/images/")
    assert first["SUN397"].startswith("sun397/SUN397/a/abbey/")
    assert first["EuroSAT"] == "eurosat/2750/AnnualCrop/AnnualCrop_1381.jpg"


def test_food101_without_its_split_file_is_split_once_and_for_all(tmp_path, caplog):
    images = tmp_path / "food-101" / "images"
    names = [f"{dish}/{number}.jpg" for dish in ("apple_pie", "beignets") for number in range(20)]
    link_all(tmp_path / "one", names, images)
    random.seed(5)
    before = random.getstate()
    one = build("Food101", tmp_path, SEED=1)
    assert random.getstate() == before
    two = build("Food101", tmp_path, SEED=2)
    assert [len(items) for items in (one.train_x, one.val, one.test)] == [20, 8, 12]
    assert [i.impath for i in one.test] == [i.impath for i in two.test]
    meta = tmp_path / "food-101" / "meta"
    meta.mkdir()
    for part, chosen in (("train", names[:10] + names[20:]), ("test", names[10:20])):
        (meta / f"{part}.txt").write_text("".join(f"{name.removesuffix('.jpg')}\n" for name in chosen))
    assert [i.impath for i in build("Food101", tmp_path).train_x] == [i.impath for i in one.train_x]
    theirs = {part: [[names[k], 0, "apple_pie"]] for k, part in enumerate(PARTS)}
    (tmp_path / "food-101" / "split_zhou_Food101.json").write_text(json.dumps(theirs))
    assert build("Food101", tmp_path).classnames == ["apple_pie"]


@pytest.fixture(scope="module")
def imagenets(tmp_path_factory):
    root = tmp_path_factory.mktemp("imagenets")
    files = [f"imagenet/images/train/{wnid}/{wnid}_{k}.JPEG" for wnid in WNIDS for k in (3, 1)]
    files += [f"imagenet/images/val/{wnid}/val_{k}.JPEG" for wnid in WNIDS for k in (1,)]
    files += [f"imagenetv2/imagenetv2-matched-frequency-format-val/{k}/a.jpeg" for k in range(1000)]
    files += [f"imagenet-sketch/images/{wnid}/sketch_0.JPEG" for wnid in WNIDS]
    files += [f"imagenet-adversarial/imagenet-a/{wnid}/a.jpg" for wnid in list(WNIDS)[::5]]
    files += [f"imagenet-rendition/imagenet-r/{wnid}/a.jpg" for wnid in list(WNIDS)[1::5]]
    link_all(root / "one", files, root)
    (root / "imagenet-adversarial" / "imagenet-a" / "README.txt").write_text("not a class")
    return root


def test_imagenet_and_its_variants(imagenets):
    set_random_seed(1)
    dataset = build("ImageNet", imagenets, NUM_SHOTS=1, SEED=1, SUBSAMPLE_CLASSES="new")
    assert dataset.num_classes == 500 and len(dataset.train_x) == 500 and len(dataset.test) == 500
    assert dataset.all_classnames == list(WNIDS.values())
    assert dataset.val == dataset.test
    assert set(json.loads((imagenets / "imagenet/split_fewshot/shot_1-seed_1.json").read_text())) == {"train"}
    for name, names in (
        ("ImageNetV2", list(WNIDS.values())),
        ("ImageNetSketch", list(WNIDS.values())),
        ("ImageNetA", list(WNIDS.values())[::5]),
        ("ImageNetR", list(WNIDS.values())[1::5]),
    ):
        variant = build(name, imagenets, NUM_SHOTS=1)
        assert variant.classnames == names
        assert [i.impath for i in variant.train_x] == [i.impath for i in variant.test] and variant.val is None
    (imagenets / "imagenet-rendition/classnames.txt").write_text("".join(f"{w} class {w}\n" for w in WNIDS))
    assert build("ImageNetR", imagenets).classnames[0] == f"class {list(WNIDS)[1]}"


def test_seeded_class_order_moves_labels_but_no_picks(root):
    set_random_seed(2)
    plain = build("OxfordPets", root, NUM_SHOTS=2, SEED=2)
    set_random_seed(2)
    seeded = build("OxfordPets", root, NUM_SHOTS=2, SEED=2, CLASS_ORDER="seeded")
    assert [i.impath for i in plain.train_x] == [i.impath for i in seeded.train_x]
    assert sorted(plain.classnames) == sorted(seeded.classnames) != seeded.classnames
    assert seeded.all_classnames == seeded.classnames
    assert all(seeded.classnames[i.label] == i.classname for i in seeded.test)


def test_template_groups_are_mocoops():
    sizes = {
        **dict.fromkeys(("Caltech101", "DescribableTextures", "FGVCAircraft", "OxfordFlowers"), [1, 1, 1, 4, 2]),
        "EuroSAT": [1, 1, 2, 2, 4, 2],
        "Food101": [1, 3, 4, 2],
        "OxfordPets": [1, 2, 1, 1, 4, 2],
        "StanfordCars": [3, 1, 1, 4, 2],
        "SUN397": [1, 1, 4, 2],
        "UCF101": [1, 1, 1, 1, 4, 2],
        "ImageNet": [1, 1, 1, 1, 2, 2, 3, 1, 1, 1, 7, 2, 1, 2, 1, 1, 1, 1, 1, 1],
    }
    assert {name: [len(group) for group in DESCRIPTIONS[name].groups] for name in sizes} == sizes
    for about in DESCRIPTIONS.values():
        for template in [*about.templates, *(t for group in about.groups for t in group)]:
            assert template.count("{}") == 1


class Stub:
    """Stands for Dassl's Datum while a pickle is written."""


def write_pickle(path: Path, content, module="dassl.data.datasets.base_dataset") -> None:
    """Pickle as CoOp does, where the class is Dassl's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = pickle.dumps(content, protocol=2).replace(f"c{Stub.__module__}\nStub\n".encode(), f"c{module}\nDatum\n".encode())
    path.write_bytes(data)


def record(impath, label, name):
    item = Stub()
    item.__dict__.update(_impath=impath, _label=label, _domain=0, _classname=name)
    return item


def test_coops_pickle_is_read_and_moved_to_this_folder(root):
    path = root / "oxford_pets" / "split_fewshot" / "shot_1-seed_9.pkl"
    elsewhere = "/someone/else/data/oxford_pets/images/"
    train = [record(elsewhere + row[0], row[1], row[2]) for row in rows("OxfordPets")["train"][::80]]
    write_pickle(path, {"train": train, "val": train[:3]})
    dataset = build("OxfordPets", root, NUM_SHOTS=1, SEED=9)
    assert [i.impath for i in dataset.train_x] == [
        str(root / "oxford_pets/images" / r[0]) for r in rows("OxfordPets")["train"][::80]
    ]
    assert type(dataset.train_x[0]) is Datum and len(dataset.val) == 3
    path.unlink()


@pytest.mark.parametrize(
    "content",
    [
        b"cposix\nsystem\n(S'touch {mark}'\ntR.",
        b'cbuiltins\neval\n(S\'open("{mark}", "w")\'\ntR.',
        b"\x80\x04\x8c\x08builtins\x8c\x07getattr\x93.",
        b"\x80\x04\x8c\x08somebody\x8c\x0eDatum.__init__\x93.",
        b"Pone\n.",
        b"nonsense",
        pickle.dumps({"train": [1], "val": []}),
        pickle.dumps([1, 2]),
    ],
)
def test_other_pickles_are_refused(content, root, tmp_path):
    mark = tmp_path / "mark"
    path = root / "oxford_pets" / "split_fewshot" / "shot_1-seed_8.pkl"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content.replace(b"{mark}", str(mark).encode()))
    with pytest.raises(DataError, match="shot_1-seed_8.pkl") as caught:
        build("OxfordPets", root, NUM_SHOTS=1, SEED=8)
    assert "\n" not in str(caught.value) and "remove" in str(caught.value)
    assert not mark.exists()
    path.unlink()


def test_missing_folder_and_missing_root_name_the_remedy(tmp_path):
    with pytest.raises(DataError, match=r"no folder .*oxford_pets.*promptmix data prepare OxfordPets --root"):
        build("OxfordPets", tmp_path)
    with pytest.raises(DataError, match=r"DATASET.ROOT is not set"):
        build("SUN397", "")


def test_bad_pictures_stop_the_run_or_are_skipped(tmp_path):
    images = tmp_path / "dtd" / "images"
    link_all(tmp_path / "one", (row[0] for items in rows("DescribableTextures").values() for row in items), images)
    splits = read_splits(DESCRIPTIONS["DescribableTextures"], tmp_path)
    missing, cut = Path(splits["test"][0].impath), Path(splits["train"][0].impath)
    missing.unlink()
    whole = tiny_jpeg(tmp_path / "two.jpg", size=(64, 64)).read_bytes()
    cut.unlink()
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError) as caught:
        build("DescribableTextures", tmp_path)
    assert f"{missing}: missing" in str(caught.value) and f"{cut}: damaged" in str(caught.value)
    dataset = build("DescribableTextures", tmp_path, SKIP_BAD=True)
    assert len(dataset.train_x) == 2819 and len(dataset.test) == 1691
