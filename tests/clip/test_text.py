"""The prefix-shared text tower against the plain pass at full length."""

from __future__ import annotations

from collections.abc import Hashable

import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from promptmix.clip import TextTower, Tokenizer
from promptmix.clip.packed import packing
from promptmix.clip.reference import encode_plain
from promptmix.clip.tokens import find
from promptmix.errors import ConfigError

WORDS = ["dog", "sea lion", "red double-decker bus", "itap", "a", "pine_tree", "Cessna 172", "crème brûlée", "o'clock"]
TOKENIZER = Tokenizer()


def tower(quick_gelu: bool = True, causal: bool = True, layers: int = 3) -> TextTower:
    torch.manual_seed(0)
    text = {"context_length": 40, "width": 32, "heads": 2, "layers": layers, "no_causal_mask": not causal}
    vision = {"image_size": 8, "layers": 1, "width": 64, "patch_size": 8}
    model = open_clip.CLIP(24, vision, text, quick_gelu=quick_gelu)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2)
    return TextTower(model, TOKENIZER).requires_grad_(False)


SHARED = {gelu: tower(gelu) for gelu in (True, False)}


def test_every_byte_has_a_word_of_its_own():
    """Halves of letters in UTF-8 too, which a replacement character would make all the same."""
    # Single bytes, before more of a word and at its end; white space has none.
    words = list(filter(None, map(TOKENIZER.word, range(512))))
    assert TOKENIZER.word(320) == "a" and TOKENIZER.word(187) == "\\xff-"
    assert len(set(words)) == len(words) > 500


@settings(max_examples=60, deadline=None)
@given(
    names=st.lists(st.sampled_from(WORDS), min_size=1, max_size=6),
    experts=st.integers(1, 3),
    before=st.integers(0, 5),
    after=st.integers(0, 4),
    class_specific=st.booleans(),
    stop=st.booleans(),
    depth=st.integers(0, 3),
    quick_gelu=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_equals_plain_pass(names, experts, before, after, class_specific, stop, depth, quick_gelu, seed):
    text = SHARED[quick_gelu]
    generator = torch.Generator().manual_seed(seed)
    middle = (len(names),) if class_specific else ()
    contexts = [torch.randn(experts, *middle, m, 32, generator=generator) for m in (before, after)]
    # Deep prompts replace positions that all classes share, so they need a generic context in front.
    replaced = 0 if class_specific else before
    deep = {layer: torch.randn(experts, replaced, 32, generator=generator) for layer in range(1, depth)} if replaced else {}
    end = text.embed(TOKENIZER.encode("." if stop else ""))[None]
    weight = torch.randn(experts, len(names), 24, generator=generator)

    def run(encode):
        learned = [part.clone().requires_grad_() for part in (*contexts, *deep.values())]
        prompts = text.compose(learned[0], TOKENIZER.class_tokens(names), learned[1], end)
        features = encode(prompts, dict(zip(deep, learned[2:], strict=True)))
        normal = torch.nn.functional.normalize(features, dim=-1)
        gradients = torch.autograd.grad((normal * weight).sum(), learned, allow_unused=True)
        return features.detach(), [torch.zeros(0) if g is None else g for g in gradients]

    ours, gradients = run(text)
    plain, expected = run(lambda prompts, deep: encode_plain(text, prompts, deep))
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    for gradient, reference in zip(gradients, expected, strict=True):
        largest = float(reference.abs().max()) if reference.numel() else 1.0
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-4 * largest)


def test_hard_prompts_equal_open_clip():
    vision = {"image_size": 8, "layers": 1, "width": 64, "patch_size": 8}
    model = open_clip.CLIP(24, vision, {"width": 32, "heads": 2, "layers": 2})
    text = TextTower(model, TOKENIZER)
    templates = ["a photo of a {}, a type of animal.", "{} texture.", "itap of my {}."]
    for template in templates:
        ids = open_clip.tokenize([template.format(word.replace("_", " ")) for word in WORDS])
        with torch.no_grad():
            torch.testing.assert_close(text(text.compose_text(template, WORDS))[0], model.encode_text(ids), rtol=1e-5, atol=1e-5)


