"""Checkpoints: round trips, strictness, no code on loading, nothing half-written."""

import os
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

from promptmix.engine import (
    load_checkpoint,
    load_pretrained_weights,
    load_state_dict_strict,
    resume_from_checkpoint,
    save_checkpoint,
)
from promptmix.errors import CheckpointError


def state(model, epoch=3, **more):
    return {"state_dict": model.state_dict(), "epoch": epoch, **more}


def weights_equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def learn(model, optimizer):
    optimizer.zero_grad()
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()


def test_files_and_last_name(tmp_path, capsys):
    folder = tmp_path / "prompt_learner"
    save_checkpoint(state(nn.Linear(3, 2)), folder, is_best=True)
    save_checkpoint(state(nn.Linear(3, 2), epoch=5), str(folder))
    save_checkpoint(state(nn.Linear(3, 2), epoch=6), folder, model_name="model-best.pth.tar")
    names = sorted(entry.name for entry in folder.iterdir())
    assert names == ["checkpoint", "model-best.pth.tar", "model.pth.tar-3", "model.pth.tar-5"]
    assert (folder / "checkpoint").read_text() == "model-best.pth.tar\n"
    assert f"Checkpoint saved to {folder}/model.pth.tar-3" in capsys.readouterr().out


def test_round_trip_of_model_and_optimizer(tmp_path):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    learn(model, optimizer)
    save_checkpoint(state(model, optimizer=optimizer.state_dict(), scheduler=None, val_result=np.float64(7)), tmp_path)
    other = nn.Linear(3, 2)
    resumed = torch.optim.SGD(other.parameters(), lr=0.5, momentum=0.9)
    assert resume_from_checkpoint(tmp_path, other, resumed, None) == 3
    assert weights_equal(model, other)
    assert resumed.param_groups[0]["lr"] == 0.1
    learn(model, optimizer)
    learn(other, resumed)
    assert weights_equal(model, other)
    loaded = load_checkpoint(tmp_path / "model.pth.tar-3")
    assert type(loaded["val_result"]) is float


def test_module_prefix_is_dropped_and_state_left_alone(tmp_path):
    given = {"state_dict": {"module.weight": torch.ones(1), "bias": torch.zeros(1)}, "epoch": 1}
    save_checkpoint(given, tmp_path)
    assert list(load_checkpoint(tmp_path / "model.pth.tar-1")["state_dict"]) == ["weight", "bias"]
    assert "module.weight" in given["state_dict"]


def test_torch_schedules_can_be_stored(tmp_path):
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4])
    save_checkpoint(state(nn.Linear(1, 1), scheduler=schedule.state_dict()), tmp_path)
    assert load_checkpoint(tmp_path / "model.pth.tar-3")["scheduler"]["milestones"] == Counter({2: 1, 4: 1})


def test_objects_are_not_stored(tmp_path):
    with pytest.raises(CheckpointError, match=r"checkpoint.scheduler\[0\] is a Linear.*without pickling"):
        save_checkpoint(state(nn.Linear(1, 1), scheduler=[nn.Linear(1, 1)]), tmp_path)
    assert list(tmp_path.iterdir()) == []


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


@pytest.mark.parametrize("write", [torch.save, lambda obj, path: path.write_bytes(pickle.dumps(obj, protocol=2))])
def test_pickles_with_code_are_refused_and_not_run(tmp_path, monkeypatch, write):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.pth.tar-1"
    write({"state_dict": {}, "epoch": 1, "scheduler": Bomb()}, path)
    with pytest.raises(CheckpointError, match="can't read .*model.pth.tar-1") as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("content", [b"", b"hello there", b"PK\x03\x04 cut off"])
def test_other_files_are_refused_in_one_line(tmp_path, content):
    path = tmp_path / "model.pth.tar-1"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="model.pth.tar-1") as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value)


def test_damaged_checkpoint_is_refused(tmp_path):
    save_checkpoint(state(nn.Linear(30, 20)), tmp_path)
    path = tmp_path / "model.pth.tar-3"
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(CheckpointError, match="damaged or no checkpoint"):
        load_checkpoint(path)


