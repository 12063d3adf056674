"""A small random CLIP with a few class names, and steps made by hand, to test one part alone."""

from __future__ import annotations

from types import SimpleNamespace

import open_clip
import torch
import torch.nn.functional as F

from promptmix.clip import CLIP, Tokenizer
from promptmix.plugin_manager import get_plugin_manager
from promptmix.prompts.roles import Task
from promptmix.registry import PROMPT_BANK_REGISTRY

WIDTH, JOINT = 64, 32
NAMES = tuple(
    f"{kind} {thing}"
    for kind in ("red", "old", "small", "sea", "toy")
    for thing in ["bus", "cat", "dog", "fox", "hen", "jar", "key", "log", "owl", "pig"]
)
GROUPS = (("a photo of a {}.", "a picture of a {}."), ("a drawing of a {}.",), ("{} at night.",))


def small_task(classes: int = 50) -> Task:
    """A small random CLIP with the real vocabulary and context length, and ``classes`` class names."""
    get_plugin_manager()
    torch.manual_seed(0)
    model = open_clip.CLIP(
        embed_dim=JOINT,
        vision_cfg={"layers": 1, "width": 64, "head_width": 32, "patch_size": 16, "image_size": 32},
        text_cfg={"context_length": 77, "vocab_size": 49408, "width": WIDTH, "heads": 2, "layers": 3},
    )
    clip = CLIP(model, Tokenizer(), "small", mean=(0.5,) * 3, std=(0.5,) * 3, image_size=32)
    names = NAMES[:classes]
    return Task(clip, names, names, tuple(template for group in GROUPS for template in group), GROUPS)


def unit(*shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape), dim=-1)


def made_step(**parts):
    """The parts of a step that one component reads."""
    parts.setdefault("query", parts.get("image"))
    parts.setdefault("frozen_image", parts["query"])
    return SimpleNamespace(**parts)


def bank_of(task: Task, name: str = "Soft", **settings):
    return PROMPT_BANK_REGISTRY.get(name)(task, **settings)
