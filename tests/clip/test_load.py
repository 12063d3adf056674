"""Loading backbones: files of every kind, and what goes wrong."""

from __future__ import annotations

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from promptmix.clip import load_clip
from promptmix.clip.load import COOP_NAMES, openai_config, read_weights
from promptmix.config import get_cfg_default
from promptmix.errors import RegistryError, WeightsError
from promptmix.plugin_manager import get_plugin_manager
from tests.clip.relatives import StandIn, build, shrink
from tests.trainers.golden import seeded


@pytest.fixture(scope="module")
def state():
    """A small ViT in OpenAI's layout, with values that float16 can't hold."""
    torch.manual_seed(0)
    vision = {"image_size": 16, "layers": 2, "width": 64, "patch_size": 8}
    model = open_clip.CLIP(32, vision, {"width": 64, "heads": 1, "layers": 2, "vocab_size": 49408}, quick_gelu=True)
    return {name: value.clone() for name, value in model.state_dict().items()}


def cfg(name="ViT-B/16", **backbone):
    get_plugin_manager()
    tree = get_cfg_default()
    tree.MODEL.BACKBONE.NAME = name
    for key, value in backbone.items():
        tree.MODEL.BACKBONE[key] = str(value) if key == "WEIGHTS" else value
    return tree


@pytest.mark.parametrize("kind", ["safetensors", "pt", "wrapped"])
def test_local_file_keeps_full_precision(kind, state, tmp_path):
    path = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pt")
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}} if kind == "wrapped" else state, path)
    clip = load_clip(cfg(WEIGHTS=path))
    assert torch.equal(clip.text.token_embedding.weight, state["token_embedding.weight"])
    assert (clip.embed_dim, clip.image_size, clip.text.width) == (32, 16, 64)
    assert not any(parameter.requires_grad for parameter in clip.parameters())


def test_openai_config_reads_sizes_from_resnets_too():
    model = open_clip.CLIP(
        32, {"image_size": 64, "layers": [1, 2, 1, 1], "width": 8, "patch_size": None}, {"width": 64, "heads": 1, "layers": 2}
    )
    config = openai_config(model.state_dict())
    assert config["vision_cfg"]["layers"] == [1, 2, 1, 1]
    open_clip.CLIP(**config).load_state_dict(model.state_dict())


def test_golden_weights_imply_their_sizes():
    shapes = {name: torch.from_numpy(value) for name, value in seeded().state_dict().items()}
    config = openai_config(shapes)
    assert config["vision_cfg"] == {"layers": 3, "width": 768, "patch_size": 16, "image_size": 64}


def test_coop_names_are_quick_gelu_and_other_names_what_open_clip_says():
    quick = load_clip(cfg("ViT-B/32", PRETRAINED=False)).text.blocks[0].mlp.gelu
    plain = load_clip(cfg("ViT-B-32", PRETRAINED=False, TAG="laion2b_s34b_b79k")).text.blocks[0].mlp.gelu
    assert (type(quick).__name__, type(plain).__name__) == ("QuickGELU", "GELU")
    assert set(COOP_NAMES) >= {"RN50", "RN101", "ViT-B/32", "ViT-B/16", "ViT-L/14"}


def test_a_file_with_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("code ran",)

    torch.save({"weight": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(WeightsError, match="not a file of plain tensors"):
        read_weights(tmp_path / "evil.pt")


@pytest.mark.parametrize(
    ("tree", "error", "words"),
    [
        (dict(name="ViT-B/17"), RegistryError, "did you mean 'ViT-B/16'"),
        (dict(WEIGHTS="nowhere.pt"), WeightsError, "no such file"),
        (dict(name="ViT-B-16", TAG="laion5b"), WeightsError, "not a pretrained tag of ViT-B-16"),
        (dict(name="ViT-B-16", TOKENIZER="here"), WeightsError, "uses CLIP's own tokenizer; leave it out"),
    ],
)
def test_mistakes(tree, error, words):
    with pytest.raises(error, match=words):
        load_clip(cfg(**tree))


def test_weights_of_another_model(state, tmp_path):
    save_file({k: v for k, v in state.items() if "ln_final" in k or "token_embedding" in k}, tmp_path / "part.safetensors")
    with pytest.raises(WeightsError, match=r"don't fit .*architecture"):
        load_clip(cfg(WEIGHTS=tmp_path / "part.safetensors"))


def test_failed_download_says_what_to_do(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(open_clip, "create_model", offline)
    with pytest.raises(WeightsError, match=r"can't be downloaded.*elsewhere and set MODEL.BACKBONE.WEIGHTS.*tiny-en"):
        load_clip(cfg())


def test_a_tokenizer_of_hugging_face(monkeypatch):
    """The library may be missing, or the files; with both, SigLIP loads, with its one tag, colours and bias."""
    given = []

    def missing(*args, **kwargs):
        raise ImportError("No module named 'transformers'")

    def offline(*args, **kwargs):
        raise OSError("no network")

    def stand_in(name, **kwargs):
        given.append((name, kwargs))
        return StandIn("SigLIP")

    settings = cfg("ViT-B-16-SigLIP", PRETRAINED=False)
    for tokenizer, words in ((missing, r"pip install 'promptmix\[hf\]'"), (offline, r"MODEL.BACKBONE.TOKENIZER to a folder")):
        monkeypatch.setattr("open_clip.tokenizer.HFTokenizer", tokenizer)
        with pytest.raises(WeightsError, match=words):
            load_clip(settings)
    monkeypatch.setattr("open_clip.tokenizer.HFTokenizer", stand_in)
    model = build(shrink("ViT-B-16-SigLIP"))
    monkeypatch.setattr(open_clip, "create_model", lambda *args, **kwargs: model)
    clip = load_clip(cfg("ViT-B-16-SigLIP", TOKENIZER="folder"))
    assert given == [("folder", {"context_length": 64, "clean": "canonicalize"})]
    assert clip.mean == (0.5, 0.5, 0.5) and clip.bias is not None and clip.tokenizer.pad == 1
