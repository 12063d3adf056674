"""The smallest relative of each of open_clip's architectures: the same layers and options, few and narrow, random weights."""

from __future__ import annotations

import copy
import re
from functools import lru_cache
from typing import Any
from unittest.mock import patch

import open_clip
import timm
import torch
from open_clip.coca_model import CoCa
from open_clip.model import CLIP, CustomTextCLIP
from timm.models.vitamin import VitCfg, VitConvCfg

from promptmix.clip.tokens import PretrainedTokenizer, Tokenizer

WIDTH, DIM, VOCABULARY = 32, 24, 200

#: (ids in front, ids behind, padding, separator that open_clip blanks) of tokenizers other than CLIP's, by a part of the name.
SPECIAL = {
    "SigLIP2": ((), (1,), 0, None),
    "SigLIP": ((), (1,), 1, None),
    "bert-base": ((2,), (3,), 0, 3),
    "mt5": ((), (1,), 0, None),
    "roberta": ((0,), (2,), 1, None),
    "xlm": ((0,), (2,), 1, None),
    "nllb": ((5,), (2,), 1, None),
}


class StandIn:
    """open_clip's ``HFTokenizer`` without its vocabulary: a word's id follows from its letters."""

    def __init__(self, name: str) -> None:
        kind = next(kind for kind in SPECIAL if kind in name)
        self.before, self.after, self.pad_token_id, self.sep_token_id = SPECIAL[kind]
        self.strip_sep_token = self.sep_token_id is not None
        self.tokenizer = self
        self.clean_fn = (lambda text: re.sub(r"[^\w\s]", "", text)) if "SigLIP" in name or kind == "mt5" else str.strip

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = [10 + sum(map(ord, word)) % (VOCABULARY - 10) for word in re.findall(r"\w+|[^\w\s]", text)]
        return {"input_ids": [*self.before, *ids, *self.after] if add_special_tokens else ids}


def tokenizer_of(text: dict[str, Any]) -> Tokenizer:
    name = text.get("hf_tokenizer_name")
    return PretrainedTokenizer(StandIn(name)) if name else clip_tokenizer()


@lru_cache(maxsize=1)
def clip_tokenizer() -> Tokenizer:
    return Tokenizer()


def shrink(name: str) -> dict[str, Any]:
    """Return open_clip's config of ``name``, cut down."""
    config = copy.deepcopy(open_clip.get_model_config(name))
    config["embed_dim"] = DIM
    text, vision = config["text_cfg"], config["vision_cfg"]
    if not text.get("hf_model_name"):
        text |= {"width": WIDTH, "heads": 2, "layers": 2, "context_length": min(text.get("context_length", 77), 24)}
        if text.get("hf_tokenizer_name"):
            text["vocab_size"] = VOCABULARY
            text["eos_id"] = next(iter(tokenizer_of(text).after), 2)
    if "multimodal_cfg" in config:
        config["multimodal_cfg"] |= {"width": DIM, "heads": 2, "layers": 1, "context_length": text.get("context_length", 24)}
    if vision.get("timm_model_name"):
        vision["image_size"] = timm_size(vision["timm_model_name"])
        if not vision.get("timm_proj", "linear") or vision.get("timm_proj") == "none":
            config["embed_dim"] = WIDTH  # the network's own width is the joint one
    elif isinstance(vision["layers"], list):
        vision |= {"layers": [1, 1, 1, 1], "width": 8, "image_size": 64, "head_width": 32}
    else:
        vision |= {"layers": 2, "width": WIDTH, "head_width": 16, "patch_size": 8, "image_size": 16}
        if vision.get("attentional_pool"):
            vision |= {"attn_pooler_heads": 2, "attn_pooler_queries": 4}
    return config


def timm_size(name: str) -> int:
    if found := re.search(r"patch(\d+)_(?!window)", name):
        return 2 * int(found[1])
    if name in ("fastvit_mci3", "fastvit_mci4"):
        return 128
    return {"swin": 56, "convnext": 64, "fastvit": 64}.get(name.split("_")[0], 32)


def timm_changes(name: str) -> dict[str, Any]:
    """What makes timm's network of this name small."""
    size = timm_size(name)
    if name.startswith("convnext"):
        return {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 32)}
    if name.startswith("swin"):
        return {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "img_size": size}
    if name.startswith("fastvit"):
        stages = 5 if name[-1] in "34" else 4
        return {"layers": (1,) * stages, "embed_dims": (16, 16, 32, 32, 32)[:stages]}
    if name.startswith("vitamin"):
        stem = VitCfg((8, 16, 32), (1, 1, 1), 8, VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6), "1d")
        return {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": size, "embed_cfg": stem}
    if "mci" in name:  # its stem has one width
        return {"depth": 1, "img_size": size}
    return {"embed_dim": WIDTH, "depth": 2, "num_heads": 2, "img_size": size}


def encoder_config(name: str) -> Any:
    """Return a tiny config of Hugging Face's for the encoder ``name``."""
    from transformers import AutoConfig

    kind = next(kind for kind in ("mt5", "nllb", "xlm-roberta", "roberta") if kind in name)
    sizes: dict[str, Any] = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    sizes |= {"max_position_embeddings": 80, "pad_token_id": 1}
    if kind == "mt5":
        sizes = {"d_model": WIDTH, "num_layers": 2, "num_heads": 2, "d_kv": 16, "d_ff": 48, "num_decoder_layers": 1}
    if kind == "nllb":
        sizes = {"d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 2}
        sizes |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "pad_token_id": 1}
    return AutoConfig.for_model("m2m_100" if kind == "nllb" else kind, vocab_size=VOCABULARY, **sizes)


def build(config: dict[str, Any]) -> CLIP | CustomTextCLIP | CoCa:
    """Build a cut-down config as open_clip's factory would, without its downloads."""
    torch.manual_seed(0)
    create = timm.create_model
    config = copy.deepcopy(config)
    custom = config.pop("custom_text", False) or bool(config["text_cfg"].get("hf_model_name"))
    kind = CoCa if "multimodal_cfg" in config else CustomTextCLIP if custom else CLIP
    with patch("timm.create_model", lambda name, **given: create(name, **given, **timm_changes(name))):
        if config["text_cfg"].get("hf_model_name"):
            config["text_cfg"]["hf_model_pretrained"] = False
            with patch("open_clip.hf_model.AutoConfig.from_pretrained", encoder_config):
                model = kind(**config)
        else:
            model = kind(**config)
    model.eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name not in ("logit_scale", "logit_bias"):
            spread = 0.15 if parameter.dim() > 1 else 0.3
            start = 1.0 if parameter.dim() == 1 and "norm" in name + ".ln" and name.endswith("weight") else 0.0
            parameter.copy_(start + spread * torch.randn(parameter.shape, generator=generator))
    return model
