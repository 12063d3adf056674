"""The suite for GPUs, on a CPU against itself."""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from promptmix.bench import gpu
from tools import bench

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def args(monkeypatch):
    """A minute's work: graphs are captured and differentiated, but not handed to a C++ compiler."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, mode=None, **options: compile_(f, backend="aot_eager", **options))
    sizes = {"backbone": "tiny-vit", "device": "cpu", "minutes": 5.0, "gpu_methods": ["CoOp"], "gpu_classes": [3]}
    return Namespace(**sizes, no_others=True, pictures=10, workers=[])


def test_a_cpu_agrees_with_itself_and_is_no_gpu(args, tmp_path):
    result = gpu.run(args, tmp_path)
    asked = {check.name: check.passed for check in result.checks}
    assert asked == {
        "CoOp: fp32 against the CPU's fp32": True,
        "CoOp: bf16 against the CPU's fp32": True,
        "CoOp: fp16 against the CPU's fp32": None,
        "CoOp: compiled against the CPU's fp32": True,
        "CoOp: two trainings of two steps agree to the bit": True,
        "CoOp: no step waits for the device": None,
    }
    assert [timing.way for timing in result.timings] == ["plain", "ours"]
    assert all(timing.milliseconds > 0 and timing.launches > 100 and timing.peak_mb is None for timing in result.timings)
    assert result.pictures_per_second["0 workers"] > 0
    assert "nothing here is a GPU's number" in gpu.shown(result) and "0 of 6 checks failed" in gpu.shown(result)


def test_wrong_numbers_fail_and_what_is_left_out_is_named(args, tmp_path, monkeypatch):
    numbers, given = gpu._numbers, []

    def wrong(trainer, batch, *, compiled=False):
        given.append(trainer)
        found = numbers(trainer, batch)
        return [part + 0.1 * len(given) for part in found]

    monkeypatch.setattr(gpu, "_numbers", wrong)
    monkeypatch.setattr(gpu, "TOLERANCES", {"fp32": 1e-3})
    plan = list(gpu._plan(*(gpu.World("tiny-vit", tmp_path, "cpu") for _ in range(2)), args))
    assert plan[0][1]().passed is False
    args.minutes = -1.0
    late = gpu.run(args, tmp_path)
    assert late.not_reached == [what for what, _ in plan] and not late.checks


def test_numbers_that_are_not_finite_are_far_off():
    assert gpu._distance(torch.ones(2), torch.tensor([1.0, float("nan")])) == float("inf")
    assert gpu._distance(torch.ones(0), torch.ones(0)) == 0


def test_a_bare_checkout_names_all_packages_it_needs():
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("dependencies = [")[2].partition("]")[0]
    assert sorted(bench.NEEDS.values()) == sorted(re.findall(r'"([a-z_]+)>=', declared))
