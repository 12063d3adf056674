"""Where methods act inside the towers: weights, actions, steps and class-specific deep tokens, against open_clip's own layers."""

from __future__ import annotations

import copy

import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from promptmix.plugins.prompt_bank.tuned_towers import blocks_of
from torch import Tensor
from torch.nn import functional as F

from promptmix.clip import ImageTower, LayerAction, PromptStep, TextTower, Tokenizer
from promptmix.clip.reference import encode_plain, plain_towers
from promptmix.errors import ConfigError

WORDS = ["dog", "sea lion", "red double-decker bus", "a", "crème brûlée"]
TOKENIZER = Tokenizer()
WIDTH = 32


def clip(quick_gelu: bool = True, causal: bool = True, **vision) -> open_clip.CLIP:
    torch.manual_seed(0)
    text = {"context_length": 40, "width": WIDTH, "heads": 2, "layers": 3, "no_causal_mask": not causal}
    vision = {"image_size": 16, "layers": 3, "width": 64, "patch_size": 8, **vision}
    model = open_clip.CLIP(24, vision, text, quick_gelu=quick_gelu).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.2)
    return model


MODEL = clip()
TEXT = TextTower(MODEL, TOKENIZER)
IMAGE = ImageTower(MODEL.visual)
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def random(*shape: int, seed: int = 0, scale: float = 0.2) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def close(ours, expected):
    largest = max(float(expected.abs().max()), 1e-3)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5 * max(largest, 1.0))


def features_and_gradients(encode, learned: list[Tensor]) -> list[Tensor]:
    learned = [part.clone().requires_grad_() for part in learned]
    features = encode(*learned)
    weight = random(*features.shape, seed=9)
    gradients = torch.autograd.grad((F.normalize(features, dim=-1) * weight).sum(), learned, allow_unused=True)
    return [features.detach(), *(torch.zeros_like(p) if g is None else g for p, g in zip(learned, gradients, strict=True))]


@settings(max_examples=40, deadline=None)
@given(
    names=st.lists(st.sampled_from(WORDS), min_size=2, max_size=5),
    experts=st.integers(1, 2),
    words=st.integers(0, 2),
    class_context=st.booleans(),
    one_for_all=st.booleans(),
    kinds=st.lists(st.sampled_from(["class", "shared", "insert", "insert class", "function", ""]), min_size=2, max_size=2),
    chunk=st.integers(0, 3),
    grad=st.booleans(),
)
def test_steps_equal_the_plain_pass(names, experts, words, class_context, one_for_all, kinds, chunk, grad):
    """Tokens that differ by class, are inserted, or made of what was there: at each layer after a shared or a split start."""
    count, ctx = len(names), 3
    context = random(experts, *([count] if class_context else []), ctx, WIDTH, seed=1)
    given_to = 1 if one_for_all else experts
    made = {"class": (given_to, count, ctx, WIDTH), "insert class": (given_to, count, 2, WIDTH)}
    tokens = [random(*made.get(kind, (given_to, 2, WIDTH)), seed=i) for i, kind in enumerate(kinds)]

    def steps(*tokens: Tensor):
        found = {}
        for layer, (kind, new) in enumerate(zip(kinds, tokens, strict=True), start=1):
            if kind == "function":
                found[layer] = PromptStep(lambda old: 0.3 * old.flip(-2) + 0.7, remove=2)
            elif kind:
                found[layer] = PromptStep(new, remove=0 if "insert" in kind else new.shape[-2])
        return found

    def run(encode):
        def go(context: Tensor, *tokens: Tensor) -> Tensor:
            fixed = TEXT.embed(TOKENIZER.encode("photo of"))[None, :words]
            return encode(TEXT.compose(context, fixed, TOKENIZER.class_tokens(names)), steps(*tokens))

        return features_and_gradients(go, [context, *tokens]) if grad else [go(context, *tokens)]

    TEXT.class_chunk = chunk
    try:
        with torch.set_grad_enabled(grad):
            ours, expected = run(TEXT), run(lambda prompts, deep: encode_plain(TEXT, prompts, deep))
    finally:
        TEXT.class_chunk = 0
    for mine, theirs in zip(ours, expected, strict=True):
        close(mine, theirs)


