"""Benchmarks at tiny sizes: every suite runs, counts are what they claim, and no counted step became dearer."""

from __future__ import annotations

import json
import multiprocessing
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from promptmix.bench import startup
from promptmix.bench.counted import CASES, count_cases, count_step, regressions
from promptmix.bench.scaling import sizes, study
from promptmix.bench.world import World, class_names, learn, silenced
from promptmix.cli import main
from promptmix.cost.count import Operations, count
from promptmix.errors import UserError
from promptmix.plugin_manager import get_plugin_manager
from promptmix.registry import DATASET_REGISTRY
from promptmix.runs import backends
from promptmix.utils import write_json
from tests import forked
from tests.trainers.toy import shallow

RECORD = Path(__file__).resolve().parents[2] / "benchmarks" / "ci_flops.json"
SMALL = ["--backbone", "tiny-vit", "--repeats", "1", "--device", "cpu"]


def test_counted_steps_at_full_size_did_not_become_dearer(tmp_path):
    get_plugin_manager()
    with silenced():
        counts = count_cases(World("ViT-B/16", tmp_path, "meta"))
    assert regressions(counts, RECORD) == []
    for case in CASES:
        assert counts[case]["gflops"] <= 1.15 * counts[case]["minimum_gflops"]  # the target for CoOp, met by all
    assert counts["CoOp:4:1000"]["live_mb"] < 3 * 1024


def small_world(folder, device):
    """A world of towers of two layers."""
    world = shallow(World("tiny-vit", folder, device))
    world._state = {name: value.clone() for name, value in world.clip.state_dict().items()}
    return world


def test_regressions_name_what_grew(tmp_path):
    record, counts = tmp_path / "record.json", {"gflops": 10.0, "live_mb": 100.0, "operations": 200, "launches": 80}
    write_json({"A:1:2": counts}, record)
    assert regressions({"A:1:2": counts | {"gflops": 10.4, "live_mb": 90.0}}, record) == []
    assert regressions({"A:1:2": counts | {"gflops": 11.0}}, record) == ["A:1:2: gflops 11.0, recorded 10.0 (+10.0%)"]
    assert regressions({"A:1:2": counts | {"launches": 88}}, record) == ["A:1:2: launches 88.0, recorded 80.0 (+10.0%)"]
    with pytest.raises(UserError, match="no gflops of case B"):
        regressions({"B:1:2": counts}, record)
    write_json({"A:1:2": {"gflops": 10.0, "live_mb": 100.0}}, record)  # made before operations were counted
    with pytest.raises(UserError, match="no operations of case A"):
        regressions({"A:1:2": counts}, record)


def test_live_memory_counts_what_is_held_at_once():
    weight = torch.randn(256, 1024)

    def chain():
        x = torch.zeros(1024, 256)  # 1 MiB
        for _ in range(5):
            x = (x @ weight) @ weight.T  # 4 MiB between, freed again

    assert count(chain).live_mb == pytest.approx(6, abs=0.1)
    assert count(chain).gflops == pytest.approx(5 * 2 * 2 * 1024 * 256 * 1024 / 1e9)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_operators_are_counted_and_views_launch_nothing(device):
    x = torch.ones(1, 2, 16, 64, device=device)

    def work():
        attention = torch.nn.functional.scaled_dot_product_attention(x, x, x)  # one operator
        return (attention.transpose(2, 3).unsqueeze(0) + 1)[None]  # three views and a launch

    assert count(work).operations == Operations(all=5, launches=2)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_counts_do_not_need_numbers(device):
    def work():
        x = torch.ones(64, 64, device=device, requires_grad=True)
        (x @ x).relu().sum().backward()

    assert count(work).gflops == pytest.approx(3 * 2 * 64**3 / 1e9)


def test_attention_is_counted_alike_where_it_is_fused():
    attention = torch.nn.MultiheadAttention(64, 4, batch_first=True).eval().requires_grad_(False)
    found = []
    for grad in (False, True):  # PyTorch fuses where no gradient is wanted
        tokens = torch.randn(2, 10, 64, requires_grad=grad)
        found.append(count(lambda tokens=tokens: attention(tokens, tokens, tokens, need_weights=False)).gflops)
    assert found[0] == pytest.approx(found[1])
    with torch.inference_mode():
        found.append(count(lambda: attention(tokens, tokens, tokens, need_weights=False)).gflops)
    assert found[2] == pytest.approx(found[1])
    assert found[0] == pytest.approx((2 * 2 * 10 * 4 * 64 * 64 + 4 * 2 * 10 * 10 * 64) / 1e9)


@pytest.mark.parametrize(
    ("suite", "sizes", "ways"),
    [
        (
            "text",
            ["--classes", "6", "--context", "4", "--prompts", "2", "--class-chunk", "4"],
            ["plain", "ours", "ours, 4 classes at a time"],
        ),
        ("step", ["--classes", "6", "--steps", "CoOp:2:6", "CoCoOp:2:6", "--experts", "2", "--also", "bf16"], ["plain", "ours"]),
        ("eval", ["--evaluations", "CoOp:4:6", "CoCoOp:2:6"], ["plain", "ours", "image tower and decoding alone"]),
        ("data", ["--pictures", "8", "--workers"], ["plain", "ours, cached views"]),
    ],
)
def test_suites(suite, sizes, ways, tmp_path, capsys):
    file = str(tmp_path / "a.json")
    assert main(["bench", suite, *SMALL, *sizes, "--json", file]) == 0
    shown = capsys.readouterr().out
    record = json.loads(Path(file).read_text())
    for row in record["results"]:
        others = row["work"].startswith(("decode ", "8 training pictures at 224 pixels"))
        assert list(row["ways"])[: len(ways)] == ways or others
        assert row["work"] in shown
        assert all(cost["seconds"] > 0 and cost["cpu_seconds"] > 0 for cost in row["ways"].values())
        if "training pictures at 224" in row["work"]:
            assert "DALI on the CPU" in row["ways"] or "without DALI" in row["work"]
        if suite in ("text", "step"):
            assert row["ways"]["ours"]["gflops"] < row["ways"]["plain"]["gflops"]
    assert {"commit", "machine", "versions"} <= record.keys()
    assert record["command"] == " ".join(["promptmix", "bench", suite, *SMALL, *sizes])
    assert main(["bench", "show", file]) == 0
    assert capsys.readouterr().out.strip() == shown.strip()
    assert main(["bench", "compare", file, file]) == 0
    assert "1.000" in capsys.readouterr().out


