"""A client's own soft prompt beside the prompts of others, which stay as they are (pFedMoAP, arXiv 2410.10114)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from promptmix import register
from promptmix.config.declare import Setting
from promptmix.prompts.context import POSITIONS, initial_context, refuse_words_per_class
from promptmix.prompts.roles import PromptBank, Task


@register
class LocalAndOthers(PromptBank):
    """One learned context, and K - 1 contexts of other clients, frozen; without a server there are none."""

    per_class = "a context"

    sized_by_data: ClassVar[tuple[str, ...]] = ("others",)
    borrows: ClassVar[dict[str, str]] = {"others": "ctx"}

    def __init__(
        self,
        task: Task,
        n_ctx: Annotated[int, Setting("M: context vectors", low=1)] = 16,
        ctx_init: Annotated[str, Setting('words to start from, such as "a photo of a"; then M is their number of tokens')] = "",
        csc: Annotated[bool, Setting("class-specific contexts: one context per class")] = False,
        class_token_position: Annotated[str, Setting("where the class name stands", choices=POSITIONS)] = "end",
    ) -> None:
        super().__init__(task)
        refuse_words_per_class(csc, ctx_init)
        self.position, self.class_specific = class_token_position, csc
        leading = (1, len(task.classnames)) if csc else (1,)
        self.ctx = nn.Parameter(initial_context(task.clip.text, n_ctx, ctx_init, *leading))
        self.others = nn.Parameter(self.ctx.detach()[:0].clone(), requires_grad=False)
        self._kept: tuple[tuple[object, ...], Tensor] | None = None

    @property
    def num_experts(self) -> int:
        return 1 + len(self.others)

    def forward(self, names: Sequence[str], image_features: Tensor | None = None, *, full_stop: bool | None = None) -> Tensor:
        """Return normalised text features (E, C, D), the own prompt's first."""
        own = self._encode(self.ctx, names, full_stop)
        return torch.cat([own, self._of_others(names, full_stop).to(own.dtype)]) if len(self.others) else own

    def _of_others(self, names: Sequence[str], full_stop: bool | None) -> Tensor:
        """Return the others' features (E - 1, C, D), which change only when other prompts come in."""
        state = (tuple(names), full_stop, self.others.data_ptr(), self.others._version)
        if self._kept is None or self._kept[0] != state:
            with torch.no_grad():
                self._kept = state, self._encode(self.others, names, full_stop)
        return self._kept[1]

    def _encode(self, contexts: Tensor, names: Sequence[str], full_stop: bool | None) -> Tensor:
        tower = self.task.clip.text
        return F.normalize(tower(tower.compose_around(contexts, names, self.position, self.stop(full_stop))), dim=-1)
