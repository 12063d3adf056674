"""Loggers write what a training reports; the trackers are the real packages, offline."""

import importlib.util
import json
from types import SimpleNamespace

import pytest
from promptmix.plugins.loggers import trackers

from promptmix.cli import main
from promptmix.config import get_cfg
from promptmix.errors import ConfigError

QUICK = ["train", "--trainer", "CoOp", "--config-file", "configs/quickstart.yaml", "--seed", "1", "--quiet"]
SHORT = ["OPTIM.MAX_EPOCH", "2", "DATASET.NUM_SHOTS", "1", "DATASET.NAME", "EmojiConcepts", "DATASET.EMOJI.NUM_CONCEPTS", "8"]


def train(folder, *opts):
    assert main([*QUICK, "--output-dir", str(folder), *SHORT, *opts]) == 0
    return folder


def test_every_scalar_is_a_line_and_another_logger_no_other_run(tmp_path):
    lines = (train(tmp_path / "run") / "scalars.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert [line["step"] for line in found if line["tag"] == "train/loss"] == [0, 1]
    accuracy = json.loads((tmp_path / "run" / "results.json").read_text())["metrics"]["test"]["accuracy"]
    assert [line["value"] for line in found if line["tag"] == "test/accuracy"] == [accuracy]
    assert main([*QUICK, "--output-dir", str(tmp_path / "run"), *SHORT, "LOGGER.JSONL.ENABLED", "False"]) == 0


def test_switched_off_leaves_nothing(tmp_path):
    train(tmp_path / "run", "LOGGER.JSONL.ENABLED", "False", "LOGGER.TENSORBOARD.ENABLED", "False")
    assert not (tmp_path / "run" / "scalars.jsonl").exists()
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_wandb_offline_has_config_and_scalars(tmp_path):
    pytest.importorskip("wandb")
    folder = train(tmp_path / "run", "LOGGER.WANDB.ENABLED", "True")
    (record,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    text = record.read_bytes()
    for word in (b"TRAINER.COOP.N_CTX", b"train/loss", b"test/accuracy", b"CoOp-EmojiConcepts-seed1"):
        assert word in text


def test_mlflow_has_config_and_scalars(tmp_path):
    client = pytest.importorskip("mlflow.tracking").MlflowClient
    folder = train(tmp_path / "run", "LOGGER.MLFLOW.ENABLED", "True")
    store = client(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    experiment = store.get_experiment_by_name("promptmix")
    (run,) = store.search_runs([experiment.experiment_id])
    assert run.data.params["OPTIM.MAX_EPOCH"] == "2"
    assert run.info.status == "FINISHED"
    assert [point.step for point in store.get_metric_history(run.info.run_id, "train/loss")] == [0, 1]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_one_line(tmp_path, capsys, monkeypatch, name):
    from promptmix.plugins.loggers import trackers

    there = importlib.util.find_spec
    monkeypatch.setattr(trackers, "find_spec", lambda module: None if module == name else there(module))
    assert main([*QUICK, "--output-dir", str(tmp_path / "run"), *SHORT, f"LOGGER.{name.upper()}.ENABLED", "True"]) == 2
    assert f"{name} is not installed; pip install 'promptmix[{name}]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_name_that_mlflow_takes_not_leaves_nothing(tmp_path, capsys):
    more = ["LOGGER.MLFLOW.ENABLED", "True", "LOGGER.MLFLOW.EXPERIMENT", "x" * 501]
    assert main([*QUICK, "--output-dir", str(tmp_path / "run"), *SHORT, *more]) == 2
    assert "LOGGER.MLFLOW.EXPERIMENT has 501 letters; give it 1 to 500" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_fails_is_one_line_before_a_training_and_a_warning_during_it(monkeypatch, capsys):
    class Trainer:
        cfg = get_cfg()

    def broken(*_):
        raise OSError("no server")

    trainer = Trainer()
    monkeypatch.setattr(trackers, "logger_is_on", lambda trainer, node: node == "WANDB")
    monkeypatch.setitem(trackers.TRACKERS, "WANDB", ("wandb", broken))
    with pytest.raises(ConfigError, match=r"LOGGER.WANDB can't begin a run .OSError: no server.; fix its settings"):
        trackers.before_train(trainer)
    trackers._open[trainer].append(SimpleNamespace(log=broken, close=broken))
    trackers.log_scalar(trainer, "loss", 1.0, 1)
    assert not trackers._open[trainer] and "records nothing more" in capsys.readouterr().out
