"""What current PyTorch lost, and a Dassl-style warm-up scheduler that needs it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from promptmix.dassl import patches


@pytest.fixture
def patched(monkeypatch):
    """The patches, undone after the test."""
    monkeypatch.setattr(LRScheduler, "__init__", LRScheduler.__init__)
    monkeypatch.setattr(LRScheduler, "load_state_dict", LRScheduler.load_state_dict)
    monkeypatch.setattr(torch, "load", torch.load)
    monkeypatch.setattr(patches, "_done", [])
    before = set(vars(np))
    yield patches.patch_torch()
    for name in set(vars(np)) - before:
        delattr(np, name)


class Warmup(LRScheduler):
    """A warm-up at a constant rate in the form of 2022: it passes `verbose` on and keeps its successor in its state."""

    def __init__(self, optimizer, successor, warmup_epoch, last_epoch=-1, verbose=False):
        self.successor = successor
        self.warmup_epoch = warmup_epoch
        super().__init__(optimizer, last_epoch, verbose)

    def get_lr(self):
        return [1e-5] if self.last_epoch < self.warmup_epoch else self.successor.get_last_lr()

    def step(self, epoch=None):
        if self.last_epoch >= self.warmup_epoch:
            self.successor.step(epoch)
            self._last_lr = self.successor.get_last_lr()
        else:
            super().step(epoch)


def make():
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    return optimizer, Warmup(optimizer, CosineAnnealingLR(optimizer, 6.0), 1)


def rates(optimizer, schedule, epochs):
    found = []
    for _ in range(epochs):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_without_the_patch_it_fails():
    with pytest.raises(TypeError):
        make()


def test_the_patches_are_listed(patched):
    assert len(patched) == 3 + ("int" in patched[-1] and "numpy" in patched[-1])
    assert [text.split()[0] for text in patched[:3]] == ["schedulers", "torch.load", "a"]
    assert patches.patch_torch() == patched  # a second call changes nothing
    assert np.int is int


def test_learning_goes_on_after_a_resume(patched, tmp_path):
    """The same rates with a stop in between as without, through a file with the pickled successor in it."""
    whole = rates(*make(), 6)
    optimizer, schedule = make()
    first = rates(optimizer, schedule, 3)
    torch.save({"optimizer": optimizer.state_dict(), "scheduler": schedule.state_dict()}, tmp_path / "checkpoint")
    optimizer, schedule = make()
    state = torch.load(tmp_path / "checkpoint")
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["scheduler"])
    assert schedule.successor.optimizer is optimizer
    assert first + rates(optimizer, schedule, 3) == pytest.approx(whole)


def test_weights_only_still_means_what_it_says(patched, tmp_path):
    _, schedule = make()
    torch.save({"scheduler": schedule.state_dict()}, tmp_path / "checkpoint")
    with pytest.raises(Exception, match="Weights only load failed"):
        torch.load(tmp_path / "checkpoint", weights_only=True)
