"""Keys and values beside a layer's tokens: exact against one attention for each group, in both towers and every way through."""

from __future__ import annotations

import pytest
import torch

from promptmix.clip import LayerAction, Memory
from promptmix.clip.reference import plain_towers
from tests.trainers.golden import golden_clip, images

NAMES = ["cat", "red double decker bus", "pine tree"]


def memories(width, shares, generator):
    """A memory for the first and the last of three layers, and the same as a function that attends to one group after another."""
    ours, theirs = {}, {}
    for layer in (0, 2):
        sizes = (0, 1, 3) if shares else (2,)
        tokens = torch.randn(sum(sizes), width, generator=generator, requires_grad=True)
        weights = torch.rand(3, generator=generator).softmax(dim=0) if shares else None

        def attention(attend, tokens=tokens, sizes=sizes, weights=weights):
            heads = [attend(group) if len(group) else attend(None) for group in tokens.split(sizes)]
            return heads[0] if weights is None else sum(w * h for w, h in zip(weights, heads, strict=True))

        ours[layer] = LayerAction(memory=Memory(tokens, sizes, weights))
        theirs[layer] = LayerAction(attention=attention)
    return ours, theirs


def same(encode, ours, theirs):
    results = []
    for actions in (ours, theirs):
        tokens = [a.memory.tokens for a in ours.values()]
        found = encode(actions)
        results.append((found.detach(), torch.autograd.grad(found.square().sum(), tokens)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize("way", ["ours", "plain"])
def test_image_tower(shares, way):
    clip = golden_clip()
    ours, theirs = memories(clip.image.width, shares, torch.Generator().manual_seed(0))

    def encode(actions):
        with plain_towers(clip) if way == "plain" else torch.enable_grad():
            return clip.encode_image(images(), actions=actions)

    same(encode, ours, theirs)
    with torch.no_grad():  # in portions
        torch.testing.assert_close(clip.encode_image(images(), actions=ours), encode(ours).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize("way", ["prefix shared", "plain", "chunks"])
def test_text_tower(shares, way):
    clip = golden_clip()
    tower = clip.text
    tower.class_chunk = 2 if way == "chunks" else 0
    prompts = tower.compose_text("a photo of a {}.", NAMES)
    ours, theirs = memories(tower.width, shares, torch.Generator().manual_seed(0))

    def encode(actions):
        with plain_towers(clip) if way == "plain" else torch.enable_grad():
            return tower(prompts, actions=actions)

    same(encode, ours, theirs)
    with torch.no_grad():
        torch.testing.assert_close(tower(prompts, actions=ours), encode(ours).detach(), rtol=1e-5, atol=1e-5)


def test_shared_prefix_is_kept(monkeypatch):
    """No prompt is laid out at full length."""
    clip = golden_clip()
    ours, _ = memories(clip.text.width, True, torch.Generator().manual_seed(0))
    monkeypatch.setattr(clip.text, "_encode_full", None)
    assert clip.text(clip.text.compose_text("a photo of a {}.", NAMES), actions=ours).shape == (1, 3, 512)


def test_an_empty_memory_is_none():
    clip = golden_clip()
    empty = {layer: LayerAction(memory=Memory(torch.empty(0, clip.image.width), (0,))) for layer in range(3)}
    torch.testing.assert_close(clip.encode_image(images(), actions=empty), clip.encode_image(images()))
