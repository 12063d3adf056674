"""What the tests stand on: backbones that are copied instead of built, and a folder that leaves nothing behind."""

import os
import subprocess
import sys
import tempfile

import torch

from promptmix.clip import load_clip
from tests import tidy
from tests.backbones import Kept
from tests.trainers.toy import toy_cfg


def test_a_kept_backbone_is_the_loaded_one_and_nobody_elses(room):
    cfg, load = toy_cfg(room, "CoOp"), Kept(load_clip)
    found = []
    for get in (load_clip, load, load, load):
        torch.manual_seed(1)
        found.append((get(cfg), torch.get_rng_state()))
        with torch.no_grad():
            found[-1][0].logit_scale.add_(len(found))  # what one test does to it, the next doesn't see
    (first, state), *others = found
    for place, (other, after) in enumerate(others, start=1):
        assert torch.equal(after, state)
        assert other is not first
        values, wanted = other.state_dict(), first.state_dict()
        assert values.keys() == wanted.keys()
        assert all(torch.equal(values[key], wanted[key]) for key in wanted if key != "logit_scale")
        assert values["logit_scale"] == wanted["logit_scale"] + place
        assert torch.equal(other.hard_features(["a {}."], ["cat"]), first.hard_features(["a {}."], ["cat"]))
    torch.manual_seed(2)
    load(cfg)
    assert len(load._kept) == 2, "other random numbers give other random weights"


def test_folders_of_killed_tests_go_and_others_stay(tmp_path, monkeypatch):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    names = [f"{tidy.PREFIX}{gone.pid}-a", f"{tidy.PREFIX}{os.getpid()}-b", f"{tidy.PREFIX}old", "else"]
    for name in names:
        tmp_path.joinpath(name).mkdir()
    for name in ("TMPDIR", "PROMPTMIX_CACHE_DIR"):
        monkeypatch.setenv(name, os.environ[name])
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with tidy.own_folder() as own:
        assert tempfile.mkdtemp().startswith(own)
        assert sorted(path.name for path in tmp_path.iterdir() if str(path) != own) == sorted(names[1:])
    assert not os.path.exists(own)
