"""The command line: CoOp's flags, one line for each user error, and nothing half-written."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from promptmix.cli import Parser, main
from promptmix.commands import COMMANDS, train
from promptmix.config.flags import resolve_config
from promptmix.engine import load_checkpoint
from promptmix.errors import ConfigError, UserError
from promptmix.runs import results
from tests.dots import PLUGIN, fails
from tests.forked import Forked

ROOT = Path(__file__).resolve().parents[1]


def swap(command, flag, value):
    command = list(command)
    command[command.index(flag) + 1] = value
    return command


def test_a_run_leaves_log_result_and_checkpoint(dots, tmp_path, capsys):
    assert main(dots) == 0
    out = tmp_path / "out"
    shown = capsys.readouterr().out
    log = (out / "log.txt").read_text()
    for text in (shown, log):
        for line in ("** Arguments **", "** Config **", "** System info **", "=> result", "* accuracy: ", "Elapsed: "):
            assert line in text
    assert (out / "head" / "model.pth.tar-2").is_file()
    run = results.load(out / "results.json")
    assert (run.trainer, run.dataset, run.seed, run.subsample_classes) == ("Linear", "Dots", 1, "all")
    assert run.learned_parameters == 3 * 8 * 8 * 4 + 4
    assert 0 <= run.metrics["test"]["accuracy"] <= 100
    assert run.config["OPTIM"]["MAX_EPOCH"] == 2
    assert run.config_sources["SEED"] == "--seed"
    assert run.config_sources["OPTIM.LR"].endswith("dots.yaml")
    assert {"python", "torch", "torchvision", "open_clip_torch", "promptmix"} <= run.versions.keys()
    assert run.seconds["total"] >= run.seconds["train"] > 0
    assert run.seconds["test"] > 0
    assert run.peak_memory_mb["rss"] > 1
    assert run.command[:2] == ["promptmix", "train"]
    assert run.started <= run.finished
    assert sys.stdout.__class__.__name__ != "Logger"


@pytest.mark.parametrize("quiet", [False, True])
def test_the_console_shows_what_matters_and_the_log_has_it_all(tmp_path, capsys, quiet):
    argv = ["train", "--trainer", "CoOp", "--config-file", "configs/quickstart.yaml", "--output-dir", str(tmp_path / "out")]
    assert main([*argv, *["--quiet"] * quiet, "OPTIM.MAX_EPOCH", "1", "DATASET.NUM_SHOTS", "1"]) == 0
    shown, log = capsys.readouterr(), (tmp_path / "out" / "log.txt").read_text()
    for line in ("** Arguments **", "** Config **", "  MAX_EPOCH: 1\n", "** System info **", "* accuracy: "):
        assert line in log
    assert "** Config **" not in shown.out
    assert shown.err == ""
    run = results.load(tmp_path / "out" / "results.json")
    assert (run.league, run.step_gflops > 1) == ("labelled pictures", True)
    if quiet:
        assert shown.out == ""
    else:
        assert f"CoOp on tiny-en, EmojiFamilies, 1-shot, seed -1; all settings: {tmp_path}" in shown.out
        assert "* accuracy: " in shown.out


def test_a_folder_may_be_called_as_a_log(dots, tmp_path):
    assert main([*dots, "--output-dir", str(tmp_path / "run.txt")]) == 0
    assert (tmp_path / "run.txt" / "log.txt").is_file()


def test_the_log_alone_gives_the_same_row(dots, tmp_path):
    assert main(dots) == 0
    run = results.load(tmp_path / "out" / "results.json")
    back = results.from_log(tmp_path / "out" / "log.txt")
    assert back.identity() == run.identity()
    assert back.settings() == run.settings()
    assert back.metrics["test"]["accuracy"] == pytest.approx(run.metrics["test"]["accuracy"], abs=0.06)


def test_evaluation_of_a_checkpoint_gives_the_numbers_of_its_run(dots, tmp_path):
    assert main(dots) == 0
    trained = results.load(tmp_path / "out" / "results.json")
    again = swap(dots, "--output-dir", str(tmp_path / "again"))
    assert main([*again, "--eval-only", "--model-dir", str(tmp_path / "out"), "--load-epoch", "2"]) == 0
    tested = results.load(tmp_path / "again" / "results.json")
    assert tested.metrics == trained.metrics
    assert tested.checkpoint == {"directory": str(tmp_path / "out"), "epoch": 2}
    assert tested.seconds["train"] == 0
    assert not (tmp_path / "again" / "head").exists()


def test_same_seed_same_numbers_and_weights(dots, tmp_path):
    states = []
    for name in ("a", "b"):
        assert main(swap(dots, "--output-dir", str(tmp_path / name))) == 0
        states.append(torch.load(tmp_path / name / "head" / "model.pth.tar-2", weights_only=True)["state_dict"])
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_no_train_builds_and_leaves_nothing(dots, tmp_path):
    assert main([*dots, "--no-train"]) == 0
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("epochs", ["1", "3"])
def test_other_epochs_in_a_folder_that_has_run_are_refused(dots, tmp_path, capsys, epochs):
    """Fewer would report weights of more epochs; more would go on with a schedule that never was."""
    assert main(dots) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    fails(capsys, [*dots, "OPTIM.MAX_EPOCH", epochs], f"OPTIM.MAX_EPOCH is 2 there, {epochs} here")
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}


def test_a_finished_run_is_tested_again_with_the_same_numbers(dots, tmp_path, capsys):
    assert main(dots) == 0
    first = results.load(tmp_path / "out" / "results.json")
    assert main(dots) == 0
    assert "will resume training" in capsys.readouterr().out
    assert results.load(tmp_path / "out" / "results.json").metrics == first.metrics


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["OPTIM.LRR", "0.1"], ["OPTIM.LRR", "did you mean 'LR'"]),
        (["OPTIM.LR", "fast"], ["OPTIM.LR", "'fast'", "float"]),
        (["OPTIM.LR"], ["OPTIM.LR", "has no value"]),
        (["OPTIM.LR=0.1"], ["'OPTIM.LR=0.1'", "without =", "write OPTIM.LR 0.1"]),
        (["OPTIM.LR", "=", "0.1"], ["'='", "without ="]),
        (["SEED", "one"], ["SEED"]),
        (["DATASET.SUBSAMPLE_CLASSES", "old"], ["'old'", "'base'", "'new'"]),
        (["--eval-only", "--model-dir", "nowhere", "--load-epoch", "2"], ["nowhere"]),
        (["--plugin", "no_such_module_here"], ["no_such_module_here"]),
        (["--plugin", "./missing.py"], ["missing.py"]),
        (["--sed", "1"], ["--sed", "did you mean '--seed'"]),
        (["--load-epoch", "last"], ["--load-epoch", "last"]),
        (["--resume", "nowhere"], ["nowhere"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_user_errors_are_one_line_and_leave_nothing(dots, tmp_path, capsys, extra, words):
    fails(capsys, [*dots, *extra], *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("--trainer", "", ["--trainer is empty", "leave it out"]),
        ("--trainer", "Lineer", ["Lineer", "did you mean 'Linear'", "CoOp"]),
        ("--root", "no/such/folder", ["no/such/folder", "--root"]),
        ("--root", ".", ["no folder", "dots", "--root"]),
        ("--config-file", "configs/quikstart.yaml", ["quikstart", "no such file"]),
    ],
)
def test_wrong_values_are_one_line_and_leave_nothing(dots, tmp_path, capsys, monkeypatch, flag, value, words):
    monkeypatch.chdir(tmp_path)
    fails(capsys, swap(dots, flag, value), *words)
    assert not (tmp_path / "out").exists()


def test_weights_that_cannot_be_downloaded(dots, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("open_clip.create_model", unreachable)
    command = [*swap(dots, "--trainer", "CoOp"), "--backbone", "ViT-B/16", "INPUT.SIZE", "(224, 224)"]
    fails(capsys, command, "MODEL.BACKBONE.WEIGHTS", "tiny-en")
    assert not (tmp_path / "out").exists()


def unreachable(*args, **keys):
    raise OSError("network is unreachable")


def test_checkpoint_of_another_method(dots, tmp_path, capsys):
    assert main(dots) == 0
    other = swap(swap(dots, "--trainer", "OtherLinear"), "--output-dir", str(tmp_path / "other"))
    evaluate = [*other, "--eval-only", "--model-dir", str(tmp_path / "out"), "--load-epoch", "2"]
    capsys.readouterr()
    fails(capsys, evaluate, "Linear", "OtherLinear", "--model-dir")
    (tmp_path / "out" / "results.json").unlink()  # then the tensors themselves must tell
    fails(capsys, evaluate, "model.pth.tar-2")
    resume = [*other, "--resume", str(tmp_path / "out")]
    fails(capsys, resume, "--resume", "holds another run (trainer is Linear there, OtherLinear here)")
    (tmp_path / "out" / "run_config.yaml").unlink()
    fails(capsys, resume, "model.pth.tar-2")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("key", "value"), [("OPTIM.LR", "0.5"), ("OPTIM.MAX_EPOCH", "3"), ("DATASET.NUM_SHOTS", "1"), ("SEED", "2")]
)
def test_resume_with_other_settings_is_refused(dots, tmp_path, capsys, key, value):
    assert main(dots) == 0
    other = [*swap(dots, "--output-dir", str(tmp_path / "other")), "--resume", str(tmp_path / "out")]
    fails(capsys, [*other, key, value], "--resume", "holds another run", "resume with the same settings")
    assert not (tmp_path / "other").exists()


def test_a_resume_from_unknown_settings_is_told_in_the_results(dots, tmp_path):
    assert main(dots) == 0
    for name in ("results.json", "run_config.yaml"):
        (tmp_path / "out" / name).unlink()
    other = [*swap(dots, "--output-dir", str(tmp_path / "other")), "--resume", str(tmp_path / "out")]
    assert main([*other, "OPTIM.MAX_EPOCH", "3"]) == 0
    (told,) = results.load(tmp_path / "other" / "results.json").approximations
    assert "whose settings are not known" in told


@pytest.mark.parametrize("extra", [["--trainer", "OtherLinear"], ["--seed", "2"], ["OPTIM.LR", "0.5"]])
def test_folder_of_another_run_is_refused(dots, tmp_path, capsys, extra):
    assert main(dots) == 0
    before = (tmp_path / "out" / "results.json").read_text()
    capsys.readouterr()
    fails(capsys, [*dots, *extra], "another run", "--output-dir")
    assert (tmp_path / "out" / "results.json").read_text() == before


def test_output_folder_that_is_a_file(dots, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    fails(capsys, swap(dots, "--output-dir", str(tmp_path / "file" / "out")), "OUTPUT_DIR")
    assert (tmp_path / "file").read_text() == "mine"


def test_debug_shows_the_traceback(dots):
    with pytest.raises(UserError):
        main([*dots, "--debug", "OPTIM.LRR", "0.1"])


def test_interrupt_is_one_line_and_says_how_to_go_on(dots, capsys, monkeypatch):
    def interrupt(*args, **keys):
        raise KeyboardInterrupt

    monkeypatch.setattr("promptmix.runs.run.build_trainer", interrupt)
    assert main(dots) == 130
    error = capsys.readouterr().err
    assert "interrupted" in error and "goes on from the last checkpoint" in error


@pytest.fixture
def endless(dots, tmp_path):
    """Return a function that starts a training of more epochs than anybody waits for, and waits until one is done."""
    running = []

    def start(*opts, wait=True):
        process = Forked([*dots, "OPTIM.MAX_EPOCH", "100000", *opts])
        running.append(process)
        progress, end = tmp_path / "out" / "progress.pth", time.monotonic() + 60
        before = progress.stat().st_mtime_ns if progress.exists() else 0
        while wait and process.poll() is None and not (progress.exists() and progress.stat().st_mtime_ns > before):
            assert time.monotonic() < end
            time.sleep(0.01)
        return process

    yield start
    for process in running:
        process.kill()
        process.communicate()


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize(("number", "group"), [(signal.SIGHUP, False), (signal.SIGTERM, True), (signal.SIGINT, False)])
def test_signals_end_a_run_with_one_line_and_the_next_goes_on(endless, dots, tmp_path, capsys, number, group):
    process = endless("DATALOADER.NUM_WORKERS", "2" if group else "0")
    fails(capsys, [*dots, "OPTIM.MAX_EPOCH", "100000"], f"in use by another process (pid {process.pid})", "--output-dir")
    (os.killpg if group else os.kill)(process.pid, number)
    error = process.communicate(timeout=30)[1]
    assert process.returncode == 128 + number
    lines = [line for line in error.splitlines() if "RuntimeWarning" not in line]
    assert len(lines) == 1 and "interrupted; the same command goes on" in lines[0]
    assert load_checkpoint(tmp_path / "out" / "progress.pth")["epoch"] > 0
    assert not list(tmp_path.glob(".out*")) and not list((tmp_path / "out").rglob(".*"))


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_killed_run_holds_no_folder_though_its_workers_live_on(endless, tmp_path):
    process = endless("DATALOADER.NUM_WORKERS", "2")
    process.kill()
    process.wait()
    done = load_checkpoint(tmp_path / "out" / "progress.pth")["epoch"]
    again = endless("DATALOADER.NUM_WORKERS", "2")
    assert again.poll() is None
    assert load_checkpoint(tmp_path / "out" / "progress.pth")["epoch"] > done


def test_flags_with_many_values_stop_at_the_overrides():
    parser = Parser()
    train.add_arguments(parser)
    words = ["--source-domains", "art", "photo", "--output-dir", "OUT.DIR", "OPTIM.LR", "-1", "INPUT.SIZE", "(8, 8)"]
    flags, opts = train.split_arguments(parser, words)
    assert parser.parse_args(flags).source_domains == ["art", "photo"]
    assert opts == ["OPTIM.LR", "-1", "INPUT.SIZE", "(8, 8)"]


def test_every_flag_of_coop_is_there():
    parser = Parser()
    train.add_arguments(parser)
    flags = (
        "--root --output-dir --resume --seed --source-domains --target-domains --transforms --config-file "
        "--dataset-config-file --trainer --backbone --head --eval-only --model-dir --load-epoch --no-train"
    )
    assert set(flags.split()) <= set(parser.flags())


def test_overrides_win_over_flags_and_flags_over_files(dots, tmp_path):
    data = tmp_path / "data.yaml"
    data.write_text("DATASET:\n  NAME: Dots\nOPTIM:\n  LR: 0.5\n  MOMENTUM: 0.1\nSEED: 7\n")
    assert main([*dots, "--dataset-config-file", str(data), "OPTIM.MAX_EPOCH", "1", "SEED", "3"]) == 0
    config = results.load(tmp_path / "out" / "results.json").config
    assert config["OPTIM"]["LR"] == 0.01  # method file over data set file
    assert config["OPTIM"]["MOMENTUM"] == 0.1
    assert config["OPTIM"]["MAX_EPOCH"] == 1
    assert config["SEED"] == 3


def test_parse_prints_the_table(dots, tmp_path, capsys):
    for seed in ("1", "2"):
        folder = str(tmp_path / "runs" / seed)
        assert main(swap(swap(dots, "--seed", seed), "--output-dir", folder)) == 0
    capsys.readouterr()
    assert main(["parse", str(tmp_path / "runs"), "--format", "json"]) == 0
    lines = json.loads(capsys.readouterr().out)
    assert lines[0]["method"] == "Linear" and lines[0]["count"] == 2
    assert main(["parse", str(tmp_path / "runs")]) == 0
    assert capsys.readouterr().out.startswith("| Method")
    (tmp_path / "empty").mkdir()
    fails(capsys, ["parse", str(tmp_path / "empty")], "no results.json")


def test_list_shows_entries_with_their_origin(capsys):
    assert main(["list", "trainers", "--plugin", PLUGIN]) == 0
    shown = capsys.readouterr().out
    assert "CoOp" in shown and "promptmix.trainers.coop" in shown and "Linear" in shown
    assert main(["list", "hooks"]) == 0
    assert "extend_config" in capsys.readouterr().out
    assert main(["list", "plugins", "--plugin", PLUGIN]) == 0
    assert "dots_plugin" in capsys.readouterr().out
    assert main(["train", "--list"]) == 0
    assert "MoCoOp" in capsys.readouterr().out
    fails(capsys, ["list", "trainer"], "did you mean 'trainers'")


def test_list_says_which_way_every_backbone_runs(capsys):
    assert main(["list", "backbones", "--all"]) == 0
    rows = [re.split(r"\s{2,}", row.strip()) for row in capsys.readouterr().out.splitlines()]
    assert ["ViT-B/16", "prefix shared", "yes"] in rows and ["tiny-en", "prefix shared", "no"] in rows
    assert ["ViT-B-16-SigLIP", "full length", "yes", "promptmix[hf]"] in rows and len(rows) > 150
    fails(capsys, ["list", "trainers", "--all"], "give `list backbones --all`")


def test_shipped_configs_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_config("configs/quickstart.yaml").is_file()
    assert resolve_config("quickstart.yaml") == resolve_config("configs/quickstart.yaml")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quickstart.yaml").write_text("SEED: 1\n")
    assert resolve_config("configs/quickstart.yaml").samefile(tmp_path / "configs" / "quickstart.yaml")
    with pytest.raises(ConfigError, match="did you mean 'configs/quickstart.yaml'"):
        resolve_config("configs/quickstrat.yaml")


def test_help_needs_no_torch():
    code = (
        "import sys; from promptmix.cli import main, COMMANDS;"
        "assert main(['--help']) == 0; assert all(main([name, '--help']) == 0 for name in COMMANDS);"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in COMMANDS)


@pytest.mark.parametrize(("argv", "code"), [([], 2), (["--help"], 0), (["--version"], 0), (["train", "--help"], 0)])
def test_exit_codes_of_help(argv, code, capsys):
    assert main(argv) == code
    assert "promptmix" in capsys.readouterr().out


def test_unknown_command_suggests(capsys):
    fails(capsys, ["trian"], "did you mean 'train'")


def test_doors_work_without_installation(tmp_path):
    for door in ("train", "parse_results"):
        command = [sys.executable, "-I", str(ROOT / "tools" / f"{door}.py"), "--help"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "usage: promptmix" in done.stdout


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "TRAINER.PREC"),
        ("OPTIM", "single_step"),
        ("optim.lr", "0 or more"),
        ("DEVICE", "'auto', 'cpu', 'cuda'"),
        ("TopK", "TOPK"),
    ],
)
def test_list_keys(name, words, capsys):
    assert main(["list", "keys", *filter(None, [name])]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("Key ")
    assert words in shown


def test_list_keys_of_nothing(capsys):
    fails(capsys, ["list", "keys", "OPTIMM"], "did you mean 'OPTIM'")
    fails(capsys, ["list", "trainers", "CoOp"], "list keys CoOp")


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_knows_every_command_and_flag(capsys, shell):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(name in script for name in COMMANDS)
    assert "dataset-config-file" in script


def test_bash_completes_a_flag(tmp_path):
    script = subprocess.run([sys.executable, "-m", "promptmix.cli", "completion", "bash"], capture_output=True, text=True).stdout
    ask = script + "\nCOMP_WORDS=(promptmix train --dataset-c) COMP_CWORD=2; _shtab_promptmix; echo ${COMPREPLY[@]}"
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True)
    assert "--dataset-config-file" in done.stdout
