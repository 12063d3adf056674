"""Packed prompts predict what the run predicts, say nothing of the machine, and are refused once changed; cards are text."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
import yaml

import promptmix
from promptmix.assets import asset_path
from promptmix.cli import main
from promptmix.errors import CheckpointError, DataError, UserError
from promptmix.runs import calibration, hub, results
from promptmix.runs.card import card_of

QUICK = ["--config-file", "configs/quickstart.yaml", "--seed", "1", "OPTIM.MAX_EPOCH", "1", "DATASET.NUM_SHOTS", "1"]
QUICK += ["INPUT.SIZE", "(32, 32)"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("secret-place") / "run"
    flags = ["train", "--trainer", "MoCoOp", "--output-dir", str(folder), *QUICK, "DATASET.SUBSAMPLE_CLASSES", "base"]
    assert main(flags) == 0
    return folder


@pytest.fixture
def packed(run, tmp_path, monkeypatch):
    monkeypatch.setenv("PROMPTMIX_HUB", str(tmp_path / "hub"))
    assert main(["hub", "pack", str(run), "--as", "anna/emoji", "--license", "mit"]) == 0
    return tmp_path / "hub" / "anna" / "emoji"


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    import zipfile

    path = tmp_path_factory.mktemp("pictures") / "cat.webp"
    with zipfile.ZipFile(asset_path("emoji/openmoji_color.zip")) as pack:
        path.write_bytes(pack.read("1f408.webp"))
    return str(path)


def test_packed_prompts_predict_what_the_run_predicts(run, packed, picture):
    expected = promptmix.load(run).predict(picture)[0]
    for place in (str(packed), "hub:anna/emoji"):
        found = promptmix.load(place).predict(picture)[0]
        assert found.classnames == expected.classnames
        assert np.allclose(found.probabilities, expected.probabilities)
    other = promptmix.load("hub:anna/emoji").predict(picture, ["cat", "dog"])[0]
    assert set(other.classnames) == {"cat", "dog"}


def test_the_temperature_travels_and_is_held_by_its_digest(run, tmp_path, monkeypatch, picture):
    monkeypatch.setenv("PROMPTMIX_HUB", str(tmp_path / "hub"))
    own = shutil.copytree(run, tmp_path / "run")
    found = calibration.Calibration(2.5, 10, None, nll=1.0, nll_before=1.1, ece=1.0, ece_before=2.0)
    (own / calibration.FILE).write_text(json.dumps(dataclasses.asdict(found)))
    made = hub.pack(own, "warm", tmp_path / "hub")
    expected = promptmix.load(own).predict(picture)[0].probabilities
    assert np.allclose(promptmix.load(made).predict(picture)[0].probabilities, expected)
    plain = hub.pack(run, "plain", tmp_path / "hub")
    assert not np.allclose(promptmix.load(plain).predict(picture)[0].probabilities, expected)
    shutil.copy(made / calibration.FILE, plain)
    with pytest.raises(DataError, match="calibration.json was not packed"):
        hub.check(plain)


def test_an_evaluation_stays_out_of_the_packed_folder(packed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["eval", "hub:anna/emoji"]) == 0
    assert (tmp_path / "output" / "eval" / "emoji" / "test" / "results.json").is_file()
    assert not list(packed.rglob("log.txt")) and "output/eval/emoji/test" in capsys.readouterr().out


def test_it_serves_evaluation_and_interpretation(packed, tmp_path, capsys):
    flags = ["train", "--trainer", "MoCoOp", "--eval-only", "--model-dir", "hub:anna/emoji"]
    flags += ["--output-dir", str(tmp_path / "new")]
    assert main([*flags, *QUICK, "DATASET.SUBSAMPLE_CLASSES", "new"]) == 0
    assert results.load(tmp_path / "new" / "results.json").metrics["test"]["accuracy"] > 0
    capsys.readouterr()
    assert main(["interpret", "hub:anna/emoji", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["mixtures"][0]["pictures"] == 42  # two of each base class


def test_it_says_nothing_of_the_machine(run, packed):
    assert sorted(path.name for path in packed.iterdir()) == ["README.md", "hub.json", "prompt_learner", "results.json"]
    for path in packed.rglob("*"):
        if path.is_file():
            assert b"secret-place" not in path.read_bytes()
    record = results.load(packed / "results.json")
    assert record.command == [] and record.config["OUTPUT_DIR"] == ""
    assert record.metrics == results.load(run / "results.json").metrics


def test_a_changed_file_is_refused(packed, tmp_path, picture):
    tensors = packed / "prompt_learner" / "model.safetensors"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-4] + b"\1\2\3\4")
    with pytest.raises(DataError, match="not what was packed"):
        promptmix.load("hub:anna/emoji")
    tensors.write_bytes(whole)
    for another in ("prompt_learner/model.pth.tar-1", "prompt_learner/checkpoint", "run_config.yaml"):
        (packed / another).write_bytes(b"another")
        with pytest.raises(DataError, match="was not packed"):
            promptmix.load(packed)
        (packed / another).unlink()
    shutil.copytree(packed, tmp_path / "copy")  # a folder that travelled
    assert promptmix.load(tmp_path / "copy").predict(picture)
    assert main(["convert", "hub:anna/emoji", str(tmp_path / "converted")]) == 0
    (packed / "hub.json").write_text("[]")
    assert main(["convert", str(packed), str(tmp_path / "again")]) == 2 and not (tmp_path / "again").exists()


def test_a_folder_that_somebody_gave_is_taken_by_name(packed, tmp_path, monkeypatch, picture, capsys):
    given = shutil.copytree(packed, tmp_path / "given")
    (given / "virus.py").write_text("nothing that was packed")
    monkeypatch.setenv("PROMPTMIX_HUB", str(tmp_path / "theirs"))
    assert main(["hub", "add", str(given)]) == 0 and "--model-dir hub:anna/emoji" in capsys.readouterr().out
    assert main(["hub", "add", str(given), "--as", "other"]) == 0
    assert {path.name for path in (tmp_path / "theirs" / "other").iterdir()} == {path.name for path in packed.iterdir()}
    assert promptmix.load("hub:other").predict(picture)
    (given / "README.md").write_text("changed")
    for flags, words in {(str(given), "--as", "x"): "not what was packed", (str(packed),): "is there already"}.items():
        assert main(["hub", "add", *flags]) == 2 and words in capsys.readouterr().err
    assert not (tmp_path / "theirs" / "x").exists() and len(list((tmp_path / "theirs").iterdir())) == 2


@pytest.mark.parametrize(
    "change",
    [
        *("{}", "[]", "x", "[" * 100_000, '{"format": 9, "files": {}}', '{"format": 1, "files": {"results.json": "0"}}'),
        '{"format": "1", "trainer": "CoOp", "backbone": "tiny-en", "files": {}}',
        '{"format": 1, "trainer": "CoOp", "backbone": "tiny-en", "files": {"../x": "0"}}',
        '{"format": 1, "trainer": "CoOp", "backbone": "tiny-en", "files": {"a\\u0000b": "0"}}',
    ],
)
def test_a_bad_note_is_one_line(packed, change, capsys):
    (packed / "hub.json").write_text(change)
    assert main(["hub", "check", str(packed)]) == 2
    err = capsys.readouterr().err.strip()
    assert "hub.json" in err and len(err.splitlines()) == 1
    assert main(["hub", "list"]) == 1 and "damaged" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["../x", "a/b/c", "/etc", "", ".hidden", "a\0b", "a b", "a/../b"])
def test_names_stay_below_the_hub(run, tmp_path, name):
    with pytest.raises(UserError, match="must be NAME or OWNER/NAME"):
        hub.pack(run, name, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_can_not_be_packed_is_one_line(run, packed, tmp_path, capsys):
    zero = tmp_path / "zero"
    assert main(["train", "--trainer", "ZeroshotCLIP", "--output-dir", str(zero), *QUICK]) == 0
    for flags, words in {
        ("pack", str(run), "--as", "anna/emoji"): "is there already",
        ("pack", str(tmp_path), "--as", "x"): "name the output folder of a run",
        ("pack", str(zero), "--as", "x"): "checkpoint",
        ("pack", str(run)): "--as NAME",
        ("pack",): "needs the output folder",
        ("list", "x"): "takes no folder",
        ("add",): "needs a folder that `promptmix hub pack` made",
        ("add", str(run / "results.json")): "unpack it",
        ("check", "x", "--as", "y"): "--as y is for hub pack and add",
        ("check", str(tmp_path)): "name a folder that `promptmix hub pack` made",
        ("check", "hub:anna/emojy"): "did you mean 'anna/emoji'",
    }.items():
        capsys.readouterr()
        assert main(["hub", *flags]) == 2
        assert words in capsys.readouterr().err
    capsys.readouterr()
    assert main(["hub", "list"]) == 0 and capsys.readouterr().out == "anna/emoji: MoCoOp for tiny-en\n"
    assert main(["hub", "list", "--hub", str(tmp_path)]) == 0
    assert f"{tmp_path} holds no packed prompts; `promptmix hub pack RUN --as NAME` makes some" in capsys.readouterr().out


def test_the_card_is_markdown_with_a_head(run, packed, tmp_path):
    text = (packed / "README.md").read_text(encoding="utf-8")
    _, head, body = text.split("---\n", 2)
    tree = yaml.safe_load(head)
    assert tree["library_name"] == "promptmix" and tree["license"] == "mit" and tree["base_model"] == "tiny-en"
    record = results.load(run / "results.json")
    assert f"{record.metrics['test']['accuracy']:.2f}" in body and "anna/emoji" in body and "ball or sports equipment" in body
    record.vocabulary = {"classnames": ["<script>alert(1)</script>", "a|b\n# c", "[x](http://y)", "\\[z](http://y)", "\u202e"]}
    record.title = "a\u202e\n---\nb"
    shown = card_of([record], name="`x`")
    assert "\\\\\\[z]" in shown and "\u202e" not in shown and shown.count("\n---\n") == 1
    assert "<script>" not in shown and "\n# c" not in shown and "&lt;script&gt;" in shown and "None is stated" in shown
    assert main(["card", str(run), str(run)]) == 2
    assert main(["card", str(run), "--out", str(run / "results.json")]) == 2 and results.load(run / "results.json")
    assert main(["card", str(run), "--out", str(tmp_path / "CARD.md")]) == 0
    assert (tmp_path / "CARD.md").read_text(encoding="utf-8").startswith("---\nlibrary_name")


def test_the_citation_is_of_this_version():
    from pathlib import Path

    tree = yaml.safe_load((Path(__file__).resolve().parent.parent / "CITATION.cff").read_text(encoding="utf-8"))
    assert tree["version"] == promptmix.__version__ and tree["license"] == "MIT" and tree["cff-version"] == "1.2.0"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.update(state_dict={k: v.long() for k, v in state["state_dict"].items()}), "is of type torch.int64"),
        (lambda state: state.pop("state_dict"), "has no 'state_dict'"),
        (lambda state: state.update(state_dict={k: v[:-1] for k, v in state["state_dict"].items()}), "has no digest"),
    ],
)
def test_what_loading_refuses_is_not_packed(run, tmp_path, change, words):
    copy = shutil.copytree(run, tmp_path / "run")
    file = next(copy.glob("prompt_learner/model.pth.tar-*"))
    state = torch.load(file)
    state.pop("digest")
    change(state)
    torch.save(state, file)
    with pytest.raises(CheckpointError, match=words):
        hub.pack(copy, "x", tmp_path / "hub")
    assert not (tmp_path / "hub").exists()
