"""Checkpoints: round trips, strictness, no code on loading, nothing half-written."""

import json
import os
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

from promptmix.engine import (
    EpochSchedule,
    load_checkpoint,
    load_pretrained_weights,
    load_state_dict_strict,
    resume_from_checkpoint,
    save_checkpoint,
)
from promptmix.engine.checkpoint import export_model, read_export
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


# A file that was changed after it was written


def changed(path, change):
    """Read a checkpoint, change it and write it back as torch.save does, with checksums that are right."""
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, path)


def flip(checkpoint):
    """One bit of one weight."""
    checkpoint["state_dict"]["weight"].view(torch.int32)[0, 0] ^= 1


CHANGES = {
    "a bit of a weight": flip,
    "a weight more": lambda checkpoint: checkpoint["state_dict"].update(more=torch.ones(1)),
    "another epoch": lambda checkpoint: checkpoint.update(epoch=4),
    "integers": lambda checkpoint: checkpoint["state_dict"].update(weight=torch.zeros(2, 3, dtype=torch.int64)),
    "half precision": lambda checkpoint: checkpoint["state_dict"].update(weight=checkpoint["state_dict"]["weight"].half()),
    "another moment": lambda checkpoint: checkpoint["optimizer"]["state"][0]["momentum_buffer"].add_(1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_a_changed_checkpoint_is_refused(tmp_path, change):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    learn(model, optimizer)
    save_checkpoint(state(model, optimizer=optimizer.state_dict(), random=(1, [2, 3], torch.arange(3))), tmp_path)
    path = tmp_path / "model.pth.tar-3"
    changed(path, lambda checkpoint: None)
    assert load_checkpoint(path)["random"][:2] == (1, [2, 3])
    changed(path, change)
    with pytest.raises(CheckpointError, match=r"is not what was written .its digest differs"):
        load_checkpoint(path)
    changed(path, lambda checkpoint: checkpoint.pop("digest"))  # as a file of Dassl's
    load_checkpoint(path)


def test_equal_checkpoints_are_equal_files(tmp_path):
    model = nn.Linear(3, 2)
    for folder in ("one", "two"):
        save_checkpoint(state(model), tmp_path / folder)
    assert (tmp_path / "one/model.pth.tar-3").read_bytes() == (tmp_path / "two/model.pth.tar-3").read_bytes()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", [torch.float32, torch.float16])
def test_numbers_that_are_none_are_refused(tmp_path, bad, kind):
    model, broken = nn.Linear(3, 2), nn.Linear(3, 2).to(kind)
    before = model.weight.clone()
    with torch.no_grad():
        broken.weight[1, 2] = bad
    save_checkpoint(state(broken), tmp_path)
    with pytest.raises(CheckpointError, match=r"model.pth.tar-3 holds numbers that are NaN or infinite .weight"):
        resume_from_checkpoint(tmp_path, model)
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (dict(weight=torch.zeros(2, 3, dtype=torch.int64)), "weight is of type torch.int64 there and torch.float32 here"),
        (dict(weight=torch.zeros(2, 3, dtype=torch.bool)), "weight is of type torch.bool there"),
        (dict(weight=torch.zeros(2, 3, dtype=torch.complex64)), "weight is of type torch.complex64 there"),
        (dict(weight=[[1.0]]), "weight is a list there, not a tensor"),
    ],
)
def test_tensors_of_another_type_are_refused(values, words):
    model = nn.Linear(3, 2)
    with pytest.raises(CheckpointError, match=words):
        load_state_dict_strict(model, {**model.state_dict(), **values}, "file")
    load_state_dict_strict(model, {name: value.half() for name, value in model.state_dict().items()}, "file")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"state_dict": [1]}, "not a dict of named tensors"),
        ({"state_dict": {"weight": 1}}, "not a dict of named tensors"),
        ({"state_dict": {1: torch.ones(1)}}, "not a dict of named tensors"),
        ({"state_dict": {}, "epoch": "3"}, "not a number of epochs"),
        ({"state_dict": {}, "epoch": -1}, "not a number of epochs"),
        ({"state_dict": {}, "epoch": 1, "digest": 7}, "digest differs"),
    ],
)
def test_entries_of_another_form_are_refused(tmp_path, content, words):
    torch.save(content, tmp_path / "file")
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(tmp_path / "file")


def test_deep_and_recursive_checkpoints_end_in_one_line(tmp_path):
    circle: dict = {"state_dict": {}, "epoch": 1}
    circle["again"] = circle
    deep: list = []
    for _ in range(300):
        deep = [deep]
    for name, content, words in (("circle", circle, "holds itself"), ("deep", {"deep": deep}, "100 levels deep")):
        torch.save(content, tmp_path / name)
        with pytest.raises(CheckpointError, match=words):
            load_checkpoint(tmp_path / name)


def test_an_export_that_was_changed_is_refused(tmp_path):
    from safetensors.torch import save_file

    export_model({"a": torch.arange(4.0), "b": torch.ones(2)}, tmp_path, {"trainer": "CoOp", "epoch": 1})
    assert list(read_export(tmp_path)["state_dict"]) == ["a", "b"]
    save_file({"a": torch.arange(4.0).flip(0).contiguous(), "b": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model.safetensors is not what was written"):
        read_export(tmp_path)


@pytest.mark.parametrize("change", [{"schema_version": "x"}, {"schema_version": None}, {"trainer": []}, {"epoch": {}}])
def test_an_export_with_an_odd_note_is_refused(tmp_path, change):
    export_model({"a": torch.arange(4.0)}, tmp_path, {"trainer": "CoOp", "epoch": 1})
    note = json.loads((tmp_path / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps(note | change))
    with pytest.raises(CheckpointError, match="is not a note of an export"):
        read_export(tmp_path)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"optimizer": "x"}, "optimizer state in .* doesn't fit"),
        ({"optimizer": {}}, "optimizer state in .* doesn't fit"),
        ({"optimizer": {"param_groups": [{"params": [0, 1], "lr": "x"}], "state": {}}}, "lr is 'x' there"),
        ({"scheduler": "x"}, "scheduler state .* .keys none; 0"),
        ({"scheduler": {"last_epoch": -3, "last_lr": [0.1]}}, "scheduler state"),
        ({"val_result": "x"}, "'val_result' .* is 'x', not a number"),
        ({"trainer": [1]}, "'trainer' .* not a name"),
    ],
)
def test_states_of_another_form_are_refused_on_resume(tmp_path, entry, words):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    save_checkpoint(state(model, optimizer=optimizer.state_dict()) | entry, tmp_path)
    with pytest.raises(CheckpointError, match=words):
        resume_from_checkpoint(tmp_path, model, optimizer, EpochSchedule(optimizer, lambda epoch: 1.0))


def test_moments_of_another_shape_are_refused_and_a_schedule_goes_on_without_its_state(tmp_path):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    saved = optimizer.state_dict()
    save_checkpoint(state(model, optimizer=saved) | {"epoch": 3, "scheduler": None}, tmp_path)
    schedule = EpochSchedule(optimizer, lambda epoch: 0.5**epoch)
    resume_from_checkpoint(tmp_path, model, optimizer, schedule)
    assert schedule.get_last_lr() == [0.1 * 0.5**3]
    saved["state"][0]["momentum_buffer"] = torch.zeros(2)
    save_checkpoint(state(model, optimizer=saved), tmp_path)
    with pytest.raises(CheckpointError, match=r"momentum_buffer is \(2,\) there for a parameter of \(2, 3\)"):
        resume_from_checkpoint(tmp_path, model, optimizer, schedule)
