"""Methods that change layers inside the towers against the numbers of their authors' code: MMA."""

from __future__ import annotations

from functools import lru_cache

import torch
from promptmix.trainers.mma import SharedAdapters

from promptmix.prompts.heads import Cosine
from promptmix.prompts.learner import Learner
from tests.trainers.golden import close, compare, golden_clip, golden_task, numbers


@lru_cache(maxsize=1)
def frozen():
    return golden_clip()


def mma() -> Learner:
    task = golden_task(frozen())
    bank = SharedAdapters(task, 2, 3, 32, 0.1)
    return Learner(task, bank, head=Cosine(task, bank))


MMA = {
    **{
        f"adapter_learner.{tower}_adapter.{i}.{theirs}.{kind}": f"bank.{ours}.{i}.{name}.{kind}"
        for tower, ours in (("text", "text"), ("visual", "visual_adapters"))
        for i in (2, 3)
        for theirs, name in (("down.0", "down"), ("up", "up"))
        for kind in ("weight", "bias")
    },
    **{f"adapter_learner.shared_adapter.{i}.0.{kind}": f"bank.shared.{i}.{kind}" for i in (2, 3) for kind in ("weight", "bias")},
}


def test_mma():
    learner = mma()
    compare("mma", learner, MMA)
    with torch.no_grad():
        close(learner.classifier()[0, :, :64], numbers("mma")["text_features"])