def test_tokens_by_class_keep_the_prefix_shared_in_front_of_their_layer():
    from torch.utils.flop_counter import FlopCounterMode

    prompts = TEXT.compose(random(1, 4, WIDTH), TOKENIZER.class_tokens(["dog", "cat"] * 10))
    counts = []
    for layers in ({}, {2: random(20, 4, WIDTH)[None]}, {1: random(20, 4, WIDTH)[None]}):
        with FlopCounterMode(display=False) as counter:
            TEXT(prompts, layers)
        counts.append(counter.get_total_flops())
    assert counts[0] < counts[1] < counts[2]


def test_tokens_for_other_classes_are_refused():
    prompts = TEXT.compose(random(1, 4, WIDTH), TOKENIZER.class_tokens(["dog", "cat"]))
    with pytest.raises(ConfigError, match=r"\(1, 3\) prompts and classes, not for \(1, 2\)"):
        TEXT(prompts, {1: random(1, 3, 4, WIDTH)})


TEXT_WEIGHTS = {
    "transformer.resblocks.0.attn.in_proj_weight": (3 * WIDTH, WIDTH),
    "transformer.resblocks.0.attn.in_proj_bias": (3 * WIDTH,),
    "transformer.resblocks.1.attn.q_proj.weight": (WIDTH, WIDTH),
    "transformer.resblocks.1.attn.v_proj.weight": (WIDTH, WIDTH),
    "transformer.resblocks.1.attn.k_proj.bias": (WIDTH,),
    "transformer.resblocks.2.attn.out_proj.weight": (WIDTH, WIDTH),
    "transformer.resblocks.2.ln_1.weight": (WIDTH,),
    "transformer.resblocks.2.ln_2.bias": (WIDTH,),
    "transformer.resblocks.0.mlp.c_fc.weight": (4 * WIDTH, WIDTH),
    "transformer.resblocks.2.mlp.c_proj.bias": (WIDTH,),
    "positional_embedding": (40, WIDTH),
    "ln_final.weight": (WIDTH,),
    "text_projection": (WIDTH, 24),
}


