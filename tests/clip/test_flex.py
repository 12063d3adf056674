"""Packed prompts through FlexAttention see what they see through ours, and learn the same where PyTorch's gradient is asked for.

On a CPU PyTorch refuses that gradient, though the operator behind has one; the tests of gradients take its check away.
"""

from __future__ import annotations

import sys

import pytest
import torch
from torch.nn.attention import flex_attention

from promptmix.bench.world import World
from promptmix.clip import flex
from promptmix.clip.packed import packed_layout
from promptmix.errors import ConfigError
from tests.trainers.toy import shallow


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return shallow(World("tiny-vit", tmp_path_factory.mktemp("world"), "cpu"))


@pytest.fixture
def learns(monkeypatch):
    """Ask for gradients on a CPU all the same."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(flex, "_check_learns", lambda device: None)


@pytest.mark.parametrize(
    ("lengths", "start", "blind"), [((3, 1, 4), 6, ()), ((2, 5), 1, ()), ((3,), 0, ()), ((2, 3), 4, (True, False))]
)
def test_masks_are_what_our_grid_hides(lengths, start, blind):
    layout = packed_layout(lengths, start, "cpu", blind)
    rows, ends = start + sum(lengths), layout.ends
    owner = [-1] * start + [c for c, length in enumerate(lengths) for _ in range(length)]
    expected = torch.zeros(rows, rows, dtype=torch.bool)
    for query in range(rows):
        for key in range(query + 1):
            expected[query, key] = key < start or owner[key] == owner[query]
    for end, hides in zip(ends, blind, strict=False):
        expected[end, end] = not hides
    masks = flex.block_masks(lengths, start, "cpu", blind)
    for mask, seen in zip(masks, (expected, expected[ends]), strict=True):
        assert mask.shape == (1, 1, *seen.shape)
        assert torch.equal(flex_attention.create_mask(mask.mask_mod, None, None, *seen.shape, device="cpu")[0, 0], seen)


def numbers(trainer, batch):
    """Return scores without a graph, and logits, loss and gradients of a batch."""
    scores = trainer.model_inference(batch["img"]).detach()
    terms = trainer.model.loss(trainer.model.step(batch["img"], batch["label"]))
    terms.total.backward()
    return [scores, terms.logits.detach(), terms.total.detach(), *(p.grad for p in trainer.model.parameters())]


@pytest.mark.parametrize(("name", "opts"), [("CoCoOp", []), ("MaPLe", ["TRAINER.MAPLE.PROMPT_DEPTH", 2])])
def test_a_step_learns_the_same(world, learns, name, opts, monkeypatch):
    found, kernels, ask = [], [], flex._kernel
    monkeypatch.setattr(flex, "_kernel", lambda device: kernels.append(device) or ask(device))
    for way in ("packed", "flex"):
        trainer = world.trainer(name, 6, "MODEL.ATTENTION", way, *opts)
        found.append(numbers(trainer, world.batch(trainer, 4)))
        assert bool(kernels) == (way == "flex")
    for packed, other in zip(*found, strict=True):
        torch.testing.assert_close(other, packed, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_is_refused(world, monkeypatch):
    trainer = world.trainer("CoOp", 6, "MODEL.ATTENTION", "flex")
    batch = world.batch(trainer, 4)
    with pytest.raises(ConfigError, match="MODEL.ATTENTION is 'flex', whose gradient PyTorch has on a GPU only; set MODEL"):
        trainer.forward_backward(batch)
    with pytest.raises(ConfigError, match="prompts go full length, not packed; set MODEL.ATTENTION to 'packed'"):
        flex.choose_attention(trainer.clip.text, "flex", plain=True)
    monkeypatch.delattr(torch.nn.attention, "flex_attention")
    monkeypatch.setitem(sys.modules, "torch.nn.attention.flex_attention", None)
    with pytest.raises(ConfigError, match=r"MODEL.ATTENTION is 'flex', which PyTorch .* lacks \(2.5 has it\); set"):
        flex.choose_attention(trainer.clip.text, "flex", plain=False)
