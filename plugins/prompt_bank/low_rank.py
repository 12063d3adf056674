"""Low-rank changes of the attention weights in both towers, in front of hand-written prompts (CLIP-LoRA, arXiv 2405.18541)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from promptmix import register
from promptmix.clip import ImageTower, Weights
from promptmix.clip.places import Branch
from promptmix.config.declare import Setting
from promptmix.errors import ConfigError
from promptmix.prompts.changed import ENCODERS, ChangedTowers
from promptmix.prompts.roles import Task

POSITIONS = ("all", "top1", "top2", "top3", "bottom", "mid", "up", "half-up", "half-bottom")
#: What the learned tensors call a tower.
_IN_NAMES = {"text": "text", "image": "visual"}
MATRICES = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}


@register
class LowRank(ChangedTowers):
    """W + s B A for the query, key and value matrices of chosen layers, s = alpha / sqrt(r); dropout in front of A."""

    def __init__(
        self,
        task: Task,
        encoder: Annotated[str, Setting("which tower is changed", choices=tuple(ENCODERS))] = "both",
        position: Annotated[str, Setting("which of its layers", choices=POSITIONS)] = "all",
        params: Annotated[str, Setting("which matrices of the attention: letters of qkvo")] = "qkv",
        r: Annotated[int, Setting("rank", low=1)] = 2,
        alpha: Annotated[float, Setting("the change is B A times alpha / sqrt(r)", above=0)] = 1.0,
        dropout: Annotated[float, Setting("dropout in front of A, a mask of its own for each matrix", low=0, below=1)] = 0.25,
        templates: Annotated[Sequence[str], Setting("the hand-written prompt; () = the data set's first")] = (),
    ) -> None:
        super().__init__(task, encoder, templates)
        if not params or set(params) - set(MATRICES):
            raise ConfigError(f"PARAMS is {params!r}, but must be letters of qkvo, such as qkv")
        self.alpha, self.dropout = alpha / math.sqrt(r), dropout
        self.factors = nn.ParameterDict()
        for name in self.towers:
            tower, module = _IN_NAMES[name], getattr(task.clip, name)
            depth = _depth(module, task) if isinstance(module, ImageTower) else len(module.blocks)
            for layer in layers_of(position, depth):
                for letter in params:
                    down = torch.empty(r, module.width)
                    nn.init.kaiming_uniform_(down, a=math.sqrt(5))
                    self.factors[f"{tower}_{layer}_{letter}_A"] = nn.Parameter(down)
                    self.factors[f"{tower}_{layer}_{letter}_B"] = nn.Parameter(torch.zeros(module.width, r))

    def weights(self, tower: str) -> Weights:
        """Return the changes of ``text`` or ``image``: added to the weights, or as branches where dropout is at work."""
        found: dict[str, Tensor | Branch] = {}
        prefix = "visual." if tower == "image" else ""
        for name, down in self.factors.items():
            owner, layer, letter, side = name.split("_")
            if owner != _IN_NAMES[tower] or side != "A":
                continue
            up = self.factors[f"{owner}_{layer}_{letter}_B"]
            key = f"{prefix}transformer.resblocks.{layer}.attn.{MATRICES[letter]}.weight"
            drops = self.training and self.dropout > 0
            found[key] = self._branch(down, up) if drops else self.alpha * up @ down
        return found

    def _branch(self, down: Tensor, up: Tensor) -> Branch:
        return lambda x: self.alpha * F.dropout(x, self.dropout) @ down.T.to(x.dtype) @ up.T.to(x.dtype)


def layers_of(position: str, depth: int) -> list[int]:
    """Return the layers, from 0, that a position of the authors names; theirs are of 12 layers, here they follow the depth."""
    spans = {
        "all": (0, depth),
        "top1": (depth - 1, depth),
        "top2": (depth - max(depth // 6, 1), depth),
        "top3": (depth - max(depth // 4, 1), depth),
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
