"""Text supervision by distance: soft features are held near fixed hard ones, by cosine (KgCoOp) or by L1 (PromptSRC)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch.nn.functional as F
from torch import Tensor

from promptmix import register
from promptmix.config.declare import Setting
from promptmix.data.templates import IMAGENET_80
from promptmix.prompts.roles import PromptBank, Task, TextSupervision
from promptmix.prompts.step import Step


@register
class CosineToHard(TextSupervision):
    """1 - mean cosine of soft and hard features, over experts and classes (KgCoOp, arXiv 2303.13283).

    Args:
        bank: the experts; their own hard references are the target unless templates are given.
    """

    takes_per_image = True

    hard: Tensor

    def __init__(
        self,
        task: Task,
        bank: PromptBank,
        templates: Annotated[Sequence[str], Setting("hard templates to stay near; () = each expert's own references")] = (),
    ) -> None:
        super().__init__()
        hard = task.clip.ensemble(templates, task.classnames)[None] if templates else bank.references(task.classnames)
        self.register_buffer("hard", hard, persistent=False)  # (E or 1, C, D)

    def forward(self, step: Step) -> Tensor:
        return 1 - F.cosine_similarity(step.text.float(), self.hard.float(), dim=-1).mean()


@register
class L1ToEnsemble(TextSupervision):
    """Mean absolute difference to the averaged features of many templates (PromptSRC, arXiv 2307.06948).

    The templates' features are averaged as they come from the tower and normalised once, as the authors' code does.
    """

    takes_per_image = True

    hard: Tensor

    def __init__(
        self,
        task: Task,
        bank: PromptBank,
        templates: Annotated[Sequence[str], Setting("hard templates that are averaged; () = OpenAI's 80 for ImageNet")] = (),
    ) -> None:
        super().__init__()
        self.register_buffer("hard", task.raw_ensemble(templates or IMAGENET_80), persistent=False)  # (C, D)

    def forward(self, step: Step) -> Tensor:
        return (step.text.float() - self.hard.float()).abs().mean()
