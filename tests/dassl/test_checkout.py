"""A checkout in the authors' idiom, unchanged, on promptmix's engine."""

from __future__ import annotations

import io
import json
import pickle
import re
import sys
from pathlib import Path

import pytest
import torch

from promptmix.cli import main
from promptmix.registry import DATASET_REGISTRY, TRAINER_REGISTRY

CHECKOUT = Path(__file__).resolve().parent / "checkout"


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """Weights of the checkout's model, in a folder for data and outputs."""
    folder = tmp_path_factory.mktemp("checkout")
    generator = torch.Generator().manual_seed(0)
    state = {"visual.weight": torch.randn(4, 3, generator=generator), "words.weight": torch.randn(128, 4, generator=generator)}
    torch.save(state, folder / "tiny.pt")
    return folder


def arguments(room, out, *flags, trainer="WordBias"):
    return [
        *("train", "--coop-repo", str(CHECKOUT), "--trainer", trainer, "--root", str(room), "--output-dir", str(out)),
        *("--dataset-config-file", "configs/datasets/squares.yaml", "--config-file", "configs/trainers/WordBias/ep3.yaml"),
        *("--seed", "1", *flags, "MODEL.BACKBONE.WEIGHTS", str(room / "tiny.pt")),
    ]


def log(out):
    return (out / "log.txt").read_text()


@pytest.fixture(scope="module")
def trained(room):
    out = room / "trained"
    assert main(arguments(room, out)) == 0
    return out


