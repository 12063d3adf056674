"""What is differentiated by hand has the gradients that PyTorch finds, and is left alone where PyTorch must find them."""

from __future__ import annotations

import pytest
import torch
from open_clip.transformer import QuickGELU, ResidualAttentionBlock

from promptmix.clip import blocks, model, packed
from promptmix.clip.packed import attend_packed, packed_layout, shared_block


def both_ways(work, x, monkeypatch, function):
    """Return what ``work`` gives with its gradient of ``x``, by hand and by PyTorch's graph, and how often each was by hand."""
    calls, apply, found = [], function.apply, []
    monkeypatch.setattr(function, "apply", lambda *args: calls.append(1) or apply(*args))
    for hand in (True, False):
        if not hand:
            for module in (blocks, packed, model):
                monkeypatch.setattr(module, "by_hand", lambda x: False)
        out = work(x)
        (grad,) = torch.autograd.grad((out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)).sum(), x)
        found.append((out, grad))
    return found, len(calls)


@pytest.mark.parametrize(
    ("lengths", "start", "blind", "experts"),
    [((3, 1, 4), 6, (), 2), ((2, 5), 1, (), 1), ((3,), 0, (), 1), ((2, 3), 4, (True, False), 2)],
)
def test_attention_of_packed_prompts(lengths, start, blind, experts, monkeypatch):
    torch.manual_seed(0)
    layout = packed_layout(lengths, start, "cpu", blind)
    qkv = torch.randn(experts * (start + sum(lengths)), 3 * 12, dtype=torch.double, requires_grad=True)
    (ours, theirs), calls = both_ways(lambda x: attend_packed(x, layout, 3), qkv, monkeypatch, packed._Attention)
    assert calls == 1
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)
    # The same as each prompt in full through PyTorch's attention.
    rows, first = ours[0].view(experts, -1, 12), start
    for c, length in enumerate(lengths):
        mine = [*range(start), *range(first, first + length)]
        parts = qkv.view(experts, -1, 3, 3, 4)[:, mine].permute(2, 0, 3, 1, 4)
        mask = torch.ones(len(mine), len(mine), dtype=torch.bool).tril()
        mask[-1, -1] = not (blind and blind[c])
        plain = torch.nn.functional.scaled_dot_product_attention(*parts, attn_mask=mask)
        torch.testing.assert_close(rows[:, first : first + length], plain.transpose(1, 2).flatten(2)[:, start:])
        first += length


@pytest.mark.parametrize(
    ("lengths", "start", "blind"), [((3, 1, 4), 6, ()), ((2, 5), 1, ()), ((1, 1), 2, ()), ((2, 3), 4, (True, False))]
)
def test_attention_of_the_tokens_that_are_read(lengths, start, blind, monkeypatch):
    torch.manual_seed(0)
    block = ResidualAttentionBlock(12, 3, act_layer=QuickGELU).double().requires_grad_(False)
    layout = packed_layout(lengths, start, "cpu", blind)
    x = torch.randn(2 * (start + sum(lengths)), 12, dtype=torch.double, requires_grad=True)
    (ours, theirs), calls = both_ways(lambda x: shared_block(block, x, layout, last=True), x, monkeypatch, packed._EndsAttention)
    assert calls == 1 and ours[0].shape == (2, len(lengths), 12)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


def test_unit_vectors(monkeypatch):
    x = torch.tensor([[3.0, -4.0], [1e-5, 2e-5], [0.0, 0.0]], dtype=torch.double, requires_grad=True)
    (ours, theirs), calls = both_ways(model.unit, x, monkeypatch, model._Unit)
    assert calls == 1
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


def test_a_frozen_mlp(monkeypatch):
    torch.manual_seed(0)
    block = ResidualAttentionBlock(8, 2, act_layer=QuickGELU).double().requires_grad_(False)
    x = torch.randn(5, 8, dtype=torch.double, requires_grad=True)
    (ours, theirs), calls = both_ways(lambda x: blocks._mlp(block, x), x, monkeypatch, blocks._FrozenMLP)
    assert calls == 1
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)
    torch.testing.assert_close(ours[0], block.mlp(x))


def test_weights_that_learn_are_not_frozen():
    block = ResidualAttentionBlock(8, 2, act_layer=QuickGELU).requires_grad_(False)
    block.mlp.c_proj.bias.requires_grad_()
    blocks._mlp(block, torch.randn(5, 8, requires_grad=True)).sum().backward()
    assert torch.equal(block.mlp.c_proj.bias.grad, torch.full((8,), 5.0))


def test_autocast_chooses_types_itself():
    x = torch.ones(2, requires_grad=True)
    assert blocks.by_hand(x) and not blocks.by_hand(x.detach())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not blocks.by_hand(x)
    with torch.no_grad():
        assert not blocks.by_hand(x)


def test_a_second_derivative_is_refused_and_not_wrong():
    block = ResidualAttentionBlock(8, 2, act_layer=QuickGELU).requires_grad_(False)
    x = torch.randn(5, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(blocks._mlp(block, x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
