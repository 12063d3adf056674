"""Grouped text supervision: each expert's soft features are held at its group's hard prototypes (MoCoOp, arXiv 2409.12011)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from promptmix import hookimpl
from promptmix.prompts.roles import PromptBank, Task, TextSupervision
from promptmix.registry import Registry


class GroupedContrastive(TextSupervision):
    """For each expert, cross-entropy over classes of <soft feature of c, prototype of c'> with target c' = c, no temperature.

    It runs over all class names of the data set. Where training sees base classes only, the prompts of all names are
    encoded for it, with a full stop; otherwise the training features are used as they are.

    Args:
        task: the class names.
        bank: the experts; unused here, since the loss gets the bank of the step.
    """

    def __init__(self, task: Task, bank: PromptBank) -> None:
        super().__init__()
        self.task = task

    def forward(self, bank: PromptBank, text_features: Tensor) -> Tensor:
        """Return the loss, averaged over experts and classes."""
        names = self.task.all_classnames
        features = text_features if names == self.task.classnames else bank(names, full_stop=True)
        scores = torch.einsum("ecd,ekd->eck", features, bank.references(names).to(features.dtype))
        target = torch.arange(len(names), device=scores.device).expand(scores.shape[0], -1)
        return F.cross_entropy(scores.flatten(0, 1).float(), target.flatten())


@hookimpl
def register_text_supervisions(registry: Registry) -> None:
    """Add the supervision."""
    registry.register(GroupedContrastive)