def test_it_trains_and_reports(trained):
    results = json.loads((trained / "results.json").read_text())
    assert results["trainer"] == "WordBias" and results["dataset"] == "OxfordPets" and results["seed"] == 1
    assert results["metrics"]["test"]["accuracy"] == 100.0
    assert results["config"]["TRAINER"]["WORDBIAS"] == {"PREC": "fp32", "NOTE": "from the fork's own flag"}
    rates = re.findall(r"^epoch \[(\d)/3\] batch \[\d/3\].* lr (\S+) eta", log(trained), re.M)
    # A constant warm-up epoch, then the cosine from its start; the trainer steps before the epoch's last line is printed.
    lines = ["1.0000e-05"] * 2 + ["5.0000e-02"] * 3 + ["3.7500e-02"] * 3 + ["1.2500e-02"]
    assert rates == [(str(1 + i // 3), rate) for i, rate in enumerate(lines)]
    assert (trained / "prompt_learner" / "model.pth.tar-3").is_file()


def test_it_says_what_a_cpu_changes(trained):
    lines = log(trained)
    assert "no_gpu: TRAINER.WORDBIAS.PREC is fp32 instead of fp16" in lines
    assert re.search(r"calls of \.cuda\(\) in the checkout are passed over \(first at trainers/wordbias.py:\d+\)", lines)
    assert re.search(r"calls of \.half\(\) in the checkout are passed over \(first at trainers/wordbias.py:\d+\)", lines)
    assert torch.ones(1).half().dtype == torch.float16  # only inside the run


def test_its_own_load_model_evaluates(room, trained, tmp_path):
    flags = ("--eval-only", "--model-dir", str(trained), "--load-epoch", "3")
    assert main(arguments(room, tmp_path / "eval", *flags)) == 0
    assert "Loading weights to prompt_learner from" in log(tmp_path / "eval")
    before = json.loads((trained / "results.json").read_text())["metrics"]
    assert json.loads((tmp_path / "eval" / "results.json").read_text())["metrics"] == before


def test_it_resumes_where_it_stopped(room, trained, tmp_path):
    """Two epochs and one more are the same as three."""
    out = tmp_path / "out"
    assert main([*arguments(room, out), "TRAIN.CHECKPOINT_FREQ", "2"]) == 0
    (out / "prompt_learner" / "model.pth.tar-3").unlink()
    (out / "prompt_learner" / "checkpoint").write_text("model.pth.tar-2\n")
    assert main([*arguments(room, out), "TRAIN.CHECKPOINT_FREQ", "2"]) == 0
    resumed = max(out.glob("log.txt*"), key=lambda path: len(path.name)).read_text()
    assert "epoch [2/3]" not in resumed
    assert re.findall(r"epoch \[3/3\] .* lr (\S+) eta", resumed) == ["3.7500e-02", "3.7500e-02", "1.2500e-02"]


def test_nothing_of_it_stays(trained):
    assert not [name for name in sys.modules if name.split(".")[0] in ("dassl", "clip", "trainers", "datasets", "train")]
    assert str(CHECKOUT) not in sys.path
    assert "WordBias" not in TRAINER_REGISTRY
    assert TRAINER_REGISTRY.get("CoOp").__module__ == "promptmix.trainers.coop"
    assert DATASET_REGISTRY.get("OxfordPets").__module__.startswith("promptmix.")


def test_pickled_picks_are_dassls_own(room, trained):
    """A real Dassl finds its own class and its own attributes in them."""
    content = (room / "squares" / "shot_4-seed_1.pkl").read_bytes()
    assert b"dassl.data.datasets.base_dataset" in content and b"promptmix" not in content
    wanted = []

    class Theirs:
        pass

    class Reader(pickle.Unpickler):
        def find_class(self, module, name):
            wanted.append((module, name))
            return Theirs

    items = Reader(io.BytesIO(content)).load()["train"]
    assert set(wanted) == {("dassl.data.datasets.base_dataset", "Datum")}
    assert len(items) == 12 and set(vars(items[0])) == {"_impath", "_label", "_domain", "_classname"}


def test_a_trainer_with_its_own_test_is_recorded(room, tmp_path):
    assert main(arguments(room, tmp_path / "out", trainer="OwnTest")) == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["metrics"]["test"]["accuracy"] == 100.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_cuda_that_cannot_be_passed_over_is_named(room, tmp_path, capsys):
    assert main(arguments(room, tmp_path / "out", trainer="NeedsGPU")) == 2
    error = capsys.readouterr().err
    assert re.search(r"error: trainers/wordbias.py:\d+ asks for CUDA, but there is no GPU", error)


def test_what_only_a_fork_of_dassl_has_is_named(room, tmp_path, capsys):
    assert main(arguments(room, tmp_path / "out", trainer="NeedsFork")) == 2
    error = capsys.readouterr().err
    assert re.search(
        r"trainers/wordbias.py:\d+ uses NeedsFork.fork_backward_and_update, which neither the checkout nor Dassl", error
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"--trainer": "KgCoOp"},
            r"--trainer KgCoOp: .* has no such trainer \(it has: CoOp, NeedsFork, NeedsGPU, OwnTest, WordBias\)",
        ),
        ({"--coop-repo": str(CHECKOUT.parent)}, r"no train.py there; did you mean .*checkout\?"),
        ({"--config-file": "nothing.yaml"}, r"config file nothing.yaml: neither here nor in"),
        ({"OPTIM.LRR": "1"}, r"the checkout's config can't be merged: Non-existent key: OPTIM.LRR"),
        ({"MODEL.BACKBONE.WEIGHTS": "/nowhere.pt"}, r"MODEL.BACKBONE.WEIGHTS /nowhere.pt: no such file"),
    ],
)
def test_wrong_requests_are_one_line(room, tmp_path, capsys, change, message):
    words = arguments(room, tmp_path / "out")
    for key, value in change.items():
        if key in words:
            words[words.index(key) + 1] = value
        else:
            words += [key, value]
    assert main(words) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_named(room, tmp_path, capsys):
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "train.py").write_text("import a_package_nobody_has\na_package_nobody_has.start()\n")
    assert main(["train", "--coop-repo", str(tmp_path / "repo"), "--trainer", "X"]) == 2
    assert "train.py:2 needs the package a_package_nobody_has, which is not installed" in capsys.readouterr().err


def test_a_plugin_in_dassls_idiom(tmp_path, room, capsys):
    """A single file that imports dassl also runs as a plugin, beside promptmix's own trainers."""
    plugin = tmp_path / "idiom.py"
    lines = ["from dassl.engine import TRAINER_REGISTRY, TrainerX", "", "@TRAINER_REGISTRY.register()"]
    plugin.write_text("\n".join([*lines, "class FromDassl(TrainerX):", "    pass", ""]))
    try:
        assert main(["list", "trainers", "--plugin", str(plugin)]) == 0
        assert "FromDassl" in capsys.readouterr().out
    finally:
        TRAINER_REGISTRY._entries.pop("FromDassl", None)
        __import__("promptmix.dassl").dassl.uninstall()
