"""Low-rank changes of the attention weights in both towers, in front of hand-written prompts (CLIP-LoRA, arXiv 2405.18541)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from promptmix import hookimpl
from promptmix.clip import ImageTower, Weights
from promptmix.clip.weights import Branch
from promptmix.config.declare import Setting
from promptmix.errors import ConfigError
from promptmix.prompts.roles import PromptBank, Task
from promptmix.registry import Registry

ENCODERS = ("text", "vision", "both")
POSITIONS = ("all", "top1", "top3", "bottom", "mid", "up", "half-up", "half-bottom")
MATRICES = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}


class LowRank(PromptBank):
    """W + s B A for the query, key and value matrices of chosen layers, s = alpha / sqrt(r); dropout in front of A in training.

    Args:
        task: the frozen model and the data set's words.
        encoder: which tower is changed.
        position: which of its layers (see ``layers_of``).
        params: which matrices, letters of ``qkvo``.
        r: rank.
        alpha: scale times sqrt(r).
        dropout: share of the low-rank branch's inputs that is dropped in training, a mask of its own for each matrix.
        templates: the hand-written prompt; encoded anew in each step where the text tower is changed.
    """

    def __init__(
        self,
        task: Task,
        encoder: Annotated[str, Setting("which tower is changed", choices=ENCODERS)] = "both",
        position: Annotated[str, Setting("which of its layers", choices=POSITIONS)] = "all",
        params: Annotated[str, Setting("which matrices of the attention: letters of qkvo")] = "qkv",
        r: Annotated[int, Setting("rank", low=1)] = 2,
        alpha: Annotated[float, Setting("the change is B A times alpha / sqrt(r)", above=0)] = 1.0,
        dropout: Annotated[float, Setting("dropout in front of A", low=0, below=1)] = 0.25,
        templates: Annotated[Sequence[str], Setting("the hand-written prompt; () = the data set's first")] = (),
    ) -> None:
        super().__init__()
        if not params or set(params) - set(MATRICES):
            raise ConfigError(f"PARAMS is {params!r}, but must be letters of qkvo, such as qkv")
        self.task, self.template = task, (tuple(templates) or task.templates[:1])[0]
        self.alpha, self.dropout = alpha / math.sqrt(r), dropout
        self.towers = {"text": ("text",), "vision": ("visual",), "both": ("text", "visual")}[encoder]
        self.factors = nn.ParameterDict()
        for tower, module in (("text", task.clip.text), ("visual", task.clip.image)):
            if tower not in self.towers:
                continue
            depth = _depth(module, task) if isinstance(module, ImageTower) else len(module.blocks)
            for layer in layers_of(position, depth):
                for letter in params:
                    down = torch.empty(r, module.width)
                    nn.init.kaiming_uniform_(down, a=math.sqrt(5))
                    self.factors[f"{tower}_{layer}_{letter}_A"] = nn.Parameter(down)
                    self.factors[f"{tower}_{layer}_{letter}_B"] = nn.Parameter(torch.zeros(module.width, r))

    @property
    def num_experts(self) -> int:
        """Always 1."""
        return 1

    @property
    def image_is_frozen(self) -> bool:
        """Whether only the text tower is changed."""
        return "visual" not in self.towers

    def weights(self, tower: str) -> Weights:
        """Return the changes of ``text`` or ``visual``: added to the weights, or as branches where dropout is at work."""
        found: dict[str, Tensor | Branch] = {}
        prefix = "visual." if tower == "visual" else ""
        for name, down in self.factors.items():
            owner, layer, letter, side = name.split("_")
            if owner != tower or side != "A":
                continue
            up = self.factors[f"{owner}_{layer}_{letter}_B"]
            key = f"{prefix}transformer.resblocks.{layer}.attn.{MATRICES[letter]}.weight"
            drops = self.training and self.dropout > 0
            found[key] = self._branch(down, up) if drops else self.alpha * up @ down
        return found

    def _branch(self, down: Tensor, up: Tensor) -> Branch:
        return lambda x: self.alpha * F.dropout(x, self.dropout) @ down.T.to(x.dtype) @ up.T.to(x.dtype)

    def image_changes(self) -> dict[str, Any]:
        """Return the changed weights of the image tower."""
        return {} if self.image_is_frozen else {"weights": self.weights("visual")}

    def forward(self, names: Sequence[str], image_features: Tensor | None = None, *, full_stop: bool | None = None) -> Tensor:
        """Return normalised text features (1, C, D)."""
        if "text" not in self.towers:
            return self.references(names)
        tower = self.task.clip.text
        return F.normalize(tower(tower.compose_text(self.template, names), weights=self.weights("text")), dim=-1)

    def references(self, names: Sequence[str]) -> Tensor:
        """Return the hand-written prompt's features (1, C, D) through the unchanged tower."""
        return self.task.clip.hard_features([self.template], names)


def layers_of(position: str, depth: int) -> list[int]:
    """Return the layers, from 0, that a position of the authors names; theirs are of 12 layers, here they follow the depth."""
    spans = {
        "all": (0, depth),
        "top1": (depth - 1, depth),
        "top3": (depth - depth // 4, depth),
        "bottom": (0, depth // 3),
        "mid": (depth // 3, depth - depth // 3),
        "up": (depth - depth // 3, depth),
        "half-up": (depth // 2, depth),
        "half-bottom": (0, depth // 2),
    }
    return list(range(*spans[position]))


def _depth(tower: ImageTower, task: Task) -> int:
    if not tower.takes_prompts:
        raise ConfigError(
            f"MODEL.BACKBONE.NAME is {task.clip.name}, whose image tower ({type(tower.visual).__name__}) has no attention to "
            "change; set ENCODER to text, or choose a vision transformer such as ViT-B/16 or tiny-vit"
        )
    return tower.depth


@hookimpl
def register_prompt_banks(registry: Registry) -> None:
    """Add the bank."""
    registry.register(LowRank)
