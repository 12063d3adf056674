"""The suite for GPUs, on a CPU against itself."""

from __future__ import annotations

import re
import signal
import sys
import time
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from zipfile import ZipFile

import pytest
import torch

from promptmix.bench import gpu
from tests.trainers.toy import shallow
from tools import bench

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def args(monkeypatch):
    """Little work: towers have two layers, and graphs are captured and differentiated, but not handed to a C++ compiler."""
    compile_, world = torch.compile, gpu.World
    monkeypatch.setattr(torch, "compile", lambda f, mode=None, **options: compile_(f, **(options | {"backend": "aot_eager"})))
    monkeypatch.setattr(gpu, "World", lambda *of: shallow(world(*of)))
    monkeypatch.setattr(gpu, "SECONDS", 0.05)
    sizes = {"backbone": "tiny-vit", "device": "cpu", "minutes": 5.0, "gpu_methods": ["CoOp"], "gpu_classes": [3]}
    return Namespace(**sizes, no_others=True, pictures=10, workers=[])


def test_a_cpu_agrees_with_itself_and_is_no_gpu(args, tmp_path):
    result = gpu.run(args, tmp_path)
    asked = {check.name: check.passed for check in result.checks}
    assert asked == {
        "CoOp: fp32 against the CPU's fp32": True,
        "CoOp: bf16 against the CPU's fp32": True,
        "CoOp: fp16 against the CPU's fp32": None,
        "CoOp: flex against the CPU's fp32, without gradients": True,
        "CoOp: compiled against the CPU's fp32": True,
        "CoOp: two trainings of two steps agree to the bit (TRAIN.DETERMINISTIC)": True,
        "CoOp: no step waits for the device": None,
    }
    assert [timing.way for timing in result.timings] == ["ours", "plain"]
    assert all(timing.milliseconds > 0 and timing.launches > 100 and timing.peak_mb is None for timing in result.timings)
    assert result.pictures_per_second["0 workers"] > 0
    assert "nothing here is a GPU's number" in gpu.shown(result) and "0 of 7 checks failed" in gpu.shown(result)


def test_wrong_numbers_fail_and_what_is_left_out_is_named(args, tmp_path, monkeypatch):
    numbers, given = gpu.numbers, []

    def wrong(trainer, batch, *_, **__):
        given.append(trainer)
        found = numbers(trainer, batch)
        return [part + 0.1 * len(given) for part in found]

    monkeypatch.setattr(gpu, "numbers", wrong)
    monkeypatch.setattr(gpu, "TOLERANCES", {"fp32": 1e-3})
    plan = list(gpu._plan(*(gpu.World("tiny-vit", tmp_path, "cpu") for _ in range(2)), args))
    assert plan[0][0][1]().passed is False
    args.minutes = -1.0
    late = gpu.run(args, tmp_path)
    assert late.not_reached == [what for part in plan for what, _ in part] and not late.checks


def test_a_part_that_never_ends_takes_its_share_alone(args, tmp_path, monkeypatch):
    def forever():
        try:
            while True:
                time.sleep(0.01)
        except Exception:
            return gpu.Check("caught", False, "")

    def soon():
        return gpu.Check("soon", True, "")

    monkeypatch.setattr(gpu, "World", lambda *_: SimpleNamespace(device=torch.device("cpu")))
    parts = [[("long", forever), ("late", soon)], [("next", soon)]]
    monkeypatch.setattr(gpu, "_plan", lambda *_: parts)
    args.minutes = 0.4 / 60
    handler = signal.getsignal(signal.SIGALRM)
    result = gpu.run(args, tmp_path)
    assert result.not_reached == ["long (cut off after 0 s)", "late"] and [check.name for check in result.checks] == ["soon"]
    assert signal.getsignal(signal.SIGALRM) is handler


def test_the_imagenet_step_is_timed_on_pictures_and_on_kept_features(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "_IMAGENET_BATCH", 2)
    here = gpu.World("tiny-vit", tmp_path, "cpu")
    seen, kept = (gpu._time_imagenet(here, "bf16", "ours", kept=kept, classes=3) for kept in (False, True))
    assert seen.work == "CoOp, batch 2, 3 classes, bf16" and kept.work == f"{seen.work}, kept image features"
    assert 0 < kept.launches < seen.launches and kept.milliseconds > 0


def test_what_learns_nothing_by_steps_is_no_failure(tmp_path):
    here = gpu.World("tiny-vit", tmp_path, "cpu")
    assert gpu._two_steps(here, "ZeroshotCLIP") == gpu.Check("ZeroshotCLIP: two steps", None, "learns nothing by steps")


def test_what_would_not_fit_is_not_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.memory, "available_mb", lambda: 0.01)
    here = gpu.World("tiny-vit", tmp_path, "cpu")
    few, many = (gpu._time(here, "CoOp", classes, "plain") for classes in (3, 30))
    assert few.milliseconds is None and few.error.endswith("MiB of memory, and 0 are free")
    assert 0 < float(few.error.split()[1]) < float(many.error.split()[1])


def test_numbers_that_are_not_finite_are_far_off():
    assert gpu.distance(torch.ones(2), torch.tensor([1.0, float("nan")])) == float("inf")
    assert gpu.distance(torch.ones(0), torch.ones(0)) == 0


def test_a_bare_checkout_names_all_packages_it_needs():
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("dependencies = [")[2].partition("]")[0]
    assert {*re.findall(r'"([a-z_]+)>=', declared)} == {*bench.NEEDS.values()} - {"ftfy", "regex", "wcwidth"}


def test_a_bare_checkout_takes_what_is_lacking_from_wheels(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(bench, "NEEDS", {"made_up_package": "made-up"})
    assert bench.main(["--help"], tmp_path) == 2
    assert f"-d wheels made-up`, then carry the folder wheels/ into {tmp_path}" in capsys.readouterr().out
    (tmp_path / "wheels").mkdir()
    wheel = tmp_path / "wheels" / "made_up-1.0-py3-none-any.whl"
    with ZipFile(wheel, "w") as archive:
        archive.writestr("made_up_package.py", "")
    assert bench.main(["--help"], tmp_path) == 0 and "usage: promptmix bench" in capsys.readouterr().out
    wheel.write_bytes(b"no archive")
    assert bench.main([], tmp_path) == 2 and f"{wheel} cannot be unpacked" in capsys.readouterr().out
