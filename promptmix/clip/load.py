"""Loads backbones: the embedded ones, CoOp's names with OpenAI's weights, any open_clip model, or a local file."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import open_clip
import torch
from open_clip.pretrained import get_pretrained_cfg
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from promptmix.clip.model import CLIP
from promptmix.clip.tokens import PretrainedTokenizer, Tokenizer
from promptmix.clip.torchscript import read_torchscript
from promptmix.errors import PluginError, RegistryError, WeightsError
from promptmix.files.archives import is_torchscript, read_saved, tensor_names
from promptmix.files.pickles import Refused
from promptmix.registry import BACKBONE_REGISTRY

if TYPE_CHECKING:
    from yacs.config import CfgNode

#: CoOp's names for OpenAI's models, all with quick-GELU, and their names in open_clip.
COOP_NAMES = {
    "RN50": "RN50",
    "RN101": "RN101",
    "RN50x4": "RN50x4",
    "RN50x16": "RN50x16",
    "RN50x64": "RN50x64",
    "ViT-B/32": "ViT-B-32",
    "ViT-B/16": "ViT-B-16",
    "ViT-L/14": "ViT-L-14",
    "ViT-L/14@336px": "ViT-L-14-336",
}
EMBEDDED_NAMES = ("tiny-en", "tiny-vit")


def load_clip(cfg: CfgNode) -> CLIP:
    """Load the backbone that ``cfg.MODEL.BACKBONE`` names, frozen, in float32, on the CPU.

    Raises:
        RegistryError: no backbone and no open_clip model has this name.
        WeightsError: the weights are missing, can't be downloaded, or don't fit the model.
    """
    name = cfg.MODEL.BACKBONE.NAME
    if name not in BACKBONE_REGISTRY and name in open_clip.list_models():
        return load_open_clip(cfg)
    made = BACKBONE_REGISTRY.get(name)(cfg)
    if not isinstance(made, CLIP):
        raise PluginError(f"backbone {name!r} gave a {type(made).__name__}, but must give a promptmix.clip.CLIP; fix the plugin")
    return made


def load_embedded(cfg: CfgNode) -> CLIP:
    """Load ``tiny-en`` or ``tiny-vit`` from the package (see ``promptmix/assets/README.md``)."""
    from promptmix.assets import asset_path

    name = cfg.MODEL.BACKBONE.NAME
    spec = embedded_spec(name)
    model = open_clip.CLIP(**spec["model_cfg"])
    if cfg.MODEL.BACKBONE.PRETRAINED:
        state: dict[str, Tensor] = {}
        for file in [cfg.MODEL.BACKBONE.WEIGHTS] if cfg.MODEL.BACKBONE.WEIGHTS else spec["weights"]:
            path = Path(file) if cfg.MODEL.BACKBONE.WEIGHTS else asset_path(f"models/{file}")
            state.update(read_weights(path))
        _fill(model, state, name)
    return CLIP(
        model,
        Tokenizer(asset_path(f"models/{spec['tokenizer']['bpe']}")),
        name,
        mean=spec["mean"],
        std=spec["std"],
        image_size=spec["image_size"],
        interpolation=spec["interpolation"],
    )


def embedded_spec(name: str) -> dict[str, Any]:
    """Return the description of an embedded backbone."""
    from promptmix.assets import asset_path

    spec: dict[str, Any] = json.loads(asset_path(f"models/{name}.json").read_text(encoding="utf-8"))
    return spec


def load_open_clip(cfg: CfgNode) -> CLIP:
    """Load CoOp's names or any model of open_clip, with quick-GELU where the weights were trained with it.

    Raises:
        WeightsError: the tag is unknown, the download failed, or the file does not fit the model.
    """
    node = cfg.MODEL.BACKBONE
    name = COOP_NAMES.get(node.NAME, node.NAME)
    tags = open_clip.list_pretrained_tags_by_model(name)
    tag = node.TAG or (tags[0] if len(tags) == 1 else "openai")
    known = get_pretrained_cfg(name, tag) or {}
    if not known and not node.WEIGHTS and node.PRETRAINED:
        raise WeightsError(f"MODEL.BACKBONE.TAG {tag!r} is not a pretrained tag of {name} (choices: {', '.join(tags) or 'none'})")
    quick_gelu = node.NAME in COOP_NAMES and tag == "openai" or bool(known.get("quick_gelu"))
    tokenizer = load_tokenizer(name, node.TOKENIZER)
    if not node.PRETRAINED:
        model = _create(name, None, quick_gelu)
    elif node.WEIGHTS:
        state = read_weights(Path(node.WEIGHTS))
        # OpenAI's layout says all about its model, so that cut-down models load as well.
        is_openai = "visual.proj" in state and "text_projection" in state or "visual.layer1.0.conv1.weight" in state
        is_openai = is_openai and not node.TAG and type(tokenizer) is Tokenizer
        model = open_clip.CLIP(**openai_config(state)) if is_openai else _create(name, None, quick_gelu)
        _fill(model, state, node.WEIGHTS)
    else:
        model = _create(name, tag, quick_gelu)
    look = look_of(node.NAME, node.TAG)
    size = model.visual.image_size
    size = size[0] if isinstance(size, (tuple, list)) else size
    return CLIP(model, tokenizer, node.NAME, mean=look.mean, std=look.std, image_size=size, interpolation=look.interpolation)


@dataclass(frozen=True)
class Look:
    """What pictures a backbone takes.

    Attributes:
        size: height and width in pixels.
        mean: of red, green, blue, subtracted.
        std: of red, green, blue, divided by.
        interpolation: how pictures were resized in its training.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str


