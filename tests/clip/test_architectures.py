"""Every architecture that open_clip lists, as its smallest relative: what we compute against open_clip's own layers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any

import open_clip
import pytest
import torch
from open_clip.timm_model import TimmModel
from timm.models.eva import Eva
from torch import Tensor, nn
from torch.nn import functional as F

from promptmix.clip import CLIP, PromptStep
from promptmix.clip.encoder import EncoderTower
from promptmix.clip.reference import encode_plain
from promptmix.clip.tokens import Tokenizer
from promptmix.clip.ways import all_ways, way_of
from promptmix.errors import ConfigError
from tests.clip import relatives

NAMES = ["dog", "sea lion", "red double decker bus"]
WAYS = {way.name: way for way in all_ways()}


SHRUNK = {name: relatives.shrink(name) for name in open_clip.list_models()}


def groups(*parts: str) -> dict[str, list[str]]:
    """Architectures whose cut-down configs are the same in ``parts``: many differ in size alone."""
    found: dict[str, list[str]] = {}
    for name, config in SHRUNK.items():
        found.setdefault(json.dumps([config.get(part) for part in parts], sort_keys=True), []).append(name)
    # The one that is built is one that needs no library more, where there is one.
    return {min(names, key=lambda name: "hf_model_name" in SHRUNK[name]["text_cfg"]): names for names in found.values()}


TEXTS = groups("text_cfg", "multimodal_cfg", "quick_gelu", "custom_text", "init_logit_bias")
PICTURES = groups("vision_cfg", "quick_gelu")


def make(name: str) -> tuple[Any, CLIP]:
    config = SHRUNK[name]
    if config["text_cfg"].get("hf_model_name") and find_spec("transformers") is None:
        pytest.skip("needs transformers (the extra hf)")
    model = relatives.build(config)
    size = config["vision_cfg"]["image_size"]
    tokenizer = relatives.tokenizer_of(config["text_cfg"])
    return model, CLIP(model, tokenizer, name, mean=(0.5,) * 3, std=(0.5,) * 3, image_size=size)


@pytest.fixture(params=TEXTS, scope="module")
def text(request) -> tuple[Any, CLIP]:
    return make(request.param)


@pytest.fixture(params=PICTURES, scope="module")
def picture(request) -> tuple[Any, CLIP]:
    return make(request.param)


def close(ours: Tensor, expected: Tensor) -> None:
    largest = max(float(expected.abs().max()), 1e-3)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=2e-5 * largest)


def with_gradients(encode: Callable[..., Tensor], learned: list[Tensor]) -> list[Tensor]:
    learned = [part.clone().requires_grad_() for part in learned]
    features = encode(*learned)
    weight = torch.randn(features.shape, generator=torch.Generator().manual_seed(3))
    return [features.detach(), *torch.autograd.grad((F.normalize(features, dim=-1) * weight).sum(), learned)]


def encode_ids(model: Any, ids: Tensor) -> Tensor:
    features = model.encode_text(ids) if not hasattr(model, "text_decoder") else model.encode_text(ids, normalize=False)
    return features[0] if isinstance(features, tuple) else features


def token_ids(clip: CLIP, middle: list[tuple[int, ...]]) -> Tensor:
    tower = clip.text
    rows = torch.full((len(middle), tower.context_length), tower.tokenizer.pad)
    for row, ids in zip(rows, middle, strict=True):
        filled = [*tower.tokenizer.before, *ids, *tower.tokenizer.after]
        row[: len(filled)] = torch.tensor(filled)
    return rows


@contextmanager
def replaced(module: nn.Module, start: int, new: Tensor, *, entering: bool) -> Iterator[None]:
    """Have tokens from ``start`` on replaced in what a module gives, or in what enters it."""

    def put(x: Tensor) -> Tensor:
        rows = new.repeat(len(x) // len(new), 1, 1) if new.dim() == 3 else new.expand(len(x), -1, -1)
        return torch.cat([x[:, :start], rows, x[:, start + new.shape[-2] :]], dim=1)

    def before(module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        return ((put(args[0]), *args[1:]), given) if args else (args, {**given, "hidden_states": put(given["hidden_states"])})

    def after(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return put(out)

    handle = module.register_forward_pre_hook(before, with_kwargs=True) if entering else module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def test_the_list_is_whole():
    assert len(WAYS) == len(open_clip.list_models()) >= 144
    for kind in (TEXTS, PICTURES):
        assert sorted(name for names in kind.values() for name in names) == sorted(WAYS)


def test_the_list_says_how_texts_go(text):
    _, clip = text
    for name in TEXTS[clip.name]:
        assert WAYS[name] == way_of(name, open_clip.get_model_config(name))
        assert WAYS[name].text == clip.text.way
        assert bool(WAYS[name].needs) == (type(clip.tokenizer) is not Tokenizer)
    assert (type(clip.text) is EncoderTower) == bool(SHRUNK[clip.name]["text_cfg"].get("hf_model_name"))


@pytest.mark.parametrize("template", ["a photo of a {}.", "{}"])
def test_hard_prompts(text, template):
    model, clip = text
    ids = token_ids(clip, [clip.tokenizer.encode(template.format(name)) for name in NAMES])
    with torch.no_grad():
        close(clip.text(clip.text.compose_text(template, NAMES))[0], encode_ids(model, ids))
    assert (clip.bias is None) == (getattr(model, "logit_bias", None) is None)


def test_names_in_other_languages(text):
    model, clip = text
    names = ["狗", "Straßenbahn", "собака"]
    if type(clip.tokenizer) is Tokenizer:  # the others are stand-ins here
        names += ["crème_brûlée", "🐶"]
        ids = token_ids(clip, [clip.tokenizer.encode(name.replace("_", " ")) for name in names])
        theirs = open_clip.tokenize([name.replace("_", " ") for name in names])
        assert torch.equal(ids[:, :12], theirs[:, :12]) and ids[:, 12:].max() == 0
    template = "ein Bild: {}，照片"
    ids = token_ids(clip, [clip.tokenizer.encode(template.format(name.replace("_", " "))) for name in names])
    with torch.no_grad():
        close(clip.text(clip.text.compose_text(template, names))[0], encode_ids(model, ids))


@pytest.mark.parametrize("chunk", [0, 2])
def test_learned_contexts_and_deep_prompts(text, chunk, monkeypatch):
    """Features and gradients against open_clip's whole model, whose embeddings and layers are overwritten by hooks."""
    model, clip = text
    tower = clip.text
    monkeypatch.setattr(tower, "class_chunk", chunk)
    context, deep = torch.randn(2, 3, tower.width), torch.randn(2, 2, tower.width)
    by_class = torch.randn(1, len(NAMES), 2, tower.width)
    last = len(tower.blocks) - 1

    def ours(context: Tensor, deep: Tensor) -> Tensor:
        return tower(tower.compose(context, tower.tokenizer.class_tokens(NAMES)), {last: deep} if last else {})

    def theirs(context: Tensor, deep: Tensor) -> Tensor:
        ids = token_ids(clip, [(11, 11, 11, *row) for row in tower.tokenizer.class_tokens(NAMES).ids])
        found = []
        for one, other in zip(context, deep, strict=True):
            inner = replaced(tower.blocks[last], tower.start, other, entering=True) if last else nullcontext()
            with replaced(tower.token_embedding, tower.start, one, entering=False), inner:
                found.append(encode_ids(model, ids))
        return torch.stack(found)

    learned = [context, deep] if last else [context]
    for mine, expected in zip(
        with_gradients(lambda *given: ours(*given, *([] if last else [deep])), learned),
        with_gradients(lambda *given: theirs(*given, *([] if last else [deep])), learned),
        strict=True,
    ):
        close(mine, expected)
    if isinstance(tower, EncoderTower):
        return
    prompts = tower.compose(context, tower.tokenizer.class_tokens(NAMES))
    steps = {0: PromptStep(torch.randn(1, tower.width)), last: PromptStep(by_class, remove=1)}
    close(tower(prompts, steps), encode_plain(tower, prompts, steps))


