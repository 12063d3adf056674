"""Predictions with trained prompts on the embedded model, with the data set gone, also for names never seen."""

import csv
import io
import json
import shutil
import zipfile

import numpy as np
import pytest
from PIL import Image

import promptmix
from promptmix.assets import asset_path
from promptmix.cli import main
from promptmix.config import get_cfg, merge_opts
from promptmix.engine.checkpoint import load_checkpoint, save_plain
from promptmix.errors import CheckpointError, ConfigError, DataError
from promptmix.runs.run import run

PICTURES = {"cat": "1f408", "dog": "1f415", "bus": "1f68c", "violin": "1f3bb"}
OPTS = {
    "DATASET.NAME": "ImageFolder",
    "MODEL.BACKBONE.NAME": "tiny-en",
    "INPUT.SIZE": (128, 128),
    "INPUT.PIXEL_MEAN": [0.5] * 3,
    "INPUT.PIXEL_STD": [0.5] * 3,
    "INPUT.TRANSFORMS": ["center_crop", "normalize"],
    "DATALOADER.NUM_WORKERS": 0,
    "DATALOADER.TRAIN_X.BATCH_SIZE": 4,
    "OPTIM.NAME": "sgd",
    "OPTIM.LR": 0.002,
    "OPTIM.MAX_EPOCH": 2,
    "SEED": 1,
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for style in ("fluent_3d", "openmoji_color"):
        with zipfile.ZipFile(asset_path(f"emoji/{style}.zip")) as pack:
            for name, code in PICTURES.items():
                (folder / f"{name}-{style}.webp").write_bytes(pack.read(f"{code}.webp"))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory, pictures):
    """One run per method on three of the classes, whose data folder is then taken away."""
    out, data = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("data")
    for path in pictures.iterdir():
        name = path.name.split("-")[0]
        for part in ("train", "test") if name != "violin" else ():
            (data / part / name).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, data / part / name)
    for name, more in {
        "CoOp": ["TRAINER.COOP.N_CTX", "4"],
        "CSC": ["TRAINER.COOP.CSC", "True", "TRAINER.COOP.N_CTX", "4"],
        "MoCoOp": ["ROUTER.HARDPROMPTTOPK.K", "1"],
        "ZeroshotCLIP": [],
    }.items():
        cfg = get_cfg()
        merge_opts(cfg, [part for pair in OPTS.items() for part in pair])
        trainer = "CoOp" if name == "CSC" else name
        merge_opts(cfg, ["TRAINER.NAME", trainer, "OUTPUT_DIR", str(out / name), "DATASET.ROOT", str(data), *more])
        run(cfg, quiet=True)
    shutil.rmtree(data)
    return out


def test_the_same_numbers_as_the_runs_own_test(runs, pictures):
    for name in ("CoOp", "CSC", "MoCoOp", "ZeroshotCLIP"):
        predictor = promptmix.load(runs / name)
        assert predictor.classnames == ("bus", "cat", "dog")
        images = sorted(path for path in pictures.iterdir() if not path.name.startswith("violin"))
        found = predictor.predict(images)
        right = sum(prediction.classname == path.name.split("-")[0] for prediction, path in zip(found, images, strict=True))
        assert 100 * right / len(images) == pytest.approx(predictor.result.metrics["test"]["accuracy"])
        assert all(sum(prediction.probabilities) == pytest.approx(1, abs=1e-5) for prediction in found)


@pytest.mark.parametrize("name", ["CoOp", "MoCoOp", "ZeroshotCLIP"])
def test_names_never_seen(runs, pictures, name):
    predictor = promptmix.load(runs / name)
    image = pictures / "violin-fluent_3d.webp"
    best = predictor.predict(image, ["hammer", "violin", "police_car", "tree"])[0]
    assert best.image == str(image) and sorted(best.classnames) == ["hammer", "police_car", "tree", "violin"]
    assert best.classname == "violin"
    # A subset and another order score as the same names do among all.
    own = predictor.predict(image)[0]
    mixed = predictor.predict(image, ["dog", "bus", "cat"])[0]
    assert mixed.classnames == own.classnames and mixed.probabilities == pytest.approx(own.probabilities, abs=1e-5)


