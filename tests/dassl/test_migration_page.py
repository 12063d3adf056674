"""The trainer that docs/from-coop.md moves from Dassl's idiom to a plugin: both files run, and learn the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import promptmix.dassl as pm
from promptmix.config import get_cfg
from promptmix.plugin_manager import get_plugin_manager, load_plugin
from promptmix.registry import DATASET_REGISTRY, TRAINER_REGISTRY
from tests.trainers import toy

PAGE = Path(__file__).resolve().parents[2] / "docs" / "from-coop.md"


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    toy.draw(folder / "toy")
    toy.write_backbone(folder / "clip.safetensors")
    for name, text in re.findall(r"<!-- file: (\S+) -->\n```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S):
        (folder / name).write_text(text)
    return folder


def learned(room, file):
    """Train the page's file for three epochs; return the residual and the accuracy."""
    get_plugin_manager()
    with TRAINER_REGISTRY.layer(), DATASET_REGISTRY.layer():
        DATASET_REGISTRY.register(toy.ToyPictures)
        pm.install()
        try:
            load_plugin(str(room / file))
        finally:
            pm.uninstall()
        assert "TASKRES" in get_cfg().TRAINER
        output = ("OUTPUT_DIR", str(room / f"out-{file}"), "OPTIM.MAX_EPOCH", 3, "OPTIM.LR", 0.05)
        trainer = toy.toy_trainer(room, "TaskRes", *output)
        torch.manual_seed(1)
        trainer.train()
        return trainer.model.residual.detach(), trainer.last_results["test"]


def test_both_files_learn_the_same(room):
    (before, theirs), (after, ours) = (learned(room, name) for name in ("taskres_dassl.py", "taskres.py"))
    assert before.abs().max() > 1e-3
    assert torch.allclose(before, after, atol=1e-6)
    assert theirs == ours


def test_every_layout_and_patch_is_on_the_page():
    from promptmix.engine.convert import layouts

    text = PAGE.read_text(encoding="utf-8")
    assert not [name for name in layouts() if name not in text]