def test_fewer_flops_than_plain():
    from torch.utils.flop_counter import FlopCounterMode

    text = SHARED[True]
    prompts = text.compose(torch.randn(1, 4, 32), TOKENIZER.class_tokens(["dog", "cat"] * 10))
    counts = []
    for encode in (text, lambda prompts: encode_plain(text, prompts)):
        with FlopCounterMode(display=False) as counter:
            encode(prompts)
        counts.append(counter.get_total_flops())
    assert counts[0] * 15 < counts[1]


def test_tower_without_causal_mask_takes_the_plain_pass():
    text = tower(causal=False)
    assert not text.shares_prefix
    prompts = text.compose(torch.randn(2, 4, 32), TOKENIZER.class_tokens(["dog", "sea lion"]))
    torch.testing.assert_close(text(prompts), encode_plain(text, prompts))


def test_bf16_autocast_stays_near_fp32():
    text = SHARED[True]
    prompts = text.compose(torch.randn(1, 4, 32), TOKENIZER.class_tokens(WORDS))
    with torch.autocast("cpu", torch.bfloat16):
        low = text(prompts)
    cosine = torch.nn.functional.cosine_similarity(low.float(), text(prompts), dim=-1)
    assert cosine.min() > 0.995


def test_too_long_a_prompt_is_refused():
    with pytest.raises(ConfigError, match=r"reads 40.*shorten"):
        SHARED[True].compose(torch.randn(1, 39, 32), TOKENIZER.class_tokens(["dog"]))


def test_deep_prompts_without_room_are_refused():
    text = SHARED[True]
    prompts = text.compose(torch.randn(1, 2, 32), TOKENIZER.class_tokens(["dog"]))
    with pytest.raises(ConfigError, match="3 positions"):
        text(prompts, {1: torch.randn(1, 3, 32)})


def test_class_name_without_tokens_is_refused():
    with pytest.raises(ConfigError, match="no tokens"):
        TOKENIZER.class_tokens(["dog", " "])


@pytest.mark.parametrize("limit", [1, 20, 60])
@pytest.mark.parametrize("depth", [1, 3])
def test_portions_change_no_number(limit, depth, monkeypatch):
    """Without a graph, experts and classes go through in portions of at most so many tokens."""
    text, sizes = SHARED[True], []
    context = torch.randn(5, 3, 32)
    deep = {layer: torch.randn(experts, 2, 32) for layer, experts in zip(range(1, depth), (5, 1), strict=False)}
    prompts = text.compose(context, TOKENIZER.class_tokens(WORDS))
    whole = text(prompts, deep)
    encode = text._encode_shared
    monkeypatch.setattr("promptmix.clip.text._TOKENS_PER_THREAD", limit)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(text, "_encode_shared", lambda some, deep: sizes.append(some.tail.shape[:2]) or encode(some, deep))
    with torch.no_grad():
        torch.testing.assert_close(text(prompts, deep), whole)
    assert len(sizes) > 1 and sum(experts * tokens for experts, tokens in sizes) == 5 * prompts.tail.shape[1]


def test_adapters_and_hooks_that_come_later_are_run():
    text = tower()
    prompts = text.compose(torch.randn(1, 3, 32), TOKENIZER.class_tokens(WORDS))
    before, seen = text(prompts), []
    handle = text.blocks[1].mlp.register_forward_hook(lambda *args: seen.append(1))
    torch.testing.assert_close(text(prompts), before)
    assert seen == [1]
    handle.remove()
    text.blocks[0].mlp.append(torch.nn.Dropout(0.0))
    text.blocks[2].mlp.append(torch.nn.Identity())
    torch.testing.assert_close(text(prompts), encode_plain(text, prompts))
    text.blocks[2].mlp.append(torch.nn.Linear(32, 32))
    assert (text(prompts) - before).abs().max() > 1e-3


def test_many_class_names_cost_no_more_each_than_few():
    rows, lengths = packing((("shared", 1), ("names", 0)), (1,) * 50_000, "cpu")  # with their square it takes half a minute
    assert rows[-2:].tolist() == [0, 50_000] and lengths == (2,) * 50_000
    tables: dict[Hashable, int] = {}
    for number in range(100_000):
        find(tables, number, lambda number=number: number, size=65536)
    assert len(tables) <= 65536 and tables[99_999] == 99_999