def test_pictures_and_batches(runs, pictures):
    predictor = promptmix.load(runs / "CoOp")
    paths = sorted(pictures.iterdir())
    opened = [Image.open(path) for path in paths]
    one, several = predictor.predict(opened, batch_size=3), predictor.predict(paths)
    assert [p.probabilities for p in one] == [pytest.approx(p.probabilities, abs=1e-5) for p in several]
    assert one[0].image == "" and predictor.predict([]) == []


@pytest.mark.parametrize("names", [["cow", "hen", "pig"], ["dog", "cat", "bus"], ["cow", "hen"]])
def test_class_specific_contexts_refuse_other_names(runs, pictures, names):
    predictor = promptmix.load(runs / "CSC")
    with pytest.raises(CheckpointError, match="own 3 classes"):
        predictor.predict(pictures / "cat-fluent_3d.webp", names)


def test_the_command_writes_table_json_lines_and_csv(runs, pictures, capsys):
    command = [
        "predict",
        "--model-dir",
        str(runs / "CoOp"),
        str(pictures),
        "--classnames",
        "cat,dog,bus,violin",
        "--top",
        "2",
    ]
    assert main([*command, "--format", "jsonl"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 8 and all(len(row["predictions"]) == 2 for row in rows)
    assert main([*command, "--format", "csv"]) == 0
    table = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["classname"] for row in table[::2]] == [row["predictions"][0]["classname"] for row in rows]
    assert main(command) == 0
    assert "Probability" in capsys.readouterr().out
    names = pictures.parent / "names.txt"
    names.write_text("cat\ndog\n")
    assert main([*command[:4], "--classnames", str(names), "--format", "jsonl"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 8


def test_tables_are_read_and_what_is_hidden_is_not(runs, pictures, tmp_path, capsys):
    shutil.copy(pictures / "cat-fluent_3d.webp", tmp_path / "cat.webp")
    (tmp_path / "._cat.webp").write_bytes(b"\0\5\26\7")
    (tmp_path / "own.csv").write_text("label,path\ncat,./cat.webp\n")
    (tmp_path / "bare.csv").write_text("cat.webp\n")
    command = ["predict", "--model-dir", str(runs / "ZeroshotCLIP"), "--format", "csv"]
    for given in (tmp_path, tmp_path / "own.csv"):
        assert main([*command, str(given)]) == 0
        (row,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
        assert row["image"] == str(tmp_path / "cat.webp")
    assert main([*command, str(tmp_path / "bare.csv")]) == 2
    assert "no column 'path'" in capsys.readouterr().err


def test_errors_are_one_line(runs, pictures, tmp_path, capsys):
    image = str(pictures / "cat-fluent_3d.webp")
    (tmp_path / "empty").mkdir()
    for arguments, words in (
        ([image, "--model-dir", str(tmp_path)], "no "),
        ([str(tmp_path / "none.jpg"), "--model-dir", str(runs / "CoOp")], "none.jpg"),
        ([str(tmp_path / "empty"), "--model-dir", str(runs / "CoOp")], "no pictures"),
        ([image, "--model-dir", str(runs / "CoOp"), "--top", "0"], "--top"),
        ([image, "--model-dir", str(runs / "CoOp"), "--classnames", ","], "--classnames"),
        ([image, "--model-dir", str(runs / "CoOp"), "--load-epoch", "9"], "model.pth.tar-9"),
        ([image, "--model-dir", str(runs / "CSC"), "--classnames", "a,b,c"], "context for each"),
    ):
        assert main(["predict", *arguments]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("promptmix: error") == 1
    predictor = promptmix.load(runs / "ZeroshotCLIP")
    for names in ([], ["cat", "cat"]):
        with pytest.raises(ConfigError, match="each once"):
            predictor.predict(image, names)
    with pytest.raises(DataError, match="not a results file|no class names"):
        (tmp_path / "results.json").write_text('{"schema_version": 1}')
        promptmix.load(tmp_path)


def test_unknown_attributes_still_fail():
    with pytest.raises(AttributeError, match="nonsense"):
        promptmix.nonsense  # noqa: B018


def test_training_stops_at_bad_pictures_or_skips_them(pictures, tmp_path, capsys):
    for path in pictures.iterdir():
        for part in ("train", "test"):
            target = tmp_path / part / path.name.split("-")[0] / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    bad = tmp_path / "train" / "cat" / "cut.webp"
    bad.write_bytes(next(pictures.iterdir()).read_bytes()[:200])
    opts = [str(part) for pair in OPTS.items() for part in pair]
    command = ["train", "--root", str(tmp_path), "--trainer", "ZeroshotCLIP", "--output-dir", str(tmp_path / "out")]
    assert main([*command, *opts]) == 2
    captured = capsys.readouterr()
    assert f"{bad}: damaged" in captured.err and "--skip-bad" in captured.err and not (tmp_path / "out").exists()
    assert main([*command, "--skip-bad", *opts]) == 0
    assert "1 picture is left out" in capsys.readouterr().out


def test_sentences_about_classes_are_named_again_by_whoever_predicts(pictures, tmp_path, capsys):
    for path in pictures.iterdir():
        for part in ("train", "test"):
            (tmp_path / "data" / part / path.name.split("-")[0]).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, tmp_path / "data" / part / path.name.split("-")[0])
    sentences, more = tmp_path / "ImageFolder.json", tmp_path / "more.json"
    known = {name: [f"A {name} makes a sound."] for name in PICTURES}
    sentences.write_text(json.dumps(known))
    more.write_text(json.dumps(known | {"red panda": ["It eats bamboo."]}))
    cfg, out = get_cfg(), str(tmp_path / "run")
    small = {"TRAINER.LWEIB.ADAPTER_END": 1, "OPTIM.MAX_EPOCH": 1, "MODEL.BACKBONE.NAME": "tiny-vit", "INPUT.SIZE": (64, 64)}
    own = {"TRAINER.NAME": "LwEIB", "OUTPUT_DIR": out, "DATASET.ROOT": str(tmp_path / "data")}
    described = {"DATASET.DESCRIPTIONS": str(tmp_path)}  # a folder, which holds a file for each data set
    merge_opts(cfg, [part for pair in (OPTS | small | own | described).items() for part in pair])
    run(cfg, quiet=True)
    picture = str(next(pictures.iterdir()))
    with pytest.raises(DataError, match="--descriptions"):
        promptmix.load(out)
    assert promptmix.load(out, descriptions=sentences).predict(picture)[0].classname in PICTURES
    assert main(["predict", "--model-dir", out, picture, "--classnames", "cat,red_panda", "--descriptions", str(sentences)]) == 2
    assert "no sentences for 1 of 2 classes: 'red_panda'" in capsys.readouterr().err
    assert main(["predict", "--model-dir", out, picture, "--classnames", "cat,red_panda", "--descriptions", str(more)]) == 0
    assert main(["eval", out]) == 2
    assert "DATASET.DESCRIPTIONS is" in capsys.readouterr().err
    assert main(["eval", out, "DATASET.DESCRIPTIONS", str(sentences)]) == 0


def test_pictures_without_pixels_and_closed_ones_are_one_line(tmp_path):
    from promptmix.data.reading.images import as_rgb
    from promptmix.predict.given import each

    path = tmp_path / "a.png"
    Image.new("RGB", (4, 4)).save(path)
    picture = Image.open(path)
    picture.close()
    with pytest.raises(DataError, match="open it anew"):
        as_rgb(picture, "upright")
    with pytest.raises(DataError, match="0 x 0 pixels"):
        as_rgb(Image.new("RGB", (0, 0)))
    with path.open("rb") as file:
        pass
    with pytest.raises(ConfigError, match="give paths"):
        list(each(file))
    for odd in (type("Odd", (), {"__iter__": lambda _: 5})(), np.zeros((0, 9, 3))):
        with pytest.raises(ConfigError, match="images is"):
            list(each(odd))


def test_tensors_of_another_backbone_are_refused(runs, tmp_path):
    run_ = shutil.copytree(runs / "CoOp", tmp_path / "run")
    path = run_ / "prompt_learner" / "model.pth.tar-2"
    state = load_checkpoint(path)
    assert state["backbone"] == OPTS["MODEL.BACKBONE.NAME"]
    save_plain(state | {"backbone": "ViT-B/16"}, path)
    with pytest.raises(CheckpointError, match="learned with the backbone ViT-B/16"):
        promptmix.load(run_)
