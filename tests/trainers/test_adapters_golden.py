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


def mma(start: int, end: int, width: int) -> tuple[Learner, dict[str, str]]:
    """Adapters of the blocks ``start`` to ``end``, and their names by the authors'."""
    task, kinds, blocks = golden_task(frozen()), ("weight", "bias"), range(start, end + 1)
    bank = SharedAdapters(task, start, end, width, 0.1)
    names = {
        f"adapter_learner.{tower}_adapter.{i}.{theirs}.{kind}": f"bank.{ours}.{i}.{name}.{kind}"
        for tower, ours in (("text", "text"), ("visual", "visual_adapters"))
        for i in blocks
        for theirs, name in (("down.0", "down"), ("up", "up"))
        for kind in kinds
    }
    shared = {f"adapter_learner.shared_adapter.{i}.0.{kind}": f"bank.shared.{i}.{kind}" for i in blocks for kind in kinds}
    return Learner(task, bank, head=Cosine(task, bank)), names | shared


def test_mma():
    learner, names = mma(2, 3, 32)
    compare("mma", learner, names)
    with torch.no_grad():
        close(learner.classifier()[0, :, :64], numbers("mma")["text_features"])


def test_mma_from_what_enters_the_first_block():
    learner, names = mma(0, 1, 4)
    compare("mma_first", learner, names)
