"""The frozen model: two towers that take prompts as tensors and know no method."""

from __future__ import annotations

from promptmix.clip.load import load_clip
from promptmix.clip.model import CLIP
from promptmix.clip.text import Prompts, TextTower
from promptmix.clip.tokens import ClassTokens, Tokenizer, split_template
from promptmix.clip.vision import ImageTower, PromptStep

__all__ = ["CLIP", "ClassTokens", "ImageTower", "PromptStep", "Prompts", "TextTower", "Tokenizer", "load_clip", "split_template"]
