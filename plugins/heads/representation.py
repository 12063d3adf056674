"""Scores of the class token and of the tokens beside it, each through a projection of its own (MMRL, arXiv 2503.08497)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from promptmix.prompts.roles import Head, PromptBank, Task
from promptmix.prompts.step import Step

if TYPE_CHECKING:
    from promptmix.prompts.trainer import PromptTrainer

#: What a run is for: base to new classes, few shots of all classes, or from one data set to others.
TASKS = ("B2N", "FS", "CD")


class ClassAndRepresentation(Head):
    """``alpha s <f_c, t> + (1 - alpha) s <f_r, t>`` of the class feature f_c and the feature f_r of the tokens' mean.

    Args:
        bank: of one expert, with tokens in the image tower.
        projection: maps the mean of the normed tokens (B, W) into the joint space (B, D).
        alpha: weight of the class feature's scores.
        fuses: whether evaluation takes both; otherwise f_c alone, which serves classes that were not trained on.
        scale: s.
    """

    needs_tokens = True
    token_kind = "prompts"
    image_level = "unprojected"

    def __init__(
        self, task: Task, bank: PromptBank, projection: nn.Module, *, alpha: float, fuses: bool, scale: float = 100.0
    ) -> None:
        super().__init__()
        self.projection, self.alpha, self.fuses, self.scale = projection, alpha, fuses, scale

    def forward(self, step: Step) -> Tensor:
        """Return class scores (B, C): both in training, and in evaluation what ``fuses`` says."""
        own = step.once(self.class_scores)
        return self.alpha * own + (1 - self.alpha) * step.once(self.token_scores) if self.training or self.fuses else own

    def class_scores(self, step: Step) -> Tensor:
        """Return the class feature's scores (B, C)."""
        return step.scores(scale=self.scale)

    def token_scores(self, step: Step) -> Tensor:
        """Return the scores (B, C) of the tokens' feature."""
        feature = F.normalize(self.projection(step.unprojected_tokens.mean(dim=1)), dim=-1)
        return self.scale * feature @ step.text[0].to(feature.dtype).T


def scores_both(trainer: PromptTrainer, task: Task, protocol: str, source: str) -> bool:
    """Tell whether evaluation takes both scores: for what was trained on, as the authors' key TASK says it.

    Args:
        trainer: knows the config and the run's class names.
        task: names the classes to tell apart.
        protocol: one of ``TASKS``.
        source: with CD, the data set that was trained on.
    """
    data = trainer.cfg.DATASET
    seen = {"B2N": data.SUBSAMPLE_CLASSES == "base", "FS": True, "CD": source == data.NAME}[protocol]
    return seen and set(task.classnames) <= set(trainer.lab2cname.values())
