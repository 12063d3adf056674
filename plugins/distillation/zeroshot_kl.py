"""Distillation from the zero-shot classifier, as in ProGrad (arXiv 2205.14865) and PromptSRC (arXiv 2307.06948)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from promptmix import register
from promptmix.config.declare import Setting
from promptmix.prompts.roles import Distiller, PromptBank, Task
from promptmix.prompts.step import Step


@register
class ZeroshotKL(Distiller):
    """T^2 KL(softmax(zero-shot / T) || softmax(student / T)), mean over images.

    ProGrad's code leaves out the teacher's entropy, which has no gradient.
    """

    teacher: Tensor

    needs_all_images = False

    def __init__(
        self,
        task: Task,
        bank: PromptBank,
        templates: Annotated[Sequence[str], Setting("hard templates of the teacher; () = the data set's first")] = (),
        t: Annotated[float, Setting("temperature T", above=0)] = 1.0,
        raw: Annotated[bool, Setting("average the templates' features before they are normalised (PromptSRC)")] = False,
        over_classes: Annotated[bool, Setting("divide by the number of classes too (PromptSRC)")] = False,
    ) -> None:
        super().__init__()
        self.scale, self.t, self.over_classes = task.clip.scale.item(), t, over_classes
        templates = templates or task.templates[:1]
        teacher = task.raw_ensemble(templates) if raw else task.clip.ensemble(templates, task.classnames)
        self.register_buffer("teacher", teacher, persistent=False)  # (C, D)

    def forward(self, step: Step) -> Tensor:
        with torch.no_grad():
            taught = self.scale * (step.frozen_image.to(self.teacher.dtype) @ self.teacher.T).float()
        target = (taught / self.t).log_softmax(dim=-1)
        student = (step.logits.float() / self.t).log_softmax(dim=-1)
        divergence = self.t**2 * F.kl_div(student, target, reduction="batchmean", log_target=True)
        return divergence / target.shape[-1] if self.over_classes else divergence
