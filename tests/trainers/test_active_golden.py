"""PCB's classifiers, with and without descriptions, against the numbers of their authors' code."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from promptmix.plugins.prompt_bank.soft import Soft
from promptmix.trainers.pcb import PCB, Described

from promptmix.data.descriptions import Descriptions
from promptmix.prompts.learner import Learner
from tests.trainers.golden import FOLDER, compare, golden_clip, golden_task


@lru_cache(maxsize=1)
def frozen():
    return golden_clip()


def described(case):
    sentences = json.loads((FOLDER / f"{case}.json").read_text())["descriptions"]
    return replace(golden_task(frozen()), descriptions=Descriptions(sentences, "the test"))


def test_without_descriptions_it_is_coop_with_contexts_of_each_class():
    task = golden_task(frozen())
    compare("pcb_none", Learner(task, Soft(task, 4, csc=True)), {"prompt_learner.ctx": "bank.ctx"})


def test_descriptions_in_the_middle_of_a_context():
    sentences = json.loads((FOLDER / "pcb_as_middle.json").read_text())["settings"]["descriptions"]
    task = replace(golden_task(frozen()), descriptions=Descriptions(sentences, "the test"))
    learner = PCB.compose(None, task, mode="AS", n_ctx=3, csc=True, class_token_position="middle")
    compare("pcb_as_middle", learner, {"prompt_learner.ctx": "bank.ctx"})


@pytest.mark.parametrize("mode", ["AS", "AE"])
@pytest.mark.parametrize("csc", [True, False])
def test_descriptions(mode, csc):
    case = f"pcb_{mode.lower()}" + ("" if csc else "_generic")
    task = described(case)
    bank = Described(task, mode, csc, n_ctx=4)
    assert bank.class_specific is csc and bank.ctx.shape == (1, *([11] if csc else []), 4, 512)
    compare(case, Learner(task, bank), {"prompt_learner.ctx": "bank.ctx"})
    if not csc:  # then it has an answer for other classes too
        with torch.no_grad():
            assert torch.allclose(bank(task.classnames[1:3]), bank(task.classnames)[:, 1:3], atol=1e-5)
