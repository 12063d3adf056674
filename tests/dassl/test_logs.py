"""Trees of CoOp-style logs, alone and beside ours, in one table."""

from __future__ import annotations

import json

import pytest

from promptmix.cli import main
from promptmix.dassl.config import get_cfg_default
from promptmix.runs.results import RunResult, find, read_run


def config(trainer, seed, classes="all", dataset="EuroSAT", **node):
    cfg = get_cfg_default()
    cfg.TRAINER.NAME, cfg.SEED, cfg.DATASET.NAME, cfg.DATASET.SUBSAMPLE_CLASSES = trainer, seed, dataset, classes
    cfg.DATASET.NUM_SHOTS, cfg.MODEL.BACKBONE.NAME = 16, "ViT-B/16"
    cfg.TRAINER[trainer.upper()] = type(cfg)({"N_CTX": 4, **node})
    cfg.TRAINER.COCOOP = type(cfg)({"N_CTX": 16})  # another method's node, which CoOp's train.py declares for every run
    return cfg


def result(accuracy):
    return (
        f"=> result\n* total: 8,100\n* correct: 7,000\n* accuracy: {accuracy:.1f}%\n* error: {100 - accuracy:.1f}%\n"
        f"* macro_f1: {accuracy - 1:.1f}%\n"
    )


def write_log(folder, cfg, accuracy, eval_only=False, finished=True, header="Evaluate on the *test* set", val=None):
    """Write `log.txt` in the wording of Dassl and CoOp's train.py."""
    folder.mkdir(parents=True)
    arguments = {"backbone": "", "eval_only": eval_only, "load_epoch": 50 if eval_only else None, "model_dir": "out/seed1"}
    lines = ["***************", "** Arguments **", "***************", *(f"{k}: {v}" for k, v in arguments.items())]
    lines += ["************", "** Config **", "************", str(cfg), "Collecting env info ...", "** System info **", "..."]
    lines += ["Loading trainer: CoOp", "Loading dataset: EuroSAT"]
    if not eval_only:
        lines.append(
            "epoch [50/50] batch [5/5] time 0.1 (0.1) data 0.0 (0.0) loss 0.5 (0.6) acc 90.0 (80.0) lr 2.0e-06 eta 0:00:00"
        )
        lines += ["Evaluate on the *val* set", result(val)] if val else []
        lines += ["Finish training", "Deploy the last-epoch model"] if finished else []
    if finished:
        lines += [header, result(accuracy), "Elapsed: 0:01:00"]
    (folder / "log.txt").write_text("\n".join(lines) + "\n")


def table(capsys, *flags):
    assert main(["parse", *map(str, flags), "--format", "json"]) == 0
    return {(row["method"], row["dataset"], row["part"]): row for row in json.loads(capsys.readouterr().out)}


def test_their_logs_and_ours_share_a_row(tmp_path, capsys):
    for seed, accuracy in ((1, 80.0), (2, 82.0)):
        write_log(tmp_path / "coop" / f"seed{seed}", config("CoOp", seed), accuracy)
    ours = RunResult.from_config(json.loads(json.dumps(config("CoOp", 3))) | {"PROMPT_BANK": {"NAME": ""}})
    ours.config["TRAINER"]["COCOOP"]["N_CTX"] = 4  # our default of another method is no other setting of this one
    ours.metrics = {"test": {"accuracy": 84.0, "macro_f1": 83.0}}
    ours.save(tmp_path / "ours")
    rows = table(capsys, tmp_path, "--metric", "accuracy")
    assert list(rows) == [("CoOp", "EuroSAT", "test")]
    row = rows["CoOp", "EuroSAT", "test"]
    assert row["seeds"] == [1, 2, 3] and row["count"] == 3 and row["mean"] == pytest.approx(82.0)
    assert row["spread"] == pytest.approx((8 / 3) ** 0.5)  # numpy's deviation, as Dassl's script computes it
    assert table(capsys, tmp_path, "--ci95", "--metric", "accuracy")["CoOp", "EuroSAT", "test"]["spread"] == pytest.approx(
        4.302652730 * 2.0 / 3**0.5  # Student's, of the sample deviation; Dassl's script has 1.96 of the population's
    )


def test_a_setting_of_the_method_itself_parts_rows(tmp_path, capsys):
    write_log(tmp_path / "a", config("CoOp", 1), 80.0)
    write_log(tmp_path / "b", config("CoOp", 1, CSC=True), 70.0)
    cfg = config("CoOp", 1)
    cfg.TRAINER.COOP.N_CTX = 16
    write_log(tmp_path / "c", cfg, 60.0)
    assert main(["parse", str(tmp_path), "--metric", "accuracy"]) == 0
    assert "TRAINER.COOP.N_CTX=16" in capsys.readouterr().out


def test_a_method_that_reads_anothers_node_keeps_it_apart(tmp_path):
    """The authors' KgCoOp has its weight under TRAINER.COOP."""
    cfg = config("CoOp", 1)
    cfg.TRAINER.NAME = "KgCoOp"
    write_log(tmp_path / "kg", cfg, 80.0)
    assert "TRAINER.COOP.N_CTX" in read_run(tmp_path / "kg").settings()


def test_test_logs(tmp_path, capsys):
    """Base classes from the training log, new ones from an evaluation of it."""
    write_log(tmp_path / "train" / "seed1", config("CoOp", 1, "base"), 90.0, val=85.0)
    write_log(tmp_path / "test" / "seed1", config("CoOp", 1, "new"), 60.0, eval_only=True)
    rows = table(capsys, tmp_path, "--metric", "accuracy")
    assert [rows["CoOp", "EuroSAT", part]["mean"] for part in ("base", "new", "h")] == pytest.approx([90, 60, 72])
    only = table(capsys, tmp_path, "--test-log", "--metric", "accuracy")
    assert list(only) == [("CoOp", "EuroSAT", "new")]
    (run,) = find(tmp_path, test_log=True)[0]
    assert run.checkpoint == {"directory": "out/seed1", "epoch": 50}
    assert find(tmp_path)[0][1].metrics["val"]["accuracy"] == 85.0
    assert main(["parse", str(tmp_path / "train"), "--test-log"]) == 2
    assert "no run below it evaluated without training" in capsys.readouterr().err


def test_multi_exp(tmp_path, capsys):
    for dataset, accuracy in (("EuroSAT", 80.0), ("DescribableTextures", 60.0)):
        write_log(tmp_path / dataset / "seed1", config("CoOp", 1, dataset=dataset), accuracy)
    rows = table(capsys, tmp_path, "--multi-exp", "--metric", "accuracy")
    assert rows["CoOp", "average of 2", "test"]["mean"] == pytest.approx(70.0)


def test_unfinished_and_older_logs(tmp_path, capsys):
    write_log(tmp_path / "cut", config("CoOp", 1), 80.0, finished=False)
    write_log(tmp_path / "old", config("CoOp", 2), 70.0, header="Do evaluation on test set")
    assert main(["parse", str(tmp_path), "--metric", "accuracy"]) == 0
    printed = capsys.readouterr()
    assert "70.00" in printed.out and "no finished result" in printed.err and "cut" in printed.err
