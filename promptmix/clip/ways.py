"""Which way each of open_clip's architectures takes prompts, told from its config alone: nothing is built or downloaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import open_clip

#: Modules of timm whose networks are plain vision transformers, so that tokens may stand between their layers.
_TIMM_TRANSFORMERS = frozenset({"vision_transformer", "vision_transformer_hybrid", "vitamin", "eva"})


@dataclass(frozen=True)
class Way:
    """How one architecture runs.

    Attributes:
        name: open_clip's name.
        text: "prefix shared", "trimmed" or "full length", as ``TextTower.way``.
        visual_prompts: whether the image tower takes prompts.
        needs: the extra that its tokenizer or text encoder needs, or "".
    """

    name: str
    text: str
    visual_prompts: bool
    needs: str


def way_of(name: str, config: Mapping[str, Any]) -> Way:
    """Return how the architecture ``name`` with open_clip's ``config`` runs."""
    text, vision = config["text_cfg"], config["vision_cfg"]
    needs = "promptmix[hf]" if text.get("hf_tokenizer_name") or text.get("hf_model_name") else ""
    return Way(name, _text_way(text), _takes_prompts(vision), needs)


def all_ways() -> list[Way]:
    """Return every architecture that open_clip lists."""
    return [way_of(name, open_clip.get_model_config(name) or {}) for name in open_clip.list_models()]


def _text_way(text: Mapping[str, Any]) -> str:
    if text.get("hf_model_name"):
        return "trimmed"
    read_behind = text.get("pool_type") == "last" and not text.get("embed_cls")
    if text.get("no_causal_mask"):
        return "trimmed" if text.get("use_pad_mask") and not read_behind else "full length"
    special = ("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc")
    own_blocks = text.get("block_type") == "custom" or any(text.get(key) for key in special)
    return "full length" if read_behind or own_blocks else "prefix shared"


def _takes_prompts(vision: Mapping[str, Any]) -> bool:
    if timm_name := vision.get("timm_model_name"):
        from timm.models._registry import _model_to_module

        return _model_to_module.get(timm_name) in _TIMM_TRANSFORMERS
    return not isinstance(vision["layers"], (list, tuple))
