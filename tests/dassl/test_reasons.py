"""What stops a checkout, in one line: which of its lines, and whose fault it is."""

from __future__ import annotations

import re
from urllib.error import URLError

import pytest
import torch

from promptmix.dassl.nogpu import without_cuda
from promptmix.dassl.reasons import explained
from promptmix.errors import PluginError, UserError
from tests.dassl.fork import change, make, refused, run


@pytest.fixture
def room(tmp_path):
    return make(tmp_path)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("self.cfg.TRAINER.WORDBIAS.NOTE = 'x'", r"changes its config, which its program froze \(.*NOTE"),
        ("self.cfg.TRAINER.WORDBIAS.DEPTH", "reads a config key DEPTH, which neither its program nor its YAML files set"),
    ],
)
def test_a_config_used_otherwise_than_it_is(room, capsys, line, reason):
    build = "    def build_model(self):\n"
    change(room, "trainers/wordbias.py", (build, f"{build}        {line}\n"))
    assert re.search(rf"wordbias.py:\d+ {reason}", refused(room, capsys))


def test_a_config_key_that_only_a_fork_of_dassl_has(room, capsys):
    """BIP's files set OPTIM.EPS."""
    change(room, "configs/trainers/WordBias/ep3.yaml", ("OPTIM:\n", "OPTIM:\n  EPS: 0.001\n"))
    assert "nothing declares its key OPTIM.EPS; it may need a fork of Dassl: give its folder with --dassl" in refused(
        room, capsys
    )


def test_a_key_that_only_a_fork_of_dassl_has(room, capsys):
    """Craft's trainers read the class name of each picture."""
    parse = "    def parse_batch_train(self, batch):\n"
    change(room, "trainers/wordbias.py", (parse, f"{parse}        batch['classname']\n"))
    error = refused(room, capsys)
    assert re.search(
        r"wordbias.py:\d+ reads 'classname' of a batch, which Dassl's batches lack; it may need a fork of Dassl: .* --dassl",
        error,
    )


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        (
            "trainers/wordbias.py",
            "import trainers.lost",
            r"trainers/wordbias.py:1 imports trainers.lost, which the checkout itself lacks",
        ),
        (
            "trainers/wordbias.py",
            "import a_package_nobody_has; a_package_nobody_has.use()",
            r"trainers/wordbias.py:1 needs the package a_package_nobody_has, which",
        ),
        (
            "trainers/wordbias.py",
            "from dassl.engine import TrainerMULTI3",
            r"wordbias.py:1 can't be imported: cannot import name 'TrainerMULTI3'.*--dassl",
        ),
        (
            "trainers/wordbias.py",
            "import dassl.datasets.build",
            r"wordbias.py:1 can't be imported: promptmix.dassl lacks the module dassl.datasets",
        ),
        ("trainers/wordbias.py", "def broken(:", r"trainers/wordbias.py:1 is not valid in Python 3.[0-9.]+ \(invalid syntax\)"),
        (
            "trainers/wordbias.py",
            "open('gpt/words.json')",
            r"trainers/wordbias.py:1 needs the file gpt/words.json, which is not there",
        ),
        (
            "trainers/wordbias.py",
            "raise ValueError('The provided filename ./clip/ViT-L-14.pt does not exist')",
            r"wordbias.py:1 needs the file ./clip/ViT-L-14.pt, which is not there; MODEL.BACKBONE.WEIGHTS may be a folder",
        ),
        (
            "trainers/wordbias.py",
            "raise ValueError(\"No such file or directory: '/home/someone/weights/tiny.pt'\")",
            r"wordbias.py:1 needs .*: a path of its authors' machine; there is .*/weights/tiny.pt",
        ),
        (
            "trainers/wordbias.py",
            "open('./words/None/squares.yaml')",
            r"wordbias.py:1 needs .* there is configs/datasets/squares.yaml, which a key or flag of its own may choose",
        ),
        (
            "trainers/wordbias.py",
            "from yacs.config import Feature",
            r"wordbias.py:1 needs Feature of the package yacs, which the installed version [\d.]+ has not",
        ),
        (
            "trainers/wordbias.py",
            "__import__('os').environ['A_VARIABLE_NOBODY_HAS']",
            r"wordbias.py:1 reads the environment variable A_VARIABLE_NOBODY_HAS, which is not set",
        ),
        ("trainers/wordbias.py", "assert 1 > 2", r"trainers/wordbias.py:1 fails: AssertionError: assert 1 > 2 does not hold"),
        ("trainers/wordbias.py", "raise __import__('bdb').BdbQuit", r"trainers/wordbias.py:1 waits in a debugger .* take that"),
        ("trainers/wordbias.py", "{}['Squares']", r"trainers/wordbias.py:1 fails: KeyError: 'Squares'"),
        ("train.py", "def broken(:", r"train.py:1 is not valid in Python 3.[0-9.]+"),
    ],
)
def test_reasons(room, capsys, file, text, message):
    path = room / "fork" / file
    path.write_text(f"{text}\n{path.read_text()}")
    assert re.search(message, refused(room, capsys))
    assert not (room / "out").exists()


def test_a_download_that_fails(tmp_path):
    words = r"can't download what it asks for \(no route\); .* a folder with OpenAI's file names"
    with pytest.raises(UserError, match=words), explained(tmp_path):
        raise URLError("no route")


def test_a_checkout_without_its_datasets_is_not_told_to_install_another_package(tmp_path):
    with pytest.raises(PluginError, match="imports datasets, which the checkout itself lacks"), explained(tmp_path):
        raise ModuleNotFoundError("No module named 'datasets'", name="datasets")


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
@pytest.mark.parametrize(
    "line",
    [
        'torch.zeros(3, device="cuda")',
        'torch.ones(2).to("cuda:0")',
        "torch.ones(2).to(torch.device('cuda'))",
        "torch.ones(2).cuda(0)",
        "torch.cuda.set_device(0), torch.cuda.get_device_name()",
        "nn.Linear(2, 2).to('cuda')",
        "torch.ones(2, dtype=torch.float16) @ torch.ones(2)",
        "torch.ones(2).type(torch.float16) @ torch.ones(2)",
        "torch.overrides.handle_torch_function(lambda x: x.half() @ torch.ones(2), (torch.ones(2),), torch.ones(2))",
    ],
)
def test_hard_coded_cuda_runs_on_the_cpu(room, line):
    """As far as it can be passed over."""
    change(
        room,
        "trainers/wordbias.py",
        ("        cfg = self.cfg\n        print", f"        {line}\n        cfg = self.cfg\n        print"),
    )
    assert run(room)["metrics"]["test"]["accuracy"] > 0


def test_stored_fp16_is_read_as_fp32(tmp_path):
    """What a checkout makes of stored weights meets what .half() was passed over for."""
    torch.save({"state_dict": {"w": torch.ones(2).half()}, "epochs": [3], "mask": torch.ones(2) > 0}, tmp_path / "w.pt")
    with without_cuda(tmp_path):
        found = torch.load(tmp_path / "w.pt")
    assert found["state_dict"]["w"].dtype == torch.float32 and found["epochs"] == [3] and found["mask"].dtype == torch.bool


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_cuda_that_cannot_be_passed_over(room, capsys):
    change(
        room,
        "trainers/wordbias.py",
        ("        cfg = self.cfg\n        print", "        torch.cuda.current_device()\n        cfg = self.cfg\n        print"),
    )
    assert re.search(r"trainers/wordbias.py:\d+ asks for CUDA, but there is no GPU", refused(room, capsys))
