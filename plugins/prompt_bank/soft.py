"""Soft prompts: M learned context vectors per expert around the class name (CoOp, arXiv 2109.01134, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from torch import Tensor, nn
from yacs.config import CfgNode

from promptmix import register
from promptmix.config.declare import Setting
from promptmix.errors import ConfigError, SettingError
from promptmix.prompts.context import POSITIONS, initial_context, refuse_idle_length, refuse_words_per_class
from promptmix.prompts.roles import ManyPrompts, Task


@register
class Soft(ManyPrompts):
    """One or more soft prompts ``[V]_1 ... [V]_M [CLASS].``, generic or one context per class.

    Raises:
        ConfigError: an unknown position, no context vector, ``ctx_init`` together with ``csc``, words to count where there are
            none, or a name that is not at their end.
    """

    per_class = "a context"

    def __init__(
        self,
        task: Task,
        n_ctx: Annotated[int, Setting("M: context vectors", low=1)] = 16,
        ctx_init: Annotated[str, Setting('words to start from, such as "a photo of a"; then M is their number of tokens')] = "",
        csc: Annotated[bool, Setting("class-specific contexts: one context per class")] = False,
        class_token_position: Annotated[str, Setting("where the class name stands", choices=POSITIONS)] = "end",
        n_prompts: Annotated[int, Setting("E: soft prompts; those after the first start at random", low=1)] = 1,
        count_words: Annotated[
            bool, Setting("M = words of CTX_INIT, as the authors count; further tokens stay as they are")
        ] = False,
    ) -> None:
        super().__init__(task)
        if class_token_position not in POSITIONS:
            raise ConfigError(f"class token position is {class_token_position!r}; choose from {', '.join(POSITIONS)}")
        refuse_words_per_class(csc, ctx_init)
        self.position, self.class_specific = class_token_position, csc
        leading = (n_prompts, len(task.classnames)) if csc else (n_prompts,)
        start = initial_context(task.clip.text, n_ctx, ctx_init, *leading)
        #: Ids of the tokens between the context and the class name.
        self.fixed: tuple[int, ...] = ()
        if count_words:
            if not ctx_init:
                raise SettingError("count_words", True, "but CTX_INIT has no words to count; give some, or leave it out")
            if class_token_position != "end":
                raise SettingError("count_words", True, "but then the name stands at the end; leave CLASS_TOKEN_POSITION out")
            words = len(ctx_init.replace("_", " ").split())
            self.fixed = tuple(task.clip.text.tokenizer.encode(ctx_init.replace("_", " "))[words:])
            start = start[..., :words, :]
        self.ctx = nn.Parameter(start)

    @classmethod
    def check_settings(cls, cfg: CfgNode, node: str) -> None:
        """Refuse a context length that the initial words would override."""
        refuse_idle_length(cfg, node)

    @property
    def num_experts(self) -> int:
        return self.ctx.shape[0]

    def encode(self, names: Sequence[str], *, full_stop: bool | None = None, experts: Tensor | None = None) -> Tensor:
        ctx = self.ctx if experts is None else self.ctx[experts]
        tower = self.task.clip.text
        if self.fixed:
            between = tower.embed(self.fixed)[None]
            return tower(tower.compose(ctx, between, tower.tokenizer.class_tokens(names), self.stop(full_stop)))
        return tower(tower.compose_around(ctx, names, self.position, self.stop(full_stop)))