def look_of(name: str, tag: str = "") -> Look:
    """Return what pictures an embedded backbone, CoOp's name or open_clip's model takes, whatever its weights; loads none.

    Args:
        name: ``MODEL.BACKBONE.NAME``.
        tag: ``MODEL.BACKBONE.TAG``.

    Raises:
        RegistryError: no such backbone, or one of a plugin, which only shows it when it is loaded.
    """
    if name in EMBEDDED_NAMES:
        spec = embedded_spec(name)
        return Look(spec["image_size"], tuple(spec["mean"]), tuple(spec["std"]), spec["interpolation"])
    own = COOP_NAMES.get(name, name)
    config = open_clip.get_model_config(own)
    if config is None:
        raise RegistryError(f"backbone {name[:100]!r} is none of open_clip's; `promptmix list backbones --all` names them")
    tags = open_clip.list_pretrained_tags_by_model(own)
    tag = tag or (tags[0] if len(tags) == 1 else "openai")
    found = get_pretrained_cfg(own, tag) or (get_pretrained_cfg(own, tags[0]) if tags else None) or {}
    size = config["vision_cfg"].get("image_size", 224)
    return Look(
        size[0] if isinstance(size, (tuple, list)) else size,
        tuple(found.get("mean", open_clip.OPENAI_DATASET_MEAN)),
        tuple(found.get("std", open_clip.OPENAI_DATASET_STD)),
        found.get("interpolation", "bicubic"),
    )


