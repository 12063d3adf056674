"""Which checkpoint is meant, what nobody claims, and who works in a folder."""

import multiprocessing
import os
import re

import pytest
import torch

from promptmix.engine import save_checkpoint
from promptmix.engine.checkpoint import read_model
from promptmix.engine.run_folder import RunFolder
from promptmix.errors import CheckpointError, UserError


def write(folder, epoch, name=""):
    save_checkpoint({"state_dict": {"w": torch.full((1,), float(epoch))}, "epoch": epoch}, folder, model_name=name)


def chosen(path, epoch=None):
    return read_model(path / "head", epoch)[0]["state_dict"]["w"].item()


def test_the_best_then_the_last_then_the_only_one(tmp_path):
    write(tmp_path / "head", 2)
    assert chosen(tmp_path) == 2
    write(tmp_path / "head", 10)
    assert chosen(tmp_path) == 10  # the one written last, which is not the last by name
    assert chosen(tmp_path, epoch=2) == 2
    write(tmp_path / "head", 5, "model-best.pth.tar")
    assert chosen(tmp_path) == 5
    os.remove(tmp_path / "head" / "model-best.pth.tar")
    os.remove(tmp_path / "head" / "checkpoint")
    with pytest.raises(CheckpointError, match=r"holds model.pth.tar-10, model.pth.tar-2; say which with --load-epoch N"):
        chosen(tmp_path)
    os.remove(tmp_path / "head" / "model.pth.tar-10")
    assert chosen(tmp_path) == 2
    with pytest.raises(CheckpointError, match=r"no checkpoint .*tar-7; the folder holds model.pth.tar-2"):
        chosen(tmp_path, epoch=7)
    with pytest.raises(CheckpointError, match="no checkpoint .*there is no folder .*nowhere"):
        RunFolder(tmp_path).checkpoint("nowhere")


@pytest.mark.parametrize("text", ["", "../other/model.pth.tar-1", "/etc/passwd"])
def test_the_last_checkpoint_lies_in_its_own_folder(tmp_path, text):
    write(tmp_path / "head", 1)
    write(tmp_path / "other", 1)
    (tmp_path / "head" / "checkpoint").write_text(text)
    with pytest.raises(CheckpointError, match="must name a file in its own folder"):
        RunFolder(tmp_path).last("head")


def test_models_that_nobody_loads_are_refused_by_name(tmp_path):
    for name in ("prompt_learner", "image_norms"):
        write(tmp_path / name, 1)
    (tmp_path / "tensorboard").mkdir()
    folder = RunFolder(tmp_path)
    folder.refuse_unclaimed(["prompt_learner", "image_norms", "more"])
    with pytest.raises(CheckpointError, match="also holds learned tensors of image_norms, which this config has no model for"):
        folder.refuse_unclaimed(["prompt_learner"])


def hold(path, ready):
    with RunFolder(path).alone():
        ready.send(os.getpid())
        ready.recv()


@pytest.mark.skipif(os.name == "nt", reason="no such locks there")
def test_a_folder_is_held_by_one_process_and_by_none_that_died(tmp_path):
    path = tmp_path / "new" / "out"
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    child = context.Process(target=hold, args=(path, there))
    child.start()
    pid = here.recv()
    with pytest.raises(UserError, match=re.escape(f"{path} is in use by another process (pid {pid})")), RunFolder(path).alone():
        pass
    assert not path.exists()
    child.kill()
    child.join()
    with RunFolder(path).alone():
        forked = os.fork()
        if not forked:  # a worker that outlives us
            here.poll(20)
            os._exit(0)
    with RunFolder(path).alone():
        pass
    os.kill(forked, 9)
    os.waitpid(forked, 0)
    assert not list(path.parent.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="no such locks there")
def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / ".out.lock").symlink_to(victim)
    with (
        pytest.raises(UserError, match=r"\.out\.lock is a link; choose another --output-dir"),
        RunFolder(tmp_path / "out").alone(),
    ):
        pass
    assert victim.read_text() == "mine"


def test_what_a_killed_writer_left_goes_away(tmp_path):
    for folder in (tmp_path / ".progress.pth.abc.tmp", tmp_path / "head" / ".checkpoint.x.tmp"):
        folder.mkdir(parents=True)
        (folder / "half").write_text("")
    write(tmp_path / "head", 1)
    RunFolder(tmp_path).tidy()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["checkpoint", "head", "model.pth.tar-1"]


@pytest.mark.skipif(not os.path.exists("/proc/self"), reason="needs a file system that makes no files")
def test_where_no_file_can_be_made_is_said_at_once():
    with pytest.raises(UserError, match="OUTPUT_DIR /proc/promptmix-run"), RunFolder("/proc/promptmix-run").alone():
        pass


def test_a_link_to_itself_is_no_checkpoint(tmp_path):
    write(tmp_path / "head", 2)
    (tmp_path / "head" / "model.pth.tar-2").unlink()
    (tmp_path / "head" / "model.pth.tar-2").symlink_to("model.pth.tar-2")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        chosen(tmp_path)