def in_a_fork(command, **_):
    """Stand in for ``subprocess.run`` of a program for Python, whose imports of other packages take longer than all else."""

    def program(words):
        sys.argv = ["-c", *words]
        exec(command[2], {"__name__": "__main__"})
        return 0

    done = forked.run(command[3:], work=program)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("suite", "sizes", "work", "ways"),
    [
        ("startup", [], "import to first step, CoOp on the embedded default", ["plain", "ours", "import torch alone"]),
        (
            "run",
            ["--epochs", "1", "--shots", "1", "--methods", "CoOp"],
            "run, CoOp, 1 shots, 1 epochs, embedded default",
            ["plain", "ours", "ours, features on disk"],
        ),
    ],
)
def test_suites_on_the_embedded_default(suite, sizes, work, ways, tmp_path, capsys, monkeypatch):
    get_plugin_manager()

    class FewForTest(DATASET_REGISTRY.get("EmojiFamilies")):
        @property
        def test(self):
            return super().test[::8]

    monkeypatch.setitem(DATASET_REGISTRY._entries, "EmojiFamilies", FewForTest)
    monkeypatch.setattr(startup, "subprocess", SimpleNamespace(run=in_a_fork))
    monkeypatch.setattr(startup, "find_spec", lambda name: None)  # Ray takes seconds to start
    monkeypatch.setattr(backends, "_context", lambda: multiprocessing.get_context("fork"))
    file = str(tmp_path / "a.json")
    assert main(["bench", suite, *SMALL, *sizes, "--json", file]) == 0
    lines = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [line[2].strip() for line in lines[: 1 + len(ways)]] == ["way", *ways] and lines[1][1].strip() == work
    row, *others = json.loads(Path(file).read_text())["results"]
    assert row["work"] == work and list(row["ways"]) == ways
    assert all(cost["seconds"] > 0 for cost in row["ways"].values())
    if suite == "startup":
        assert [list(other["ways"]) for other in others] == [["in a new process", "of a sweep"]]
        assert others[0]["ways"]["of a sweep"]["seconds"] > 0
        assert row["ways"]["import torch alone"]["seconds"] < row["ways"]["ours"]["seconds"]
    else:
        counts = [row["ways"][way]["gflops"] for way in ways]
        assert counts[0] > counts[1] > 10 * counts[2] > 0  # no picture is encoded a second time


def test_compare_wants_two_files_of_one_suite(tmp_path, capsys):
    (tmp_path / "other.json").write_text("{}")
    assert main(["bench", "show"]) == 2
    assert "bench show takes JSON files" in capsys.readouterr().err
    assert main(["bench", "compare", str(tmp_path / "other.json")]) == 2
    assert "two JSON files" in capsys.readouterr().err
    assert main(["bench", "compare", *[str(tmp_path / "other.json")] * 2]) == 2
    assert "not from `promptmix bench --json`" in capsys.readouterr().err


def test_scaling_study_counts_all_and_measures_what_is_small_enough(tmp_path):
    get_plugin_manager()
    lines = list(sizes(("CoOp", "MoCoOp"), (4, 24), (1, 2), (4,), (2,)))
    lengths = list(sizes(("CoCoOp",), (4,), contexts=(4, 16), batches=()))[1:]  # its initial words would set the length
    with silenced():
        meta = small_world(tmp_path, "meta")
        text = study(meta, lines)
        assert "MoCoOp" in text and "2 experts" in text and "extrapolated" in text and "here" not in text
        short, long = (count_step(meta, size.method, size.batch, size.classes, *size.opts)["gflops"] for size in lengths)
        assert long > short
        counts = [float(line.split("|")[4]) for line in text.splitlines()[2:4]]  # of the plain way, with 4 and with 24 classes
        here = small_world(tmp_path, "cpu")
        table = [line.split("|") for line in study(meta, lines[:2], here, sum(counts) / 2).splitlines()]
    column = {name.strip(): i for i, name in enumerate(table[0])}
    assert [float(line[column["s here"]]) > 0 for line in table[2:]] == [True, True]
    assert [line[column["plain s"]].strip() != "" for line in table[2:]] == [True, False]


def test_towers_without_a_mask_are_counted(tmp_path):
    get_plugin_manager()
    with silenced():
        world = small_world(tmp_path, "meta")
        world.clip.text.attn_mask, world.clip.text.shares_prefix = None, False
        trainer = world.trainer("CoOp", 2)
        assert count(lambda: learn(trainer, world.batch(trainer, 1))).gflops > 0


def test_class_names_are_distinct():
    assert len(set(class_names(1000))) == 1000