def test_a_prompt_as_long_as_the_tower_reads(text):
    model, clip = text
    tower = clip.text
    room = tower.context_length - len(tower.tokenizer.before) - len(tower.tokenizer.after)
    names = ["dog", " ".join(["dog"] * room)]
    ids = token_ids(clip, [tower.tokenizer.encode(name) for name in names])
    with torch.no_grad():
        close(tower(tower.compose_text("{}", names))[0], encode_ids(model, ids))
    with pytest.raises(ConfigError, match="shorten"):
        tower.compose_text("{}", [" ".join(["dog"] * (room + 1))])


def test_weights_inside_layers(text):
    _, clip = text
    tower = clip.text
    prompts = tower.compose(torch.randn(1, 2, tower.width), tower.tokenizer.class_tokens(NAMES))
    names = [name for name, p in tower.named_parameters() if p.dim() == 2 and id(p) in {id(q) for q in tower.blocks.parameters()}]
    before = tower(prompts)
    delta = 0.1 * torch.randn_like(tower.get_parameter(names[0]))
    changed = with_gradients(lambda delta: tower(prompts, weights={names[0]: delta}), [delta])
    tower.get_parameter(names[0]).data.add_(delta)
    try:
        close(changed[0], tower(prompts))
    finally:
        tower.get_parameter(names[0]).data.sub_(delta)
    assert (changed[0] - before).abs().max() > 1e-5 and changed[1].abs().max() > 0


