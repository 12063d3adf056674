"""Attribute words with soft tokens of their own in front of the context (ATPrompt, arXiv 2412.09442, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor, nn

from promptmix import register
from promptmix.clip.places import PromptStep
from promptmix.clip.text import DeepPrompts
from promptmix.clip.vision import VisualPrompts
from promptmix.config.declare import Setting
from promptmix.errors import SettingError
from promptmix.prompts.deep import STD, check_depth, linear_maps, replace_each_layer
from promptmix.prompts.roles import PromptBank, Task


@register
class AttributePrompts(PromptBank):
    """``[SOT] [att_1] word_1 ... [att_A] word_A [ctx] class name . [EOT]``; what is in brackets is learned."""

    def __init__(
        self,
        task: Task,
        n_ctx: Annotated[int, Setting("M: context tokens in front of the class name", low=1)] = 4,
        n_att: Annotated[int, Setting("soft tokens in front of each attribute word", low=1)] = 4,
        attributes: Annotated[Sequence[str], Setting("attribute words, such as (color, shape)")] = (),
        n_atts: Annotated[Sequence[int], Setting("soft tokens of each word, where they differ; () = N_ATT", low=1)] = (),
    ) -> None:
        super().__init__(task)
        if not attributes:
            raise SettingError("attributes", tuple(attributes), "but must hold words such as (color, shape)")
        counts = tuple(n_atts) or (n_att,) * len(attributes)
        if len(counts) != len(attributes):
            raise SettingError(
                "n_atts", counts, f"but there are {len(attributes)} attribute words; give a number for each, or ()"
            )
        tower = task.clip.text
        self.words = tuple(tower.tokenizer.encode(word) for word in attributes)
        self.ctx = nn.Parameter(torch.empty(n_ctx, tower.width).normal_(std=STD))
        self.att = nn.ParameterList(nn.Parameter(torch.empty(count, tower.width).normal_(std=0.01)) for count in counts)

    @property
    def span(self) -> int:
        """Tokens of all attributes, which stand between SOT and the context."""
        return sum(len(att) + len(word) for att, word in zip(self.att, self.words, strict=True))

    def deep(self) -> DeepPrompts:
        """Return what replaces tokens in deeper layers of the text tower."""
        return {}

    def encode(self, names: Sequence[str], *, full_stop: bool | None = None) -> Tensor:
        tower = self.task.clip.text
        pieces = [piece for att, word in zip(self.att, self.words, strict=True) for piece in (att, tower.embed(word))]
        context = torch.cat([*pieces, self.ctx])[None]
        prompts = tower.compose(context, tower.tokenizer.class_tokens(names), self.stop(full_stop))
        return tower(prompts, self.deep())


@register
class CoupledAttributes(AttributePrompts):
    """Attribute prompts whose context is new at each of the first layers, and mapped into the image tower (MaPLe).

    Attributes are carried on from layer to layer and don't touch the image tower.
    """

    def __init__(
        self,
        task: Task,
        n_ctx: Annotated[int, Setting("M: context tokens of each layer, in both towers", low=1)] = 4,
        n_att: Annotated[int, Setting("soft tokens in front of each attribute word", low=1)] = 4,
        attributes: Annotated[Sequence[str], Setting("attribute words, such as (color, shape)")] = (),
        prompt_depth: Annotated[int, Setting("J: layers with a context of their own, from the first", low=1)] = 9,
        clone_maps: Annotated[bool, Setting("coupling maps of deeper layers start as copies of one, as the authors' do")] = False,
        n_atts: Annotated[Sequence[int], Setting("soft tokens of each word, where they differ; () = N_ATT", low=1)] = (),
    ) -> None:
        check_depth(task.clip, "prompt_depth", prompt_depth, text=True, vision=True)
        super().__init__(task, n_ctx, n_att, attributes, n_atts)
        self.deeper = nn.ParameterList(nn.Parameter(torch.empty_like(self.ctx).normal_(std=STD)) for _ in range(prompt_depth - 1))
        widths = task.clip.text.width, task.clip.image.width
        self.couple = linear_maps(widths, 1, clones=False) + linear_maps(widths, prompt_depth - 1, clones=clone_maps)

    def deep(self) -> DeepPrompts:
        """Return the steps that replace the context behind the attributes."""
        span, length = self.span, len(self.ctx)

        def behind(new: Tensor) -> PromptStep:
            def replaced(removed: Tensor) -> Tensor:
                return torch.cat([removed[..., :span, :], new.expand(*removed.shape[:-2], -1, -1).to(removed.dtype)], dim=-2)

            return PromptStep(replaced, remove=span + length)

        return {layer: behind(new) for layer, new in enumerate(self.deeper, start=1)}

    def visual(self) -> Sequence[VisualPrompts]:
        return replace_each_layer([f(p) for f, p in zip(self.couple, (self.ctx, *self.deeper), strict=True)])
