"""A trainer for promptmix."""

from __future__ import annotations

from typing import Annotated

from promptmix import register
from promptmix.config.declare import Setting
from promptmix.plugins.prompt_bank.soft import Soft
from promptmix.plugins.text_supervision.hard_prompts import CosineToHard
from promptmix.prompts.learner import Learner
from promptmix.prompts.losses import CrossEntropy
from promptmix.prompts.roles import Task
from promptmix.prompts.trainer import PromptTrainer


@register
class MyPart(PromptTrainer):
    """One soft prompt that stays near the hard one: change what you need."""

    def compose(
        self,
        task: Task,
        n_ctx: Annotated[int, Setting("M: context vectors", low=1)] = 4,
        weight: Annotated[float, Setting("lambda, of the distance to the hard prompt", low=0)] = 8.0,
    ) -> Learner:
        """Return what is learned; the settings are the keys of ``TRAINER.MYPART``."""
        bank = Soft(task, n_ctx)
        return Learner(task, bank, loss=CrossEntropy() + weight * CosineToHard(task, bank))
