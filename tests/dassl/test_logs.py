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


# Trees as CoOp's scripts leave them


def evaluated(folder, cfg, accuracy, model_dir):
    write_log(folder, cfg, accuracy, eval_only=True)
    log = folder / "log.txt"
    log.write_text(log.read_text().replace("model_dir: out/seed1", f"model_dir: {model_dir}"))


def test_sources_and_targets_stay_a_matrix(tmp_path, capsys):
    """Prompts of two sources on two targets: the printed configs of an evaluation are alike but for the target."""
    for source, bonus in (("imagenet", 0), ("caltech101", 10)):
        for target, accuracy in (("EuroSAT", 40.0), ("DescribableTextures", 50.0)):
            for seed in (1, 2):
                cfg = config("CoOp", seed, dataset=target)
                cfg.DATASET.NUM_SHOTS = -1  # CoOp's script for this gives no shots
                folder = tmp_path / "output" / "evaluation" / source / target / f"seed{seed}"
                evaluated(folder, cfg, accuracy + bonus + seed, f"output/{source}/CoOp/vit_b16_16shots/seed{seed}")
    write_log(
        tmp_path / "output" / "caltech101" / "CoOp" / "vit_b16_16shots" / "seed1", config("CoOp", 1, dataset="Caltech101"), 93.0
    )
    write_log(
        tmp_path / "output" / "imagenet" / "CoOp" / "vit_b16_16shots" / "seed1", config("CoOp", 1, dataset="ImageNet"), 70.0
    )
    rows = table(capsys, tmp_path, "--metric", "accuracy")
    means = {dataset: row["mean"] for (_, dataset, _), row in rows.items()}
    assert means["ImageNet → EuroSAT"] == 41.5 and means["Caltech101 → EuroSAT"] == 51.5
    assert means["ImageNet → DescribableTextures"] == 51.5 and means["Caltech101 → DescribableTextures"] == 61.5
    assert means["ImageNet → average of 2"] == 46.5 and means["Caltech101"] == 93.0
    assert {row["shots"] for row in rows.values()} == {"16"}


def test_a_source_that_only_the_folder_tells(tmp_path, capsys):
    evaluated(tmp_path / "a" / "seed1", config("CoOp", 1), 40.0, "/home/me/output/oxford_pets/CoOp/vit_b16_4shots/seed1")
    evaluated(tmp_path / "b" / "seed1", config("CoOp", 1), 60.0, "/home/me/output/eurosat/CoOp/vit_b16_4shots/seed1")
    write_log(tmp_path / "c" / "seed1", config("CoOp", 1, dataset="OxfordPets"), 93.0)  # another experiment
    rows = table(capsys, tmp_path, "--metric", "accuracy")
    assert rows["CoOp", "OxfordPets → EuroSAT", "test"]["mean"] == 40.0 and rows["CoOp", "EuroSAT", "test"]["mean"] == 60.0


def test_two_trainings_evaluated_on_one_data_set_are_two_rows(tmp_path, capsys):
    for name, accuracy in (("first", 40.0), ("second", 60.0)):
        for seed in (1, 2):
            evaluated(tmp_path / name / f"seed{seed}", config("CoOp", seed), accuracy, f"exp/{name}/seed{seed}")
    assert main(["parse", str(tmp_path), "--metric", "accuracy"]) == 0
    printed = capsys.readouterr()
    assert "40.00" in printed.out and "60.00" in printed.out and "--model-dir=exp/first" in printed.out
    assert "newest" not in printed.err


def test_base_and_new_evaluated_with_other_epochs_meet(tmp_path, capsys):
    """The config file of the evaluation says 50 epochs, that of the training said 200: nobody trains with the former."""
    base, new = config("CoOp", 1, "base"), config("CoOp", 1, "new")
    base.OPTIM.MAX_EPOCH, new.OPTIM.MAX_EPOCH, new.OPTIM.LR = 200, 50, 0.1
    write_log(tmp_path / "train" / "seed1", base, 90.0)
    evaluated(tmp_path / "new" / "seed1", new, 60.0, "train/seed1")
    rows = table(capsys, tmp_path, "--metric", "accuracy")
    assert rows["CoOp", "EuroSAT", "h"]["mean"] == pytest.approx(72)
    evaluated(tmp_path / "base" / "seed2", config("CoOp", 2, "base"), 90.0, "elsewhere/seed2")
    cfg = config("CoOp", 2, "new")
    cfg.OPTIM.MAX_EPOCH = 7
    evaluated(tmp_path / "new" / "seed2", cfg, 60.0, "elsewhere/seed2")
    assert table(capsys, tmp_path, "--metric", "accuracy")["CoOp", "EuroSAT", "h"]["count"] == 2


def test_trainings_that_differ_stay_apart_beside_an_evaluation(tmp_path, capsys):
    for name, epochs in (("short", 50), ("long", 200)):
        cfg = config("CoOp", 1, "base")
        cfg.OPTIM.MAX_EPOCH = epochs
        write_log(tmp_path / "exp" / name / "seed1", cfg, float(epochs) / 4)
    evaluated(tmp_path / "new" / "seed1", config("CoOp", 1, "new"), 60.0, "exp/long/seed1")
    assert main(["parse", str(tmp_path), "--format", "json", "--metric", "accuracy"]) == 0
    rows = {(row["settings"], row["part"]): row["mean"] for row in json.loads(capsys.readouterr().out)}
    assert rows["OPTIM.MAX_EPOCH=50", "base"] == 12.5 and rows["OPTIM.MAX_EPOCH=200", "h"] == pytest.approx(2 * 50 * 60 / 110)


def test_a_results_file_of_another_program(tmp_path, capsys):
    write_log(tmp_path / "seed1", config("CoOp", 1), 80.0)
    (tmp_path / "seed1" / "results.json").write_text('{"acc": 0.8}')
    assert table(capsys, tmp_path, "--metric", "accuracy")["CoOp", "EuroSAT", "test"]["mean"] == 80.0
    (tmp_path / "seed1" / "log.txt").unlink()
    assert main(["parse", str(tmp_path)]) == 2
    assert "is not a results file of promptmix" in capsys.readouterr().err


def test_keyword_of_coops_script(tmp_path, capsys):
    write_log(tmp_path / "seed1", config("CoOp", 1), 80.0)
    assert table(capsys, tmp_path, "--keyword", "error")["CoOp", "EuroSAT", "test"]["mean"] == 20.0
    assert table(capsys, tmp_path, "--keyword", "macro_f1")["CoOp", "EuroSAT", "test"]["mean"] == 79.0
    assert main(["parse", str(tmp_path), "--keyword", "error", "--metric", "accuracy"]) == 2
    assert "--keyword and --metric name the same thing" in capsys.readouterr().err
