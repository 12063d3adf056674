"""Deep text prompts, and visual prompts that are linear maps of them (MaPLe, arXiv 2210.03117, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from promptmix import register
from promptmix.clip.vision import VisualPrompts
from promptmix.config.declare import Setting
from promptmix.prompts.deep import DeepBank, TextPrompts, check_depth, linear_maps, replace_each_layer, start_words
from promptmix.prompts.roles import Task


@register
class CoupledDeep(DeepBank):
    """Tokens P_k of the text tower for each of the first layers, and F_k(P_k) in the image tower; all experts share the F_k.

    Raises:
        ConfigError: prompts are deeper than a tower, the image tower takes none, or the words have too few tokens.
    """

    def __init__(
        self,
        task: Task,
        n_ctx: Annotated[int, Setting("b: learned tokens of each layer, in both towers", low=1)] = 2,
        ctx_init: Annotated[str, Setting('words before the class name; "" = random tokens alone')] = "a photo of a",
        prompt_depth: Annotated[int, Setting("J: layers with tokens of their own, from the first; 1 = shallow", low=1)] = 9,
        clone_maps: Annotated[bool, Setting("coupling maps of deeper layers start as copies of one, as the authors' do")] = False,
        n_prompts: Annotated[int, Setting("E: experts, each with tokens in both towers", low=1)] = 1,
    ) -> None:
        check_depth(task.clip, "prompt_depth", prompt_depth, text=True, vision=True)
        start, words = start_words(task.clip, n_ctx, ctx_init, n_prompts=n_prompts)
        super().__init__(task, TextPrompts(task, start, words, prompt_depth))
        widths = task.clip.text.width, task.clip.image.width
        self.couple = linear_maps(widths, 1, clones=False) + linear_maps(widths, prompt_depth - 1, clones=clone_maps)

    def visual(self) -> Sequence[VisualPrompts]:
        """Return the schedules of P~_k = F_k(P_k)."""
        return replace_each_layer([f(p) for f, p in zip(self.couple, self.text.layers, strict=True)])
