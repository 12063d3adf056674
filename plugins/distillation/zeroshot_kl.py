"""Distillation from the zero-shot classifier, as in ProGrad (arXiv 2205.14865) and PromptSRC (arXiv 2307.06948)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from yacs.config import CfgNode

from promptmix import hookimpl
from promptmix.errors import ConfigError
from promptmix.prompts.roles import Distiller, PromptBank, Task
from promptmix.registry import Registry


class ZeroshotKL(Distiller):
    """T^2 KL(softmax(zero-shot / T) || softmax(student / T)), mean over images.

    ProGrad's code leaves out the teacher's entropy, which has no gradient; PromptSRC's divides by the classes too.

    Args:
        task: the frozen model and class names.
        bank: the student's prompts; unused.
        templates: hard templates of the zero-shot classifier, ensembled; () = the data set's first.
        t: temperature T.

    Raises:
        ConfigError: ``t`` is not positive.
    """

    teacher: Tensor

    def __init__(self, task: Task, bank: PromptBank, templates: Sequence[str] = (), t: float = 1.0) -> None:
        super().__init__()
        if t <= 0:
            raise ConfigError(f"the temperature T of zero-shot distillation is {t}; choose one above 0")
        self.scale, self.t = task.clip.scale.item(), t
        teacher = task.clip.ensemble(templates or task.templates[:1], task.classnames)
        self.register_buffer("teacher", teacher, persistent=False)  # (C, D)

    @staticmethod
    def add_config(node: CfgNode) -> None:
        """Declare the distiller's settings."""
        node.TEMPLATES = ()  # hard templates of the zero-shot classifier; () = the data set's first
        node.T = 1.0  # temperature

    def forward(self, image_features: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss (scalar) for features (B, D) and student logits (B, C)."""
        with torch.no_grad():
            taught = self.scale * (image_features.to(self.teacher.dtype) @ self.teacher.T).float()
        target = (taught / self.t).log_softmax(dim=-1)
        student = (logits.float() / self.t).log_softmax(dim=-1)
        return self.t**2 * F.kl_div(student, target, reduction="batchmean", log_target=True)


@hookimpl
def register_distillers(registry: Registry) -> None:
    """Add the distiller."""
    registry.register(ZeroshotKL)
