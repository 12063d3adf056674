"""CLIP-LoRA: Low-Rank Few-Shot Adaptation of Vision-Language Models.

Maxime Zanella, Ismail Ben Ayed. CVPR workshops 2024. https://arxiv.org/abs/2405.18541

| paper | here |
|---|---|
| W + gamma B A, rank r | ``LowRank.weights``, ``R``; gamma = ``ALPHA`` / sqrt(r) |
| query, key and value matrices, both encoders, all layers | ``PARAMS``, ``ENCODER``, ``POSITION`` |
| dropout 0.25 in front of A | ``DROPOUT`` |
| p = softmax(cos / tau) | ``Cosine`` with the constant scale 100 |

The schedule runs by step, from the first rate to 1e-6 by a cosine over all steps. The authors train 500 steps for each shot
whatever the data set has; here MAX_EPOCH says how often each picture is seen (the config states both).

Deviations from the authors' code (github.com/MaxZanella/CLIP-LoRA): positions follow the depth of the tower (``bottom`` is the
first third), theirs are fixed for 12 layers; trained and merged weights are the same numbers up to rounding, as there. Without
dropout theirs takes the change out of a weight again before the backward pass, so that gradients which go on to layers below
pass it by (up to 2 % of their norm on seeded weights); here they are true, as theirs are with dropout.
"""

from __future__ import annotations

from typing import Any

import torch
from promptmix.plugins.prompt_bank.low_rank import LowRank

from promptmix import register
from promptmix.config.declare import inherits
from promptmix.prompts.heads import Cosine
from promptmix.prompts.learner import Learner
from promptmix.prompts.roles import Task
from promptmix.prompts.trainer import PromptTrainer


@register
class CLIPLoRA(PromptTrainer):
    """Low-rank changes of the attention weights in both towers, trained with cross-entropy."""

    schedule_unit = "step"

    @inherits(LowRank)
    def compose(self, task: Task, **low_rank: Any) -> Learner:
        bank = LowRank(task, **low_rank)
        return Learner(task, bank, head=Cosine(task, bank, scale=100.0))

    def build_scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        """Return a cosine over all steps, to 1e-6."""
        steps = self.max_epoch * max(len(self.train_loader_x or ()), 1)
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=1e-6)
