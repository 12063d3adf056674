"""A run from a stranger: its record opens no file, writes nowhere and loads no code; the caller says what may be opened."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

import promptmix
from promptmix.cli import main
from promptmix.config import get_cfg, merge_opts
from promptmix.config.places import PLACES
from promptmix.errors import DataError, UserError, WeightsError
from promptmix.files.places import is_own_place
from promptmix.runs.run import run

OPTS = {
    "DATASET.NAME": "EmojiFamilies",
    "DATASET.NUM_SHOTS": 1,
    "MODEL.BACKBONE.NAME": "tiny-en",
    "INPUT.SIZE": (32, 32),
    "DATALOADER.NUM_WORKERS": 0,
    "TRAINER.NAME": "ZeroshotCLIP",
    "SEED": 1,
}


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own") / "run"
    cfg = get_cfg()
    merge_opts(cfg, [part for pair in OPTS.items() for part in pair])
    merge_opts(cfg, ["OUTPUT_DIR", str(folder)])
    run(cfg, quiet=True)
    return folder


@pytest.fixture
def foreign(own, tmp_path):
    """A copy whose record the test changes."""
    folder = tmp_path / "foreign"
    shutil.copytree(own, folder)

    def change(key, value, also=lambda tree: None):
        for name, load, dump in (
            ("results.json", json.loads, json.dumps),
            ("run_config.yaml", yaml.safe_load, yaml.safe_dump),
        ):
            tree = load((folder / name).read_text())
            also(tree)
            node = tree["config"] if name == "results.json" else tree
            *nodes, leaf = key.split(".")
            for part in nodes:
                node = node[part]
            node[leaf] = str(value)
            (folder / name).write_text(dump(tree))
        return folder

    return change


@pytest.fixture
def weights(tmp_path):
    """The embedded backbone's weights as a file of the user's."""
    from promptmix.assets import asset_path
    from promptmix.clip.load import read_weights

    state: dict[str, torch.Tensor] = {}
    for file in json.loads(asset_path("models/tiny-en.json").read_text())["weights"]:
        state |= read_weights(asset_path(f"models/{file}"))
    save_file(state, tmp_path / "backbone.safetensors")
    return tmp_path / "backbone.safetensors"


def test_weights_are_opened_only_if_the_caller_names_them(foreign, weights, capsys):
    folder = foreign("MODEL.BACKBONE.WEIGHTS", weights)
    with pytest.raises(WeightsError, match=r"had its backbone from .*backbone.safetensors.* with --weights .*in Python weights="):
        promptmix.load(folder)
    assert promptmix.load(folder, weights=weights).classnames
    assert main(["predict", "--model-dir", str(folder), "x.png"]) == 2
    assert f"--weights {weights}" in capsys.readouterr().err


def test_sentences_are_opened_only_if_the_caller_names_them(foreign, tmp_path):
    with pytest.raises(DataError, match=r"read sentences about its classes from .*evil.json.* with --descriptions .*evil.json"):
        promptmix.load(foreign("DATASET.DESCRIPTIONS", tmp_path / "evil.json"))


def test_an_archive_with_a_program_is_not_even_opened_by_a_run_that_names_it(foreign, tmp_path, monkeypatch):
    from promptmix.clip import load

    monkeypatch.setattr(load, "read_weights", lambda path: pytest.fail(f"{path} was opened"))
    folder = foreign("MODEL.BACKBONE.WEIGHTS", tmp_path / "evil.pt")
    with pytest.raises(WeightsError):
        promptmix.load(folder)


@pytest.mark.parametrize("key", ["MODEL.INIT_WEIGHTS", "RESUME", "OUTPUT_DIR", "INPUT.FEATURE_CACHE_DIR", "DATASET.ROOT"])
def test_predictions_open_and_write_nothing_that_a_record_names(foreign, tmp_path, key):
    elsewhere = tmp_path / "elsewhere"
    predictor = promptmix.load(foreign(key, elsewhere))
    assert not elsewhere.exists()
    values = [predictor._trainer.cfg]
    for part in key.split("."):
        values.append(values[-1][part])
    assert str(elsewhere) not in str(values[-1])


@pytest.mark.parametrize("key", list(PLACES))
def test_a_record_as_config_file_names_no_place(foreign, tmp_path, key, capsys):
    elsewhere = tmp_path / "elsewhere"
    record = foreign(key, elsewhere) / "run_config.yaml"
    out = [] if key == "OUTPUT_DIR" else ["--output-dir", str(tmp_path / "out")]
    code = main(["train", "--config-file", str(record), "--eval-only", *out])
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and f"{key} is '{elsewhere}', which only the record of a run names" in error
    assert f"{PLACES[key]} {elsewhere}, or another" in error and not elsewhere.exists()


def test_a_record_as_base_names_no_place(foreign, tmp_path, capsys):
    foreign("OUTPUT_DIR", tmp_path / "elsewhere")
    (tmp_path / "mine.yaml").write_text("_BASE_: foreign/run_config.yaml\nSEED: 2\n")
    assert main(["train", "--config-file", str(tmp_path / "mine.yaml")]) == 2
    assert "--output-dir" in capsys.readouterr().err


def test_what_the_caller_names_is_taken(foreign, tmp_path, capsys):
    record = foreign("INPUT.FEATURE_CACHE_DIR", tmp_path / "cache") / "run_config.yaml"
    command = ["train", "--config-file", str(record), "--no-train", "--output-dir", str(tmp_path / "out")]
    assert main([*command, "INPUT.FEATURE_CACHE_DIR", str(tmp_path / "cache")]) == 0


def test_a_run_is_repeated_in_its_own_folder(own):
    assert main(["train", "--config-file", str(own / "run_config.yaml"), "--no-train"]) == 0


def test_no_plugin_is_loaded_since_a_record_names_it(foreign, tmp_path):
    trap = tmp_path / "trap.py"
    trap.write_text(f"open({str(tmp_path / 'exploded')!r}, 'w')")

    def also(tree):
        tree["command"], tree["plugins"] = ["promptmix", "train", "--plugin", str(trap)], [str(trap)]

    folder = foreign("OUTPUT_DIR", "x", also)
    promptmix.load(folder)
    assert not (tmp_path / "exploded").exists()


def test_a_trainer_of_a_plugin_is_not_looked_for(foreign):
    with pytest.raises(UserError, match="evil.module"):
        promptmix.load(foreign("TRAINER.NAME", "evil.module"))


def test_places_of_our_own(tmp_path, monkeypatch):
    from promptmix.assets import asset_path

    model = asset_path("models/tiny-en-image.safetensors")
    assert is_own_place(model) and is_own_place(Path("~/.cache/clip/ViT-B-16.pt").expanduser())
    link = tmp_path / "link"
    link.symlink_to(model)
    assert is_own_place(link) and not is_own_place(tmp_path / "x") and not is_own_place(model.parent.parent / "x")
    assert not is_own_place(model.parent / ".." / ".." / "x") and not is_own_place("\0")
