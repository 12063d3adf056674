"""The frozen model: two towers that take prompts as tensors and know no method."""

from __future__ import annotations

from promptmix.clip.load import load_clip
from promptmix.clip.model import CLIP
from promptmix.clip.packed import Prompts
from promptmix.clip.places import LayerAction, Memory, PromptStep, Weights
from promptmix.clip.text import TextTower
from promptmix.clip.tokens import ClassTokens, Tokenizer, split_template
from promptmix.clip.vision import ImageStates, ImageTower

__all__ = [
    "CLIP",
    "ClassTokens",
    "ImageStates",
    "ImageTower",
    "LayerAction",
    "Memory",
    "PromptStep",
    "Prompts",
    "TextTower",
    "Tokenizer",
    "Weights",
    "load_clip",
    "split_template",
]
