"""``--devices N``: what starts the processes and says how they ended."""

from __future__ import annotations

import os
import signal
import sys

import pytest

from promptmix.cli import main
from promptmix.commands import train
from promptmix.engine import SimpleTrainer
from promptmix.errors import ConfigError, TrainingError
from promptmix.parallel import launch
from promptmix.registry import TRAINER_REGISTRY

#: What a process does in place of a training: told by its rank.
SCRIPT = """
import os, signal, sys, time
def end(code, said=""):
    sys.stderr.write(said)
    sys.exit(code)
rank, place = int(os.environ["RANK"]), os.environ["LOCAL_RANK"] + "/" + os.environ["WORLD_SIZE"]
assert os.path.isdir(os.path.dirname(os.environ["PROMPTMIX_MEETING"]))
sys.stdout.write(place) if {quiet} else None
{what}
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Start two processes that run a few lines of python each."""
    (tmp_path / "promptmix").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "GRACE", 0.5)

    def run(what, quiet=False):
        (tmp_path / "promptmix" / "__main__.py").write_text(SCRIPT.format(what=what, quiet=quiet))
        return launch.start(2, ["train"])

    return run


def test_all_is_well_and_the_first_one_prints(start, capfd):
    assert start("", quiet=True) == 0
    assert capfd.readouterr() == ("0/2", "")


def test_a_user_error_is_said_once_with_its_code(start, capfd):
    assert start("end(2, 'promptmix: error: no such key')") == 2
    assert capfd.readouterr().err == "promptmix: error: no such key"


def test_what_one_of_the_others_meets_is_said(start, capfd):
    assert start("end(2 if rank else 75, 'a warning\\npromptmix: error: no picture 3.png' if rank else '')") == 2
    assert capfd.readouterr().err == "promptmix: error: no picture 3.png\n"


@pytest.mark.parametrize("first", ["end(75)", "time.sleep(60)"])
def test_a_killed_process_ends_the_training_in_one_line(start, capfd, first):
    with pytest.raises(TrainingError) as error:
        start(f"os.kill(os.getpid(), signal.SIGKILL) if rank else {first}")
    words = "process 2 of 2 was killed by signal 9 (out of memory?), and the others were ended; "
    assert str(error.value) == words + "the same command goes on from the last epoch"
    assert capfd.readouterr() == ("", "")


def test_a_process_that_hangs_is_named(start):
    with pytest.raises(TrainingError, match="process 2 of 2 did not answer"):
        start("time.sleep(60) if rank else end(75)")


def test_sigterm_is_passed_on(start):
    what = "signal.signal(signal.SIGTERM, lambda *_: end(143)); os.kill(os.getppid(), 15) if rank else 0; time.sleep(60)"
    assert start(what) == 143


def test_each_process_sees_its_own_gpu(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    for given, seen in ((None, "1"), ("3,5", "5"), ("", "")):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if given is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
        launch.take_device()
        assert os.environ["CUDA_VISIBLE_DEVICES"] == seen
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES names 1 GPUs"):
        launch.take_device()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        ({"MASTER_ADDR": "no such host"}, "MASTER_ADDR is no such host"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT is 99999, but must be from 1 to 65535"),
        ({"RANK": "2"}, "RANK is 2, but must be from 0 to 1"),
        ({"RANK": ""}, "RANK is not set"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK is x"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is two"),
    ],
)
def test_a_place_that_leads_nowhere_is_refused(monkeypatch, change, words):
    right = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in right.items():
        monkeypatch.setenv(name, value)
    launch.refuse_wrong_place()
    for name, value in change.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=words):
        launch.refuse_wrong_place()


def test_another_number_than_torchruns_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(launch, "place", lambda: (0, 2))
    assert main(["train", "--devices", "3"]) == 2
    assert "--devices 3 beside WORLD_SIZE 2" in capsys.readouterr().err


def test_one_device_starts_nothing_and_none_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(launch, "start", lambda count, argv: sys.exit(f"started {count}"))
    assert main(["train", "--devices", "0"]) == 2
    assert "--devices" in capsys.readouterr().err
    assert main(["train", "--devices", "1"]) == 2  # goes on to what else is missing
    assert "TRAINER.NAME" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("command", ["run few-shot --trainer CoOp --datasets EmojiFamilies", "fit pictures"])
def test_a_protocol_and_a_fit_start_the_same_processes(monkeypatch, command):
    started = []
    monkeypatch.setattr(launch, "start", lambda count, argv: started.append((count, argv)) or 7)
    words = [*command.split(), "--gpus", "3", "--device", "cpu"]
    assert main(words) == 7 and started == [(3, words)]


def test_rounds_are_not_divided(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(launch, "place", lambda: (0, 2))
    monkeypatch.setattr(launch, "take_device", lambda: None)
    words = ["--trainer", "CoOp", "--datasets", "EmojiFamilies", "--devices", "2", "--output-dir", str(tmp_path / "out")]
    assert main(["run", "active", *words]) == 2
    assert "active works in rounds" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_trainer_without_towers_is_refused(monkeypatch):
    monkeypatch.setitem(TRAINER_REGISTRY._entries, "Plain", SimpleTrainer)
    train.refuse_undivided("Plain")
    monkeypatch.setattr(launch, "place", lambda: (0, 2))
    with pytest.raises(ConfigError, match="TRAINER.NAME Plain is not a prompt trainer"):
        train.refuse_undivided("Plain")


@pytest.mark.parametrize("given", ["soon", "0", "nan", "inf"])
def test_a_timeout_is_a_number_of_seconds(monkeypatch, given):
    monkeypatch.setenv("PROMPTMIX_TIMEOUT", given)
    with pytest.raises(ConfigError, match="PROMPTMIX_TIMEOUT"):
        launch.patience()
