"""Tokens of a representation space that both towers get in their deeper layers (MMRL, arXiv 2503.08497; MMRL++, 2505.10088)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated

import torch
from torch import Tensor, nn

from promptmix import register
from promptmix.clip.vision import PromptStep, VisualPrompts
from promptmix.config.declare import Setting
from promptmix.errors import SettingError
from promptmix.prompts.deep import STD, check_depth, linear_maps
from promptmix.prompts.roles import PromptBank, Task


class Aligners(nn.ModuleList):
    """A linear map for each of ``count`` layers; all start equal.

    Args:
        rep_dim: d_r, width of the representation space.
        width: W of the tower.
        count: layers.
    """

    def __init__(self, rep_dim: int, width: int, count: int) -> None:
        super().__init__(linear_maps((rep_dim, width), count, clones=True))

    def forward(self, tokens: Tensor) -> list[Tensor]:
        """Return the tokens (K, W) of each layer for those (K, d_r) of the space."""
        return [align(tokens) for align in self]


@register
class Representations(PromptBank):
    """K tokens R of a space of their own, mapped into each chosen layer of both towers, in front of a hand-written prompt.

    They are inserted in front of the first chosen layer, behind SOT and beside the patches, without positions. In front of each
    further one they are replaced; where ``beta`` is below 1, by beta times the layer's own map plus (1 - beta) times what the
    layer before made of them. Layers between those chosen carry them on.

    Args:
        aligner: makes the maps into one tower, as ``Aligners`` does.

    Raises:
        SettingError: layers are not in order, or deeper than a tower.
    """

    def __init__(
        self,
        task: Task,
        n_rep_tokens: Annotated[int, Setting("K: representation tokens", low=1)] = 5,
        rep_dim: Annotated[int, Setting("d_r: width of the representation space", low=1)] = 512,
        rep_layers: Annotated[Sequence[int], Setting("layers with tokens, counted from 1", low=1)] = (6, 7, 8, 9, 10, 11, 12),
        template: Annotated[str, Setting('hand-written prompt; "" = the data set\'s first')] = "",
        beta: Annotated[float, Setting("further layers: weight of their own map", low=0, high=1, at_test=True)] = 1.0,
        aligner: Callable[[int, int, int], nn.Module] = Aligners,
    ) -> None:
        super().__init__(task)
        if not rep_layers or list(rep_layers) != sorted(set(rep_layers)):
            raise SettingError("rep_layers", tuple(rep_layers), "but must name one or more layers, in order, each once")
        check_depth(task.clip, "rep_layers", max(rep_layers), text=True, vision=True)
        self.layers, self.beta = tuple(rep_layers), beta
        self.template = template or task.templates[0]
        self.tokens = nn.Parameter(torch.empty(n_rep_tokens, rep_dim).normal_(std=STD))
        towers = task.clip.text, task.clip.image
        self.text, self.image = (aligner(rep_dim, tower.width, len(self.layers)) for tower in towers)

    def schedule(self, aligner: nn.Module) -> dict[int, PromptStep]:
        """Return what happens to a tower's tokens before each chosen layer."""
        first, *further = aligner(self.tokens)
        steps = [PromptStep(first, behind_norm=True), *(PromptStep(self._carried(new), len(new)) for new in further)]
        return {layer - 1: step for layer, step in zip(self.layers, steps, strict=True)}

    def _carried(self, new: Tensor) -> Tensor | Callable[[Tensor], Tensor]:
        if self.beta == 1:
            return new
        return lambda left: self.beta * new + (1 - self.beta) * left

    def visual(self) -> Sequence[VisualPrompts]:
        return [self.schedule(self.image)]

    def encode(self, names: Sequence[str], *, full_stop: bool | None = None) -> Tensor:
        """Return text features (1, C, D); the template says where prompts end."""
        tower = self.task.clip.text
        return tower(tower.compose_text(self.template, names), self.schedule(self.text))

    def references(self, names: Sequence[str]) -> Tensor:
        """Return the hand-written prompt's features (1, C, D) through the unchanged tower."""
        return self.task.clip.hard_features([self.template], names)
