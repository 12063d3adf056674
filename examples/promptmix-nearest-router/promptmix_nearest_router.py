"""A router that sends an image to the experts whose own hard prompts are nearest to it.

The hard prompts of expert e give one feature per class; the score of e is the best cosine between the image and any of them.
Nothing is learned but how sharply to choose.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import nn

from promptmix import register
from promptmix.config.declare import Setting
from promptmix.errors import SettingError
from promptmix.prompts.roles import PromptBank, Router, Routing, Task
from promptmix.prompts.step import Step

__version__ = "0.1.0"


@register
class NearestRouter(Router):
    """Softmax over the K experts with the nearest hard prompts.

    Args:
        task: the frozen model and the data set's words.
        bank: the experts, with their hard-prompt references.
        k: experts kept per image; 0 keeps all.
        sharpness: factor on the cosines at the start; it is learned from there.

    Raises:
        ConfigError: ``k`` is above the number of experts.
    """

    def __init__(
        self,
        task: Task,
        bank: PromptBank,
        k: Annotated[int, Setting("experts kept per image; 0 = all", low=0)] = 0,
        sharpness: Annotated[float, Setting("factor on the cosines at the start", above=0)] = 20.0,
    ) -> None:
        super().__init__()
        if k > bank.num_experts:
            raise SettingError("k", k, f"but must be at most the number of experts, {bank.num_experts}, or 0 for all")
        self.k = k or bank.num_experts
        # Not in the checkpoint: another set of classes has other prompts.
        self.register_buffer("prompts", bank.references(task.classnames), persistent=False)  # (E, C, D)
        self.log_sharpness = nn.Parameter(torch.tensor(float(sharpness)).log())

    def forward(self, step: Step) -> Routing:
        """Route a batch by its image features."""
        cosines = torch.einsum("bd,ecd->bec", step.query, self.prompts.to(step.query.dtype))
        return Routing.top_k(self.log_sharpness.exp() * cosines.amax(dim=-1), self.k)
