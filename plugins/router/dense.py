"""Routers that send every image to all experts: with learned weights, or with equal ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from promptmix import register
from promptmix.prompts.roles import PromptBank, Router, Routing, Task
from promptmix.prompts.step import Step


@register(name="Soft")
class SoftGate(Router):
    """A linear map from the image feature to E logits; softmax over all of them."""

    reads_query_alone = True

    def __init__(self, task: Task, bank: PromptBank) -> None:
        super().__init__()
        self.gate = nn.Linear(task.clip.embed_dim, bank.num_experts)

    def forward(self, step: Step) -> Routing:
        logits = self.gate(step.query)
        return Routing.top_k(logits, logits.shape[-1])

    def as_linear(self) -> tuple[Tensor, Tensor, int]:
        """Return the gate's weight, its bias, and E."""
        return self.gate.weight, self.gate.bias, len(self.gate.bias)


@register
class Uniform(Router):
    """Equal weights 1 / E; nothing is learned. The same numbers as without a router, by a name for tables."""

    reads_query_alone = True

    def __init__(self, task: Task, bank: PromptBank) -> None:
        super().__init__()
        self.experts, self.width = bank.num_experts, task.clip.embed_dim

    def forward(self, step: Step) -> Routing:
        return Routing.top_k(torch.zeros_like(step.query[:, :1]).expand(-1, self.experts), self.experts)

    def as_linear(self) -> tuple[Tensor, Tensor, int]:
        """Return zeros, zeros, and E."""
        return torch.zeros(self.experts, self.width), torch.zeros(self.experts), self.experts