def test_tensor_alone_is_no_checkpoint(tmp_path):
    torch.save(torch.ones(2), tmp_path / "cmat.pt")
    with pytest.raises(CheckpointError, match="holds a Tensor, not a dict"):
        load_checkpoint(tmp_path / "cmat.pt")


def test_missing_checkpoint_says_what_is_there(tmp_path):
    save_checkpoint(state(nn.Linear(1, 1)), tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint .*tar-9; the folder holds checkpoint, model.pth.tar-3"):
        load_checkpoint(tmp_path / "model.pth.tar-9")
    with pytest.raises(CheckpointError, match="there is no folder"):
        load_checkpoint(tmp_path / "nowhere" / "model.pth.tar-9")


@pytest.mark.parametrize("name", ["../model.pth.tar-3", "/model.pth.tar-3", "", "sub/model.pth.tar-3", "."])
def test_last_name_must_stay_in_the_folder(tmp_path, name):
    folder = tmp_path / "run"
    save_checkpoint(state(nn.Linear(1, 1)), tmp_path)
    save_checkpoint(state(nn.Linear(1, 1)), folder)
    save_checkpoint(state(nn.Linear(1, 1)), folder / "sub")
    (folder / "checkpoint").write_text(name.replace("/model", f"{tmp_path}/model") if name[:1] == "/" else name)
    with pytest.raises(CheckpointError, match="own folder"):
        resume_from_checkpoint(folder, nn.Linear(1, 1))


def test_resume_without_note_or_keys(tmp_path):
    with pytest.raises(CheckpointError, match="names the last checkpoint"):
        resume_from_checkpoint(tmp_path, nn.Linear(1, 1))
    torch.save({"weight": torch.ones(1)}, tmp_path / "model.pth.tar-1")
    (tmp_path / "checkpoint").write_text("model.pth.tar-1\n")
    with pytest.raises(CheckpointError, match="no 'state_dict' .keys: weight"):
        resume_from_checkpoint(tmp_path, nn.Linear(1, 1))


def test_strict_loading_names_what_differs():
    model = nn.Linear(3, 2)
    before = model.weight.clone()
    ctx = {"ctx": torch.ones(4), "weight": torch.zeros(2, 4)}
    with pytest.raises(CheckpointError) as error:
        load_state_dict_strict(model, ctx, "run/model.pth.tar-1 (written by CoOp)")
    for part in ("written by CoOp", "lacks bias", "has unknown ctx", "weight is (2, 4) there and (2, 3) here", "method"):
        assert part in str(error.value)
    assert torch.equal(model.weight, before)


def test_optimizer_of_another_shape_is_refused(tmp_path):
    model = nn.Linear(3, 2)
    one = torch.optim.SGD([model.weight], lr=0.1)
    save_checkpoint(state(model, optimizer=one.state_dict()), tmp_path)
    with pytest.raises(CheckpointError, match="optimizer state"):
        resume_from_checkpoint(tmp_path, model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_pretrained_weights_take_what_fits(tmp_path, capsys):
    save_checkpoint({"state_dict": {"weight": torch.ones(2, 3), "bias": torch.ones(5)}, "epoch": 1}, tmp_path)
    model = nn.Linear(3, 2)
    load_pretrained_weights(model, tmp_path / "model.pth.tar-1")
    assert torch.equal(model.weight, torch.ones(2, 3))
    out = capsys.readouterr().out
    assert "Successfully loaded pretrained weights" in out
    assert "Layers discarded due to unmatched keys or size: ['bias']" in out
    with pytest.raises(CheckpointError, match="nothing in .* fits Linear"):
        load_pretrained_weights(nn.Linear(7, 7), tmp_path / "model.pth.tar-1")


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    save_checkpoint(state(nn.Linear(1, 1)), tmp_path)
    old = (tmp_path / "model.pth.tar-3").read_bytes()

    def fail(payload, path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(state(nn.Linear(1, 1)), tmp_path)
    assert (tmp_path / "model.pth.tar-3").read_bytes() == old
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["checkpoint", "model.pth.tar-3"]
