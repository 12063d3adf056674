"""Every method with pictures and classes in three parts, as processes divide them: the numbers of one device, or one line."""

from __future__ import annotations

import pytest
import torch

from promptmix.config import get_cfg
from promptmix.cost.count import count
from promptmix.data.reading.loaders import streams_kept
from promptmix.errors import ConfigError
from promptmix.parallel import group
from promptmix.plugin_manager import get_plugin_manager
from promptmix.prompts.compiled import check_step
from promptmix.registry import TRAINER_REGISTRY
from tests.trainers.toy import toy_trainer

get_plugin_manager()
TRAINERS = [name for name in TRAINER_REGISTRY if TRAINER_REGISTRY.get(name).__module__.startswith("promptmix.trainers.")]
#: What draws random numbers inside of the towers: LoRA's dropout.
REFUSED = {"CLIPLoRA"}
#: What learns without steps on training batches is tested instead.
NO_STEP = {"ZeroshotCLIP", "TipAdapter", "LinearProbe", "LPPlusPlus", "TPT"}

SHARED = group.shared


def of_others(found, size, dim):
    """Stand in for what is gathered."""
    shape = list(found.shape)
    shape[dim] = size
    return found.new_ones(shape)


@pytest.fixture
def divide(monkeypatch):
    """Have this process encode the parts of ``n`` processes one after another; 1 takes it back."""

    def shared(count, encode, dim=0, what="pictures"):
        spans = [group._part(count, rank, group.size()) for rank in range(group.size())]
        parts = [(span.stop - span.start, group._encoded(span, encode, what)) for span in spans]
        if isinstance(parts[0][1], torch.Tensor):
            return torch.cat([found.narrow(dim, 0, size) for size, found in parts], dim)
        each = zip(*([one.narrow(dim, 0, size) for one in found] for size, found in parts), strict=True)
        return tuple(torch.cat(one, dim) for one in each)

    def turn_to(n):
        monkeypatch.setattr(group, "_group", group._Group(0, n, "the method") if n > 1 else None)

    monkeypatch.setattr(group, "shared", shared)
    return turn_to


def step(trainer, images, labels):
    """Return logits, parts of the loss and gradients of a step."""
    trainer.model.train()
    with streams_kept():
        terms = trainer.model.loss(trainer.model.step(images, labels))
        learned = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(terms.total, learned, allow_unused=True)
    found = [terms.logits, terms.total, *terms.parts.values(), *(one for one in gradients if one is not None)]
    return [one.detach() for one in found]


@pytest.mark.parametrize("name", [name for name in TRAINERS if name not in NO_STEP])
def test_a_divided_step_is_that_of_one_device(room, name, divide):
    trainer = toy_trainer(room, name)
    images, labels = trainer.parse_batch_train(next(iter(trainer.train_loader_x)))
    trainer.model.before_training()
    if trainer.stages.stages:
        trainer.stages.turn_to(0)
    alone = step(trainer, images, labels)
    divide(4)
    if name in REFUSED:
        with pytest.raises(ConfigError, match="random numbers while it encodes"):
            step(trainer, images, labels)
        return
    together = step(trainer, images, labels)
    assert len(alone) == len(together) > 2
    rounding = 1e-6 * sum(float(one.abs().sum()) for one in alone)  # of gradients that are zero but for it
    for one, other in zip(alone, together, strict=True):
        assert (one - other).abs().sum() <= 1e-4 * one.abs().sum() + rounding


def test_a_compiled_step_is_refused(divide):
    divide(2)
    cfg = get_cfg()
    cfg.TRAIN.STEP = "compiled"
    with pytest.raises(ConfigError, match="TRAIN.STEP is 'compiled'.*--devices"):
        check_step(cfg, torch.device("cpu"), changes_gradients=False)


def test_each_process_does_its_part_of_the_work(room, divide, monkeypatch):
    """Counted operations of a step on 4 pictures and 5 classes, whole and in one of 2 processes."""
    trainer = toy_trainer(room, "MaPLe", classes="all")
    images, labels = trainer.parse_batch_train(next(iter(trainer.train_loader_x)))
    whole = count(lambda: step(trainer, images, labels)).gflops
    divide(2)
    monkeypatch.setattr(group, "shared", SHARED)
    monkeypatch.setattr(group, "_all_parts", of_others)
    part = count(lambda: step(trainer, images, labels)).gflops
    assert part < 0.6 * whole
