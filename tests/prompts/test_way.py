"""How far a reader has to go to follow a method's forward."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from tests.trainers.toy import first_step, toy_trainer

ROOT = Path(__file__).resolve().parents[2]


def files_of(function):
    """Return our files in which a function runs code, relative to the checkout."""
    found = set()
    before = sys.getprofile()
    sys.setprofile(lambda frame, event, _: found.add(frame.f_code.co_filename) if event == "call" else None)
    try:
        function()
    finally:
        sys.setprofile(before)
    paths = (Path(name) for name in found)
    ours = ("promptmix", "plugins", "trainers")
    return {
        path.relative_to(ROOT).as_posix()
        for path in paths
        if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in ours
    }


def test_coops_step_runs_through_the_files_that_the_docs_show(room):
    trainer = toy_trainer(room, "CoOp")
    first_step(trainer)  # tables that follow from the class names are made now
    images, labels = trainer.parse_batch_train(next(iter(trainer.train_loader_x)))
    found = files_of(lambda: trainer.model.loss(trainer.model.step(images, labels)))
    towers = {path for path in found if path.startswith("promptmix/clip/")}
    _, way = (ROOT / "docs" / "write-a-method.md").read_text(encoding="utf-8").split("## The way of a batch")
    shown = re.findall(r"^\| `(.+?\.py)`", way.split("\n## ")[0], re.MULTILINE)
    # Beside them, the towers ask whether several processes share the work.
    assert found - towers == {*shown, "promptmix/parallel/group.py"}
    assert len(shown) <= 4 and len(towers) <= 8
