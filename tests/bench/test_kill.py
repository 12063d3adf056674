"""Runs killed at random moments end as the unbroken one, and a run that does not is found."""

import multiprocessing
import os
import signal
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch

from promptmix.bench import kill
from promptmix.engine.checkpoint import load_checkpoint, save_plain
from promptmix.utils import read_json, write_json
from tests import forked


@pytest.fixture
def from_here(monkeypatch):
    """Fork runs from this process, which has imported everything and leaves the data set few test pictures."""
    work = kill._work

    def begin(argv, threads, told):
        forked.forget_processes()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        work(argv, threads, told)

    monkeypatch.setattr(kill, "multiprocessing", SimpleNamespace(get_context=lambda _: multiprocessing.get_context("fork")))
    monkeypatch.setattr(kill.multiprocessing, "set_start_method", multiprocessing.set_start_method, raising=False)
    monkeypatch.setattr(kill, "_work", begin)


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize(("command", "method", "workers"), [("train", "IVLP", [0, 1]), ("run", "CoOp", [0])])
def test_killed_runs_end_as_the_unbroken_one(command, method, workers, tmp_path, from_here):
    args = Namespace(epochs=2, shots=1, threads=1, workers=workers, seed=os.getpid())
    trials = list(kill.trials(method, 1, tmp_path, args, command))
    assert sum(len(trial.kills) for trial in trials) == 1
    assert [trial for trial in trials if trial.wrong] == []
    broken = trials[0].place
    whole = next(one for one in sorted(tmp_path.glob("whole?")) if not kill.differences(one, broken))

    (tmp_path / "told.txt").write_text("begun\npromptmix: error: no room\n\n")
    assert kill._last_words(tmp_path / "told") == ": promptmix: error: no room"

    # What the comparison is worth.
    path = next(broken.rglob("prompt_learner/model.pth.tar-2"))
    checkpoint = load_checkpoint(path)
    next(iter(checkpoint["state_dict"].values())).view(-1)[0] += 1e-7
    save_plain(checkpoint, path)
    record = path.parent.parent / "results.json"
    result = read_json(record)
    result["metrics"]["test"]["accuracy"] += 1e-9
    write_json(result, record)
    (broken / "progress.pth").write_text("")
    (broken.parent / f".{broken.name}.lock").write_text("")
    found = kill.differences(whole, broken)
    assert [line.split(" ")[0].rpartition("/")[2] for line in found] == ["model.pth.tar-2", "results.json:", "left"]
    assert f"progress.pth, .{broken.name}.lock" in found[-1]
    assert not kill._same(torch.zeros(2), torch.zeros(2).double()) and not kill._same({"a": 1}, {"a": 1.0})