def pictures(clip: CLIP) -> Tensor:
    return torch.randn(2, 3, clip.image_size, clip.image_size, generator=torch.Generator().manual_seed(4))


def test_pictures_and_their_patches(picture):
    model, clip = picture
    images = pictures(clip)
    expected = model.visual(images)
    expected = expected[0] if isinstance(expected, tuple) else expected
    close(clip.image(images), expected)
    image, patches = clip.image(images, tokens="patches")
    close(image, expected)
    assert patches.shape[::2] == (2, clip.embed_dim) and patches.isfinite().all()
    assert patches.std(dim=1).max() > 1e-4  # places differ
    for name in PICTURES[clip.name]:
        assert WAYS[name].visual_prompts == clip.image.takes_prompts


def test_weights_go_by_openais_names_in_every_transformer(picture):
    """A branch beside the queries, keys and values, and a norm: as if the products stood in the weights."""
    model, clip = picture
    tower, images = clip.image, pictures(clip)
    if not tower.takes_prompts:
        return
    names = [f"visual.transformer.resblocks.0.attn.{part}.weight" for part in ("q_proj", "k_proj", "v_proj", "out_proj")]
    pairs = [(torch.randn(tower.width, 2), torch.randn(2, tower.width)) for _ in names]
    norm = {"visual.transformer.resblocks.0.ln_1.weight": torch.full((tower.width,), 0.2)}
    added = tower(images, weights=norm | {name: 0.1 * a @ b for name, (a, b) in zip(names, pairs, strict=True)})
    assert (added - tower(images)).abs().max() > 1e-4
    beside = {name: lambda x, a=a, b=b: 0.1 * x @ b.T @ a.T for name, (a, b) in zip(names, pairs, strict=True)}
    block = tower.layers.blocks[0]
    if getattr(getattr(block, "attn", None), "q_bias", None) is not None and block.attn.qkv is not None:
        with pytest.raises(ConfigError, match="not a linear layer that this tower runs on its own"):
            tower(images, weights=beside)  # EVA hands its weights over to a function
        return
    close(tower(images, weights=norm | beside), added)


def test_deep_visual_prompts(picture):
    """Against the network's own forward pass, with tokens put between its layers by hooks."""
    model, clip = picture
    images, tower = pictures(clip), clip.image
    if not tower.takes_prompts:
        with pytest.raises(ConfigError, match="takes no visual prompts"):
            tower(images, {0: PromptStep(torch.randn(1, 8))})
        return
    last = tower.depth - 1
    tokens = [torch.randn(2, tower.width) for _ in range(2 if last else 1)]

    def ours(*tokens: Tensor) -> Tensor:
        steps = {0: PromptStep(tokens[0])} | ({last: PromptStep(tokens[1], remove=2)} if last else {})
        return tower(images, steps)

    for mine, expected in zip(with_gradients(ours, tokens), with_gradients(by_hooks(model, images), tokens), strict=True):
        close(mine, expected)


def by_hooks(model: Any, images: Tensor) -> Callable[..., Tensor]:
    visual = model.visual
    trunk = visual.trunk if isinstance(visual, TimmModel) else None
    blocks = visual.transformer.resblocks if trunk is None else trunk.blocks
    entering = visual.ln_pre if trunk is None else trunk.norm_pre
    # Rotations belong to patches: there, prompts stand among the tokens in front, which turn by nothing.
    at = trunk.num_prefix_tokens if isinstance(trunk, Eva) else None

    def encode(*tokens: Tensor) -> Tensor:
        def add(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x, new = args[0], tokens[0].expand(len(args[0]), -1, -1)
            where = x.shape[1] if at is None else at
            return (torch.cat([x[:, :where], new, x[:, where:]], dim=1), *args[1:])

        def swap(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x, new = args[0], tokens[1].expand(len(args[0]), -1, -1)
            where = x.shape[1] - 2 if at is None else at
            return (torch.cat([x[:, :where], new, x[:, where + 2 :]], dim=1), *args[1:])

        handles = [entering.register_forward_pre_hook(add)]
        if len(tokens) > 1:
            handles.append(blocks[-1].register_forward_pre_hook(swap))
        if at is not None:
            for block in blocks:
                block.attn.num_prefix_tokens += 2
        try:
            features = visual(images)
        finally:
            for handle in handles:
                handle.remove()
            if at is not None:
                for block in blocks:
                    block.attn.num_prefix_tokens -= 2
        return features[0] if isinstance(features, tuple) else features

    return encode
