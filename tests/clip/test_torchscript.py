"""OpenAI's archives without TorchScript's loader: the same tensors as it gives, and none of what it runs."""

from __future__ import annotations

import io
import os
import pickletools
import struct
import warnings
import zipfile

import open_clip
import pytest
import torch
from torch import Tensor, nn

from promptmix.clip.load import load_clip, read_weights
from promptmix.clip.torchscript import read_torchscript
from promptmix.config import get_cfg_default
from promptmix.errors import WeightsError
from promptmix.files.pickles import Refused
from promptmix.plugin_manager import get_plugin_manager

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:.*TracerWarning")


class Attributes(nn.Module):
    """Everything that may stand beside tensors."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 3).half()
        self.register_buffer("kept", torch.arange(4))
        self.register_buffer("dropped", torch.ones(2), persistent=False)
        self.plain = torch.zeros(3)
        self.numbers, self.named, self.pair = [1, 2], {"a": 1.0}, (1, "b")
        self.text, self.nothing, self.place = "x", None, torch.device("cpu")
        self.listed = [torch.ones(1)]
        self.input_resolution = nn.Parameter(torch.tensor(224), requires_grad=False)
        self.norm = nn.BatchNorm2d(3)
        self.attention = nn.MultiheadAttention(4, 2)
        self.shared = self.linear

    def forward(self, x: Tensor) -> Tensor:
        return x + self.kept + self.plain[0] + len(self.numbers) + len(self.named) + len(self.listed) + self.input_resolution


class Block(nn.Module):
    """One level of a deep nest."""

    def __init__(self, depth):
        super().__init__()
        self.weight = nn.Parameter(torch.full((2,), float(depth)))
        self.below = Block(depth - 1) if depth else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.below(x * self.weight)


class Image(nn.Module):
    """open_clip's model, as a function of a picture."""

    def __init__(self, model):
        super().__init__()
        self.visual, self.logit_scale = model.visual, model.logit_scale

    def forward(self, x: Tensor) -> Tensor:
        return self.visual(x) * self.logit_scale


def small_clip():
    torch.manual_seed(0)
    vision = {"image_size": 16, "layers": 2, "width": 64, "patch_size": 8}
    return open_clip.CLIP(32, vision, {"width": 64, "heads": 1, "layers": 2, "vocab_size": 49408}, quick_gelu=True)


def traced(module, *inputs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(module.eval(), inputs, check_trace=False)


def saved(program, path):
    program.save(str(path))
    return path


MADE = {
    "attributes": lambda: torch.jit.script(Attributes()),
    "half": lambda: torch.jit.script(Attributes().half()),
    "deep": lambda: torch.jit.script(Block(25)),
    "traced": lambda: traced(Image(small_clip()), torch.rand(1, 3, 16, 16)),
    "frozen tower": lambda: torch.jit.script(
        nn.Sequential(*(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)) for _ in range(30)))
    ),
}


@pytest.mark.parametrize("make", MADE.values(), ids=list(MADE))
def test_the_same_tensors_as_torchscript_gives(make, tmp_path):
    path = saved(make(), tmp_path / "archive.pt")
    expected = torch.jit.load(path).state_dict()
    found = read_torchscript(path)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype and not found[name].requires_grad


class Whole(nn.Module):
    """A CLIP as OpenAI saved it: both towers, fp16, with the three numbers that are no weights; and the mask, as of open_clip."""

    def __init__(self, model):
        super().__init__()
        for name, child in model.named_children():
            setattr(self, name, child)
        self.positional_embedding, self.text_projection = model.positional_embedding, model.text_projection
        self.logit_scale = model.logit_scale
        for name, number in (("input_resolution", 16), ("context_length", 77), ("vocab_size", 49408)):
            self.register_buffer(name, torch.tensor(number))
        self.register_buffer("attn_mask", model.attn_mask)

    def forward(self, x: Tensor) -> Tensor:
        used = (self.positional_embedding, self.text_projection, self.token_embedding.weight)
        numbers = self.input_resolution + self.context_length + self.vocab_size
        return self.visual(x) * self.logit_scale + sum(part.sum() for part in used) + numbers + self.ln_final.weight.sum()


def test_a_clip_from_an_archive(tmp_path):
    model = small_clip()
    program = traced(Whole(model), torch.rand(1, 3, 16, 16))
    path = saved(program.half(), tmp_path / "ViT.pt")
    get_plugin_manager()
    cfg = get_cfg_default()
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.WEIGHTS = "ViT-B/16", str(path)
    clip = load_clip(cfg)
    own = model.half().float().state_dict()
    assert torch.equal(clip.text.token_embedding.weight, own["token_embedding.weight"])
    assert torch.equal(clip.image.visual.conv1.weight, own["visual.conv1.weight"])
    assert (clip.embed_dim, clip.image_size) == (32, 16)