def deltas(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {name: random(*shape, seed=i, scale=0.1) for i, (name, shape) in enumerate(shapes.items())}


def put_into(module: torch.nn.Module, weights: dict[str, Tensor]) -> None:
    """Add deltas to a module's own tensors, the way a reader of the names would."""
    state = module.state_dict()
    for name, delta in weights.items():
        for i, part in enumerate("qkv"):
            if f"attn.{part}_proj." in name:
                rows = state[name.replace(f"{part}_proj.", "in_proj_")]
                rows[i * len(rows) // 3 : (i + 1) * len(rows) // 3] += delta
                break
        else:
            state[name] += delta


@pytest.mark.parametrize("chunk", [0, 2])
@pytest.mark.parametrize("quick_gelu", [True, False])
def test_weights_inside_the_text_tower(chunk, quick_gelu):
    text = TextTower(clip(quick_gelu), TOKENIZER)
    weights = deltas(TEXT_WEIGHTS)
    changed = copy.deepcopy(text)
    put_into(changed, weights)
    context, names = random(2, 3, WIDTH), TOKENIZER.class_tokens(WORDS)
    deep = {1: random(2, 3, WIDTH, seed=5)}

    def ours(context: Tensor, *given: Tensor) -> Tensor:
        return text(text.compose(context, names), deep, weights=dict(zip(weights, given, strict=True)))

    def full(context: Tensor, *given: Tensor) -> Tensor:
        return encode_plain(text, text.compose(context, names), deep, weights=dict(zip(weights, given, strict=True)))

    text.class_chunk = chunk
    found = features_and_gradients(ours, [context, *weights.values()])
    for mine, theirs in zip(found, features_and_gradients(full, [context, *weights.values()]), strict=True):
        close(mine, theirs)
    expected = features_and_gradients(lambda context: encode_plain(changed, changed.compose(context, names), deep), [context])
    close(found[0], expected[0])
    close(found[1], expected[1])
    assert all(gradient.abs().max() > 0 for gradient in found[2:])


@pytest.mark.parametrize("chunk", [0, 2])
def test_a_branch_beside_a_layer_is_its_product_added_to_the_weight(chunk):
    names, prompts = {}, TEXT.compose(random(1, 3, WIDTH), TOKENIZER.class_tokens(WORDS))
    for i, name in enumerate(
        ["attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.in_proj_", "attn.out_proj", "mlp.c_fc", "mlp.c_proj"]
    ):
        name = f"transformer.resblocks.{i % 3}.{name}{'' if name.endswith('_') else '.'}weight"
        rows = TEXT.state_dict().get(name, torch.empty(WIDTH, WIDTH)).shape
        names[name] = (random(rows[0], 2, seed=i), random(2, rows[1], seed=i + 50))
    flat = [part for pair in names.values() for part in pair]

    def run(branch: bool):
        def go(*parts: Tensor) -> Tensor:
            pairs = zip(parts[::2], parts[1::2], strict=True)
            given = [(lambda x, a=a, b=b: x @ b.T @ a.T) if branch else a @ b for a, b in pairs]
            return TEXT(prompts, weights=dict(zip(names, given, strict=True)))

        return features_and_gradients(go, flat)

    TEXT.class_chunk = chunk
    try:
        for mine, theirs in zip(run(True), run(False), strict=True):
            close(mine, theirs)
    finally:
        TEXT.class_chunk = 0


def test_dropout_in_a_branch_is_the_same_when_a_chunk_is_computed_again():
    """Gradients agree with those of finite differences only if the second computation draws what the first drew."""
    text = copy.deepcopy(TEXT).double()
    prompts = text.compose(random(1, 3, WIDTH).double(), TOKENIZER.class_tokens(WORDS))
    text.class_chunk = 2

    def run(matrix: Tensor) -> Tensor:
        torch.manual_seed(3)
        name = "transformer.resblocks.1.attn.v_proj.weight"
        return text(prompts, weights={name: lambda x: F.dropout(x, 0.5) @ matrix.T}).square().sum()

    matrix = random(WIDTH, WIDTH).double().requires_grad_()
    (gradient,) = torch.autograd.grad(run(matrix), matrix)
    step = 1e-6 * random(WIDTH, WIDTH, seed=8, scale=1.0).double()
    with torch.no_grad():
        change = run(matrix + step) - run(matrix - step)
    torch.testing.assert_close(change, 2 * (gradient * step).sum(), rtol=1e-4, atol=1e-9)


IMAGE_WEIGHTS = {
    "visual.transformer.resblocks.0.attn.q_proj.weight": (64, 64),
    "visual.transformer.resblocks.1.ln_1.weight": (64,),
    "visual.transformer.resblocks.2.ln_2.bias": (64,),
    "visual.transformer.resblocks.2.attn.v_proj.bias": (64,),
    "visual.transformer.resblocks.2.mlp.c_fc.weight": (256, 64),
    "visual.class_embedding": (64,),
    "visual.ln_pre.weight": (64,),
    "visual.ln_post.bias": (64,),
    "visual.proj": (64, 24),
}


@pytest.mark.parametrize("tokens", [None, "patches", "values"])
@pytest.mark.parametrize("way", ["fast", "plain"])
def test_weights_inside_the_image_tower(tokens, way):
    weights = deltas(IMAGE_WEIGHTS)
    changed = copy.deepcopy(IMAGE)
    put_into(changed, weights)

    def run(tower: ImageTower, given: dict[str, Tensor] | None) -> Tensor:
        if tokens is None:
            return tower(IMAGES, {1: PromptStep(prompt)}, weights=given)
        image, patches = tower(IMAGES, {1: PromptStep(prompt)}, weights=given, tokens=tokens)
        return torch.cat([image[:, None], patches], dim=1)

    prompt = random(2, 64)
    tower = copy.deepcopy(IMAGE)
    tower.skips_unread = way == "fast"
    found = features_and_gradients(lambda *given: run(tower, dict(zip(weights, given, strict=True))), list(weights.values()))
    close(found[0], run(changed, None))
    assert all(gradient.abs().max() > 0 for gradient in found[1:])


def test_weights_of_a_resnet_are_changed_and_its_places_read():
    tower = ImageTower(clip(layers=[1, 1, 1, 1], width=8, patch_size=None, image_size=64).visual)
    images = torch.randn(2, 3, 64, 64)
    name = "visual.attnpool.c_proj.weight"
    changed = copy.deepcopy(tower)
    put_into(changed, {name: torch.full((24, 256), 0.1)})
    for kind in ("patches", "values"):
        image, tokens = tower(images, weights={name: torch.full((24, 256), 0.1)}, tokens=kind)
        close(image, changed.visual(images))
        close(tokens, changed(images, tokens=kind)[1])
        assert tokens.shape == (2, 4, 24)
    blocks = blocks_of(tower)  # what "from block 4 on" means for tuned towers
    assert blocks[4] is tower.visual.attnpool and blocks[:4] == [getattr(tower.visual, f"layer{i}") for i in range(1, 5)]
    with pytest.raises(ConfigError, match=r"c_proj.weight' a function, but it is not a linear layer"):
        tower(images, weights={name: lambda x: x})


def test_weights_that_name_nothing_are_refused():
    prompts = TEXT.compose(random(1, 3, WIDTH), TOKENIZER.class_tokens(WORDS))
    for name in ("transformer.resblocks.3.ln_1.weight", "visual.proj", "token_embedding.weight"):
        with pytest.raises(ConfigError, match=rf"weights name '{name}'.*text tower"):
            TEXT(prompts, weights={name: torch.zeros(())})
    with pytest.raises(ConfigError, match="functions stand beside"):
        TEXT(prompts, weights={"transformer.resblocks.0.ln_1.bias": lambda x: x})
    with pytest.raises(ConfigError, match="layers 0 to 2"):
        IMAGE(IMAGES, actions={3: LayerAction()})


def test_patch_features_are_the_tokens_through_norm_and_projection():
    prompts = {0: PromptStep(random(2, 64))}
    image, patches = IMAGE(IMAGES, prompts, tokens="patches")
    close(image, IMAGE(IMAGES, prompts))
    states = IMAGE.states(IMAGES, prompts)
    assert states.patches.shape == (2, 4, 64) and states.prompts.shape == (2, 2, 64)
    close(IMAGE.project(IMAGE.norm(states.first)), image)
    close(IMAGE.project(IMAGE.norm(states.patches)), patches)
    visual = IMAGE.visual
    tokens = visual.transformer(visual._embeds(IMAGES))
    close(IMAGE(IMAGES, tokens="patches")[1], visual.ln_post(tokens[:, 1:]) @ visual.proj)


def test_values_leave_attention_out_of_the_last_layer():
    visual = IMAGE.visual
    x = visual._embeds(IMAGES)
    for block in visual.transformer.resblocks[:-1]:
        x = block(x)
    block = visual.transformer.resblocks[-1]
    weight, bias = block.attn.in_proj_weight[128:], block.attn.in_proj_bias[128:]
    v = block.attn.out_proj(F.linear(block.ln_1(x), weight, bias)) + x
    v = v + block.mlp(block.ln_2(v))
    image, values = IMAGE(IMAGES, tokens="values")
    close(values, visual.ln_post(v[:, 1:]) @ visual.proj)
    close(image, IMAGE(IMAGES))


def adapter(seed: int) -> LayerAction:
    """MMA's shape: from the block's input, added behind the MLP."""
    down, up = random(4, WIDTH, seed=seed), random(WIDTH, 4, seed=seed + 1)
    return LayerAction(after=lambda x, out: out + F.relu(x @ down.T) @ up.T, per_token=True)


@pytest.mark.parametrize("chunk", [0, 2])
def test_actions_on_each_token_keep_the_prefix_shared(chunk, monkeypatch):
    scale = random(WIDTH, seed=4).exp()
    every = LayerAction(before=lambda x: x * scale, normed=lambda h: h + 0.1, hidden=lambda u: u * 1.1, per_token=True)
    actions = {0: adapter(1), 1: every, 2: adapter(3)}
    prompts = TEXT.compose(random(2, 3, WIDTH), TOKENIZER.class_tokens(WORDS))
    expected = encode_plain(TEXT, prompts, {1: random(2, 2, WIDTH)}, actions=actions)
    monkeypatch.setattr(TEXT, "_encode_full", None)
    monkeypatch.setattr(TEXT, "class_chunk", chunk)
    close(TEXT(prompts, {1: random(2, 2, WIDTH)}, actions=actions), expected)
    with torch.no_grad():
        close(TEXT(prompts, {1: random(2, 2, WIDTH)}, actions=actions), expected)


def test_actions_across_tokens_see_the_whole_sequence():
    """LwEIB's shape: a convolution along all 40 positions, padding included."""
    kernel, shapes = random(WIDTH, 1, 3), []

    def convolve(h: Tensor) -> Tensor:
        shapes.append(h.shape)
        flat = h.flatten(0, -3).transpose(1, 2)
        return h + F.conv1d(flat, kernel, padding=1, groups=WIDTH).transpose(1, 2).view_as(h)

    prompts = TEXT.compose(random(2, 3, WIDTH), TOKENIZER.class_tokens(WORDS))
    found = TEXT(prompts, actions={1: LayerAction(normed=convolve)})
    assert shapes == [(2, 5, 40, WIDTH)]
    x, ends = TEXT.pad(prompts)
    x = (x + TEXT.positional_embedding).flatten(0, 1)
    for i, block in enumerate(TEXT.blocks):
        h = block.ln_1(x)
        h = convolve(h[:, None])[:, 0] if i == 1 else h
        x = x + block.attn(h, h, h, need_weights=False, attn_mask=TEXT.attn_mask)[0]
        x = x + block.mlp(block.ln_2(x))
    x = TEXT.ln_final(x).unflatten(0, (2, 5))
    expected = torch.stack([x[:, c, end] for c, end in enumerate(ends)], dim=1) @ TEXT.text_projection
    close(found, expected)


@pytest.mark.parametrize("tower", ["text", "image"])
def test_extra_keys_and_values_are_gone_after_the_layer(tower):
    """DPL's shape: tokens that all others see in one layer."""
    width = WIDTH if tower == "text" else 64
    extra = random(2, width, seed=7)
    block = (TEXT.blocks if tower == "text" else IMAGE.visual.transformer.resblocks)[1]
    seen = []

    def attend(own):
        seen.append(own(None))
        return 0.4 * own(None) + 0.6 * own(extra)

    actions = {1: LayerAction(attention=attend)}
    prompts = TEXT.compose(random(1, 3, width), TOKENIZER.class_tokens(["dog"])) if tower == "text" else None
    found = TEXT(prompts, actions=actions) if prompts else IMAGE(IMAGES, actions=actions)

    if prompts:
        x, ends = TEXT.pad(prompts)
        x = (x + TEXT.positional_embedding).flatten(0, 1)
        mask, blocks = TEXT.attn_mask, TEXT.blocks
    else:
        x, mask, blocks = IMAGE.visual._embeds(IMAGES), None, IMAGE.visual.transformer.resblocks
    for layer in blocks:
        h = layer.ln_1(x)
        mixed = layer.attn(h, h, h, need_weights=False, attn_mask=mask)[0]
        if layer is block:
            keys = torch.cat([h, layer.ln_1(extra).expand(len(h), -1, -1)], dim=1)
            wider = None if mask is None else F.pad(mask, (0, 2))
            mixed = 0.4 * mixed + 0.6 * layer.attn(h, keys, keys, need_weights=False, attn_mask=wider)[0]
        x = x + mixed
        x = x + layer.mlp(layer.ln_2(x))
    if prompts:
        close(found[0], TEXT.ln_final(x)[:, int(ends)] @ TEXT.text_projection)
    else:
        close(found, IMAGE.visual.ln_post(x[:, 0]) @ IMAGE.visual.proj)
    assert seen


def test_actions_in_the_image_tower_by_hand():
    mix = random(64, 64)
    actions = {
        0: LayerAction(after=lambda x, out: out + x @ mix, per_token=True),
        2: LayerAction(before=lambda x: x + x.mean(dim=1, keepdim=True)),
    }
    found = IMAGE(IMAGES, actions=actions)
    visual = IMAGE.visual
    x = visual._embeds(IMAGES)
    first, second, third = visual.transformer.resblocks
    x = second(first(x) + x @ mix)
    x = third(x + x.mean(dim=1, keepdim=True))
    close(found, visual.ln_post(x[:, 0]) @ visual.proj)
    with plain_towers(IMAGE):
        close(IMAGE(IMAGES, actions=actions), found)


def test_layers_of_another_make_take_tensors_and_what_stands_around_them():
    class Another(open_clip.transformer.ResidualAttentionBlock):
        pass

    text = TextTower(clip(), TOKENIZER)
    expected_of = copy.deepcopy(text)
    for block in text.blocks:
        block.__class__ = Another
    weights = deltas({name: shape for name, shape in TEXT_WEIGHTS.items() if "resblocks.1" in name})
    prompts = text.compose(random(1, 3, WIDTH), TOKENIZER.class_tokens(WORDS))
    actions = {0: adapter(1)}
    close(text(prompts, weights=weights, actions=actions), expected_of(prompts, weights=weights, actions=actions))
    with pytest.raises(ConfigError, match=r"'attn.v_proj.weight' a function, but it is not a linear layer"):
        text(prompts, weights={"transformer.resblocks.1.attn.v_proj.weight": lambda x: x})
    with pytest.raises(ConfigError, match=r"Another.*not CLIP's own, so hidden can't"):
        text(prompts, actions={0: LayerAction(hidden=lambda u: u)})