def load_tokenizer(name: str, folder: str = "") -> Tokenizer:
    """Return the tokenizer of open_clip's model ``name``.

    Args:
        name: open_clip's name.
        folder: ``MODEL.BACKBONE.TOKENIZER``, a folder with the tokenizer's files; "" downloads them once, where it is not CLIP's.

    Raises:
        WeightsError: Hugging Face's library is missing, or the files are.
    """
    text = (open_clip.get_model_config(name) or {}).get("text_cfg", {})
    source = text.get("hf_tokenizer_name", "")
    if not source:
        if folder:
            raise WeightsError(f"MODEL.BACKBONE.TOKENIZER is {folder!r}, but {name} uses CLIP's own tokenizer; leave it out")
        return Tokenizer()
    try:
        from open_clip.tokenizer import HFTokenizer

        length = text.get("context_length") or 77
        return PretrainedTokenizer(HFTokenizer(folder or source, context_length=length, **text.get("tokenizer_kwargs", {})))
    except ImportError as error:
        raise WeightsError(
            f"{name} reads text with a tokenizer of Hugging Face; pip install 'promptmix[hf]', or choose a model such as ViT-B-16"
        ) from error
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"the tokenizer {folder or source!r} of {name} can't be downloaded or read; connect to the network, or set "
            "MODEL.BACKBONE.TOKENIZER to a folder with its files"
        ) from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict in float32 from safetensors, a weights-only PyTorch file, or OpenAI's TorchScript archive.

    Raises:
        WeightsError: there is no such file, or it holds something other than tensors.
    """
    if not path.is_file():
        what = "it is not a file" if path.exists() else "no such file"
        raise WeightsError(f"MODEL.BACKBONE.WEIGHTS {path}: {what}; give a .safetensors, .pt or .bin file")
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            state = read_torchscript(path) if is_torchscript(path) else read_saved(path, tensor_names)
    except (Refused, SafetensorError, OSError, RuntimeError, ValueError, MemoryError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(
            f"MODEL.BACKBONE.WEIGHTS {path}: not a file of plain tensors ({reason}); promptmix runs no code from a file: give a "
            "state dict, safetensors, or OpenAI's own archive"
        ) from error
    state = state.get("state_dict", state) if isinstance(state, Mapping) else state
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"MODEL.BACKBONE.WEIGHTS {path}: holds no state dict; give the file of a CLIP model")
    extras = ("input_resolution", "context_length", "vocab_size")
    return {
        key.removeprefix("module."): value.float() if value.is_floating_point() else value
        for key, value in state.items()
        # Archives of open_clip's models hold the causal mask too.
        if key not in extras and key.rpartition(".")[2] != "attn_mask"
    }


def openai_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the open_clip model config that OpenAI-layout weights imply (heads are width / 64)."""
    if "visual.proj" in state:
        patch = state["visual.conv1.weight"].shape[-1]
        grid = round((state["visual.positional_embedding"].shape[0] - 1) ** 0.5)
        vision = {
            "layers": _count(state, "visual.transformer.resblocks."),
            "width": state["visual.conv1.weight"].shape[0],
            "patch_size": patch,
            "image_size": patch * grid,
        }
    else:
        grid = round((state["visual.attnpool.positional_embedding"].shape[0] - 1) ** 0.5)
        vision = {
            "layers": [_count(state, f"visual.layer{stage}.") for stage in (1, 2, 3, 4)],
            "width": state["visual.layer1.0.conv1.weight"].shape[0],
            "patch_size": None,
            "image_size": grid * 32,
        }
    width = state["ln_final.weight"].shape[0]
    text = {
        "context_length": state["positional_embedding"].shape[0],
        "vocab_size": state["token_embedding.weight"].shape[0],
        "width": width,
        "heads": width // 64,
        "layers": _count(state, "transformer.resblocks."),
    }
    return {
        "embed_dim": state["text_projection"].shape[1],
        "vision_cfg": vision,
        "text_cfg": text,
        "quick_gelu": True,
    }


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    return len({key[len(prefix) :].split(".")[0] for key in state if key.startswith(prefix)})


def _create(name: str, tag: str | None, quick_gelu: bool) -> open_clip.CLIP | open_clip.CustomTextCLIP:
    """Build open_clip's model ``name``, downloading the weights of ``tag`` once; without a tag, with random weights."""
    # Random weights are asked for here, or filled in next; and a failed download needs one line, not the hub's account of it.
    logging.disable(logging.ERROR)
    try:
        return open_clip.create_model(name, pretrained=tag, force_quick_gelu=quick_gelu, precision="fp32")
    except Exception as error:
        raise WeightsError(
            f"weights of {name} ({tag}) can't be downloaded or loaded ({type(error).__name__}); connect to the network, or get "
            f"{_source(name, tag)} elsewhere and set MODEL.BACKBONE.WEIGHTS to its file (fit, predict: --weights FILE); the "
            "embedded backbone tiny-en needs none"
        ) from error
    finally:
        logging.disable(logging.NOTSET)


def _source(name: str, tag: str | None) -> str:
    """Return where the weights of open_clip's model ``name`` come from."""
    known = get_pretrained_cfg(name, tag) or {} if tag else {}
    hub = str(known.get("hf_hub", "")).strip("/")
    return str(known.get("url") or (f"https://huggingface.co/{hub}" if hub else "them"))


def _fill(model: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Load ``state`` strictly, in the precision of the file's numbers (open_clip's own loader rounds to float16)."""
    own = model.state_dict()
    for name, value in state.items():
        if name in own and value.is_floating_point() != own[name].is_floating_point():
            raise WeightsError(f"weights of {what}: {name} is of type {value.dtype}, not {own[name].dtype}; the file is damaged")
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise WeightsError(f"weights of {what}: {name} holds NaN or infinite numbers; the file is damaged, get it again")
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise WeightsError(
            f"weights of {what} don't fit MODEL.BACKBONE.NAME's architecture; name a file of that one: {reason}"
        ) from error