class Restores(nn.Module):
    """A module whose archive runs code as soon as TorchScript loads it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.path = "exploded"

    @torch.jit.export
    def __getstate__(self):
        return (self.path, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]):
        self.path, self.training = state[0], state[1]
        self.weight = torch.from_file(state[0], shared=True, size=4)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def test_what_an_archive_runs_when_torchscript_loads_it_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = saved(torch.jit.script(Restores()), tmp_path / "evil.pt")
    torch.jit.load(path)
    assert (tmp_path / "exploded").is_file()  # the danger is real
    os.remove("exploded")
    with pytest.raises(WeightsError, match=r"evil.pt: not a file of plain tensors .it sets a state that is not a dict") as error:
        read_weights(path)
    assert not (tmp_path / "exploded").exists() and "\n" not in str(error.value)


def test_the_loaders_of_torch_are_never_called(tmp_path, monkeypatch):
    script, plain = saved(torch.jit.script(Block(2)), tmp_path / "script.pt"), tmp_path / "plain.pt"
    torch.save({"state_dict": Block(2).state_dict()}, plain)

    def called(*args, **kwargs):
        raise AssertionError("it was")

    for name in ("torch.load", "torch.jit.load", "torch._C.import_ir_module", "torch._C.PyTorchFileReader"):
        monkeypatch.setattr(name, called)
    assert set(read_weights(script)) == set(read_weights(plain)) == {"weight", "below.weight", "below.below.weight"}


def with_pickle(path, source, data):
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, data if info.filename.endswith("/data.pkl") else old.read(info.filename))
    return path


def module(content):
    """A pickle of a module with these attributes."""
    return b"c__torch__\nA\n)\x81}(" + content + b"ub"


def word(text):
    return b"X" + struct.pack("<I", len(text)) + text.encode()


HOSTILE = {
    "a call": module(word("a") + b"cposix\nsystem\n" + word("touch exploded") + b"\x85R"),
    "a module in itself": b"c__torch__\nA\n)\x81q\x00}(" + word("a") + b"h\x00ub",
    "modules doubled": module(word("w") + b"K\x01") + b"".join(
        b"q" + bytes([i]) + b"0" + module(word("a") + b"h" + bytes([i]) + word("b") + b"h" + bytes([i])) for i in range(60)
    ),
    "a module 300 levels deep": (b"c__torch__\nA\n)\x81}" + word("a")) * 300 + b"K\x01" + b"sb" * 300,
    "a state on a class": b"c__torch__\nA\n}" + word("a") + b"K\x01sb",
    "an argument": b"c__torch__\nA\n(K\x01t\x81",
    "a tensor alone": b"K\x01",
    "names that are numbers": b"c__torch__\nA\n)\x81}K\x01K\x02sb",
}  # fmt: skip


@pytest.mark.parametrize("data", HOSTILE.values(), ids=list(HOSTILE))
def test_archives_made_to_do_harm(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    raw = b"\x80\x02" + data + b"."
    list(pickletools.genops(io.BytesIO(raw)))  # well-formed
    path = with_pickle(tmp_path / "evil.pt", saved(torch.jit.script(Block(1)), tmp_path / "good.pt"), raw)
    with pytest.raises(Refused) as error:
        read_torchscript(path)
    assert "\n" not in str(error.value)
    with pytest.raises(WeightsError, match="not a file of plain tensors"):
        read_weights(path)
    assert sorted(os.listdir()) == ["evil.pt", "good.pt"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(bad, tmp_path):
    state = small_clip().state_dict()
    state["visual.conv1.weight"].view(-1)[0] = bad
    torch.save(state, tmp_path / "bad.pt")
    get_plugin_manager()
    cfg = get_cfg_default()
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.WEIGHTS = "ViT-B/16", str(tmp_path / "bad.pt")
    with pytest.raises(WeightsError, match=r"bad.pt: visual.conv1.weight holds NaN or infinite"):
        load_clip(cfg)
    state["visual.conv1.weight"] = torch.zeros(state["visual.conv1.weight"].shape, dtype=torch.int32)
    torch.save(state, tmp_path / "bad.pt")
    with pytest.raises(WeightsError, match=r"visual.conv1.weight is of type torch.int32, not torch.float32"):
        load_clip(cfg)
