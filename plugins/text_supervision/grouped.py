"""Grouped text supervision: each expert's soft features are held at its group's hard prototypes (MoCoOp, arXiv 2409.12011)."""

from __future__ import annotations

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from promptmix import register
from promptmix.config.declare import Setting
from promptmix.prompts.roles import PromptBank, Task, TextSupervision
from promptmix.prompts.step import Step


@register
class GroupedContrastive(TextSupervision):
    """For each expert, cross-entropy over classes of <soft feature of c, prototype of c'> with target c' = c, no temperature.

    It runs over all class names of the data set. Where training sees base classes only, the prompts of all names are
    encoded for it, with a full stop; otherwise the training features are used as they are.

    Args:
        bank: the experts, which with ``chosen_only`` stand still where no picture chose them; the loss gets the bank of the step.
        chosen_only: experts that no picture of the batch chose count with features of zero, as in the authors' code at batches
            below 4: they learn nothing from the batch (no momentum moves them), and each adds the constant ln C to the sum.
    """

    def __init__(
        self,
        task: Task,
        bank: PromptBank,
        chosen_only: Annotated[bool, Setting("supervise only experts that the batch chose (recipes of batch 1)")] = False,
    ) -> None:
        super().__init__()
        self.task, self.chosen_only = task, chosen_only
        self.needs_all_experts = not chosen_only
        if chosen_only:
            bank.idle_learn = False

    def forward(self, step: Step) -> Tensor:
        """Return the loss, averaged over experts and classes."""
        names, bank = self.task.all_classnames, step.bank
        chosen = step.routing.experts.unique() if self.chosen_only and step.routing is not None else None
        if names != self.task.classnames:
            features = bank(names, full_stop=True) if chosen is None else bank(names, full_stop=True, experts=chosen)
        else:
            features = step.text if chosen is None or step.experts is not None else step.text[chosen]
        references = bank.references(names) if chosen is None else bank.references(names)[chosen]
        scores = torch.einsum("ecd,ekd->eck", features, references.to(features.dtype))
        target = torch.arange(len(names), device=scores.device).expand(scores.shape[0], -1)
        loss = F.cross_entropy(scores.flatten(0, 1).float(), target.flatten())
        if chosen is None:
            return loss
        share = len(chosen) / bank.num_experts
        return share * loss + (1 - share) * math.log(len(names))
