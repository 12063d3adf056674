"""What a checkout imports and doesn't find: packages stand in until something uses them."""

from __future__ import annotations

import pdb
import re
import sys

import pytest

from tests.dassl.fork import change, log, make, refused, run

HEAD = "from clip import clip\n"
BUILD = "    def build_model(self):\n"


@pytest.fixture
def room(tmp_path):
    return make(tmp_path)


def imports(room, line, use=""):
    change(room, "trainers/wordbias.py", (HEAD, f"{HEAD}{line}\n"))
    if use:
        change(room, "trainers/wordbias.py", (BUILD, f"{BUILD}        {use}\n"))


@pytest.mark.parametrize(
    ("line", "use"),
    [
        ("import nobody_has_it.plot as plt", "isinstance(self, plt.Figure)"),
        ("from nobody_has_it import Clusters, fast", ""),
        ("import google.nobody_has_it as generative", ""),
        ("from dassl.engine.trainer import *\nfrom dassl.evaluation.evaluator import *", "torch, np, osp, tqdm, build_optimizer"),
        ("import nobody_has_it as n\n\n\nclass Mine(n.Base):\n    size: n.Size | None = None\n", ""),
        ("import swanlab", "swanlab.init(project='x').log({'loss': 1}); swanlab.run.name = 'y'"),
        ("import pickle5", "assert pickle5.loads(pickle5.dumps(3)) == 3"),
        ("from trainers.imagenet_templates import IMAGENET_TEMPLATES as T", "assert len(T) == 80 and '{}' in T[0]"),
        ("try:\n    import nobody_has_it\nexcept ImportError:\n    nobody_has_it = None", "assert nobody_has_it is None"),
    ],
)
def test_what_nothing_uses_may_be_absent(room, line, use):
    before = set(sys.modules)
    imports(room, line, use)
    run(room)
    assert not {"nobody_has_it", "swanlab", "pickle5"} & (set(sys.modules) - before)
    said = re.search(
        r"The package (google\.)?nobody_has_it \(trainers/wordbias.py:\d+\) is not installed; it is passed over until", log(room)
    )
    assert bool(said) == ("nobody_has_it" in line and "try" not in line)


@pytest.mark.parametrize(
    ("line", "use"),
    [
        ("import nobody_has_it", "nobody_has_it.kmeans(3)"),
        ("import nobody_has_it as n\n\n\nclass Mine(n.Base):\n    pass\n", "Mine(3)"),
        ("from nobody_has_it.deep import thing", "thing.part.use()"),
    ],
)
def test_what_is_used_is_named(room, capsys, line, use):
    imports(room, line, use)
    error = refused(room, capsys)
    assert re.search(
        r"wordbias.py:\d+ needs the package nobody_has_it, which is not installed \(nobody_has_it[.\w]*\); install", error
    )


def test_a_debugger_is_passed_over(room, monkeypatch):
    """Bayesian-Prompt-Learning's main waits in one."""
    before = pdb.set_trace
    imports(room, "import pdb", "pdb.set_trace()")
    run(room)
    assert re.search(r"trainers/wordbias.py:\d+ waits in a debugger, which is passed over", log(room))
    assert pdb.set_trace is before
