"""A run done again: replayed bit for bit, evaluated on its own and on other data with nothing retyped, calibrated."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from promptmix.cli import main
from promptmix.config import get_cfg, get_key, merge_file, source_of
from promptmix.data.datasets.emoji import write_sample
from promptmix.engine.checkpoint import load_checkpoint
from promptmix.runs import calibration, results

QUICK = ["OPTIM.MAX_EPOCH", "2", "INPUT.SIZE", "(32, 32)"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own") / "pictures"
    write_sample(folder, ("bird", "clock", "fruit"))
    return folder


@pytest.fixture(scope="module")
def run(pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    assert main(["fit", str(pictures), "--output-dir", str(out), "--no-baseline", *QUICK]) == 0
    return out / "CoOp"


def tensors(folder, epoch=2):
    return load_checkpoint(Path(folder, "prompt_learner", f"model.pth.tar-{epoch}"))["state_dict"]


def test_the_command_in_the_results_replays_the_run_bit_for_bit(run):
    old = results.load(run / "results.json")
    assert old.replay[:4] == ["promptmix", "train", "--from-run", str(run)]
    assert main([*old.replay[1:]]) == 0
    again = old.replay[old.replay.index("--output-dir") + 1]
    new = results.load(Path(again, "results.json"))
    assert new.metrics == old.metrics and new.settings() == old.settings()
    mine, theirs = tensors(run), tensors(again)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
    shutil.rmtree(again)


def test_an_evaluation_is_replayed_too(run):
    assert main(["eval", str(run)]) == 0
    old = results.load(run / "eval" / "test" / "results.json")
    assert old.metrics == results.load(run / "results.json").metrics
    assert "--eval-only" in old.replay and main([*old.replay[1:]]) == 0
    assert results.load(run / "eval" / "test-again" / "results.json").metrics == old.metrics


def test_a_run_goes_on_with_other_settings_elsewhere(run, tmp_path):
    assert main(["train", "--from-run", str(run), "--output-dir", str(tmp_path / "out"), "--quiet", "OPTIM.MAX_EPOCH", "1"]) == 0
    assert results.load(tmp_path / "out" / "results.json").config["OPTIM"]["MAX_EPOCH"] == 1


def test_other_pictures_are_all_tested_with_the_words_of_the_run(run, pictures, capsys):
    damaged = next(path for path in pictures.iterdir() if path.is_dir()) / "damaged.png"
    damaged.write_bytes(b"none")
    try:
        assert main(["eval", str(run), "--on", str(pictures), "--output-dir", str(run / "all"), "--skip-bad"]) == 0
    finally:
        damaged.unlink()
    told = capsys.readouterr()
    assert "among 3 classes" in told.out and "is what the run was trained on; without --on" in told.out + told.err
    found = results.load(run / "all" / "results.json")
    assert "* total: 70" in (run / "all" / "log.txt").read_text() and found.title == "pictures"
    assert found.vocabulary["templates"] == results.load(run / "results.json").vocabulary["templates"]
    assert main(["eval", str(run), "--on", "EmojiFamilies", "DATASET.SUBSAMPLE_CLASSES", "new"]) == 0
    assert "among 20 classes" in capsys.readouterr().out


def test_calibration_is_measured_on_val_and_kept(run, capsys):
    (run / calibration.FILE).unlink(missing_ok=True)
    assert main(["eval", str(run), "--calibrate"]) == 0
    found = calibration.read(run)
    assert found.pictures == 14 and found.nll <= found.nll_before and found.epoch is None
    assert f"temperature {found.temperature:.3f} from 14 val pictures" in capsys.readouterr().out


def test_temperature_is_that_of_the_least_loss():
    torch.manual_seed(0)
    logits = 5 * torch.randn(2000, 4)
    labels = torch.distributions.Categorical(logits=logits / 2.5).sample()
    found = calibration.fit_temperature(logits, labels)
    assert found == pytest.approx(2.5, rel=0.1)
    losses = [float(torch.nn.functional.cross_entropy(logits / t, labels)) for t in (0.99 * found, found, 1.01 * found)]
    assert losses[1] == min(losses)
    assert (
        calibration.expected_error((logits / 2.5).softmax(1), labels) < 3 < calibration.expected_error(logits.softmax(1), labels)
    )


def test_error_of_perfect_confidence_is_the_error_rate():
    sure = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert calibration.expected_error(sure, torch.tensor([0, 0, 1, 0])) == pytest.approx(25)


def test_pictures_that_cant_tell_leave_no_temperature(tmp_path):
    from types import SimpleNamespace

    right = SimpleNamespace(val_loader=[], scores=lambda part: (torch.eye(3), torch.arange(3)))
    (tmp_path / calibration.FILE).write_text("{}")
    assert calibration.calibrate(right, tmp_path) is None and not (tmp_path / calibration.FILE).exists()
    assert "can't tell" in calibration.in_words(None)
    assert "next to nothing: expected calibration error there 8.7%" in calibration.in_words(
        calibration.Calibration(0.99, 59, None, nll=1.037, nll_before=1.0372, ece=11.8, ece_before=8.7)
    )


@pytest.mark.parametrize("content", ["[]", '{"temperature": 0}', '{"temperature": "x", "pictures": 1}'])
def test_a_calibration_that_is_none_is_refused(tmp_path, content):
    from promptmix.errors import DataError

    (tmp_path / calibration.FILE).write_text(content)
    with pytest.raises(DataError, match="--calibrate"):
        calibration.read(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["eval", "RUN", "--load-epoch", "7"], "model.pth.tar-7"),
        (["eval", "RUN", "--output-dir", "RUN"], "which an evaluation would replace"),
        (["eval", "nowhere"], "no run_config.yaml"),
        (["eval", "RUN", "--on", "Nothing"], "unknown dataset 'Nothing'"),
        (["eval", "RUN", "--on", "EmojiFamilies", "--calibrate"], "leave out --on"),
        (["eval", "RUN", "TRAINER.COOP.N_CTX", "7"], "was trained with"),
        (["train", "--from-run", "RUN", "--config-file", "configs/quickstart.yaml"], "leave one out"),
        (
            ["train", "--from-run", "RUN", "DATASET.IMAGEFOLDER.SPLIT_RATIO", "(0, 0, 1)", "OUTPUT_DIR", "OUT"],
            "all pictures are tested",
        ),
        (["train", "--from-run", "RUN", "--threads", "0"], "--threads"),
    ],
)
def test_mistakes_are_one_line(run, tmp_path, arguments, words, capsys):
    given = [{"RUN": str(run), "OUT": str(tmp_path / "out")}.get(word, word) for word in arguments]
    assert main(given) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("promptmix: error") == 1 and not (tmp_path / "out").exists()


def test_files_that_only_the_record_names_are_not_opened(run, tmp_path, capsys):
    foreign = tmp_path / "foreign"
    shutil.copytree(run, foreign)
    tree = yaml.safe_load((foreign / "run_config.yaml").read_text())
    for key in ("WEIGHTS", "INIT_WEIGHTS", "RESUME"):
        node = {"WEIGHTS": tree["MODEL"]["BACKBONE"], "INIT_WEIGHTS": tree["MODEL"], "RESUME": tree}[key]
        node[key] = "/somebody/elses"
        (foreign / "run_config.yaml").write_text(yaml.safe_dump(tree))
        assert main(["train", "--from-run", str(foreign)]) == 2
        error = capsys.readouterr().err
        assert "only the record of a run names" in error and "/somebody/elses" in error
        if key == "WEIGHTS":
            assert main(["eval", str(foreign)]) == 2 and "only the record" in capsys.readouterr().err
        else:  # what a training started from is nothing to an evaluation
            assert main(["eval", str(foreign), "--output-dir", str(tmp_path / key)]) == 0
        node[key] = ""
    tree["_BASE_"] = "/somebody/elses.yaml"
    (foreign / "run_config.yaml").write_text(yaml.safe_dump(tree))
    assert main(["eval", str(foreign)]) == 2 and "unknown config key '_BASE_'" in capsys.readouterr().err


@pytest.mark.parametrize("trainer", ["Mixture", "MaPLe", "MoCoOp"])
def test_every_record_reads_back(pictures, tmp_path, trainer):
    flags = ["--trainer", trainer, "--shots", "1", "--no-baseline", "--output-dir", str(tmp_path)]
    assert main(["fit", str(pictures), *flags, "OPTIM.MAX_EPOCH", "1"]) == 0
    record = tmp_path / trainer / "run_config.yaml"
    cfg = get_cfg()
    merge_file(cfg, record)
    assert json.loads(json.dumps(cfg)) == results.load(tmp_path / trainer / "results.json").config
    assert source_of(cfg, "INPUT.FEATURE_CACHE") is None and source_of(cfg, "TRAINER.NAME") == str(record)
    assert get_key(cfg, "DATASET.NAME") == "ImageFolder"
    again = ["train", "--config-file", str(record), "--output-dir", str(tmp_path / "again"), "--quiet"]
    assert main(again) == 0


def test_a_run_that_ended_is_tested_again_with_all_its_numbers(tmp_path):
    flags = ["train", "--trainer", "CoOp", "--config-file", "configs/quickstart.yaml", "--output-dir", str(tmp_path / "out")]
    flags += ["--quiet", *QUICK, "TEST.FINAL_MODEL", "best_val", "DATASET.NUM_SHOTS", "1", "DATALOADER.NUM_WORKERS"]
    assert main([*flags, "0"]) == 0
    old = results.load(tmp_path / "out" / "results.json").metrics
    assert main([*flags, "1"]) == 0
    assert results.load(tmp_path / "out" / "results.json").metrics == old and {"val", "test"} <= set(old)
