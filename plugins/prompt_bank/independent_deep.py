"""Deep prompts of both towers that know nothing of each other (IVLP, arXiv 2210.03117, section 4.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from yacs.config import CfgNode

from promptmix import register
from promptmix.clip.vision import VisualPrompts
from promptmix.config import get_key
from promptmix.config.declare import Setting
from promptmix.errors import ConfigError
from promptmix.prompts.deep import DeepBank, TextPrompts, VisionPrompts, check_depth, start_words
from promptmix.prompts.roles import Task


@register
class IndependentDeep(DeepBank):
    """Text tokens and visual tokens of their own for each of the first layers; several experts each have both.

    Raises:
        ConfigError: prompts are deeper than a tower, the image tower takes none, or the words have too few tokens.
    """

    def __init__(
        self,
        task: Task,
        n_ctx_vision: Annotated[int, Setting("learned tokens in the image tower; 0 leaves it frozen", low=0)] = 2,
        n_ctx_text: Annotated[int, Setting("learned tokens in the text tower, the first ones of CTX_INIT", low=1)] = 2,
        ctx_init: Annotated[str, Setting('words before the class name; "" = random tokens alone')] = "a photo of a",
        prompt_depth_vision: Annotated[
            int, Setting("J_v: layers with visual tokens of their own, from the first; 0 with N_CTX_VISION 0", low=0)
        ] = 9,
        prompt_depth_text: Annotated[int, Setting("J_t: layers with text tokens of their own", low=1)] = 9,
        n_prompts: Annotated[int, Setting("E: experts, each with prompts in both towers", low=1)] = 1,
    ) -> None:
        clip, vision = task.clip, None
        if n_ctx_vision:  # first, since a backbone without visual prompts is the larger mistake
            check_depth(clip, "prompt_depth_vision", prompt_depth_vision, vision=True)
            vision = VisionPrompts(clip.image.width, n_ctx_vision, prompt_depth_vision, n_prompts)
        check_depth(clip, "prompt_depth_text", prompt_depth_text, text=True)
        start, words = start_words(clip, n_ctx_text, ctx_init, "n_ctx_text", n_prompts)
        super().__init__(task, TextPrompts(task, start, words, prompt_depth_text))
        self.vision = vision

    @classmethod
    def check_settings(cls, cfg: CfgNode, node: str) -> None:
        """Refuse visual tokens and a depth of theirs that contradict each other."""
        tokens, depth = get_key(cfg, f"{node}.N_CTX_VISION"), get_key(cfg, f"{node}.PROMPT_DEPTH_VISION")
        if bool(tokens) != bool(depth):
            raise ConfigError(
                f"{node}.N_CTX_VISION is {tokens} and {node}.PROMPT_DEPTH_VISION is {depth}; "
                "set both to 0 for text prompts alone, or both to 1 or more"
            )

    @property
    def image_is_frozen(self) -> bool:
        """Whether there are no visual prompts."""
        return self.vision is None

    def visual(self) -> Sequence[VisualPrompts]:
        return () if self.vision is None else self.vision()
