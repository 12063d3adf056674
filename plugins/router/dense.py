"""Routers that send every image to all experts: with learned weights, or with equal ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from promptmix import hookimpl
from promptmix.prompts.roles import PromptBank, Router, Routing, Task
from promptmix.registry import Registry


class Soft(Router):
    """A linear map from the image feature to E logits; softmax over all of them.

    Args:
        task: what is routed.
        bank: the experts.
    """

    def __init__(self, task: Task, bank: PromptBank) -> None:
        super().__init__()
        self.gate = nn.Linear(task.clip.embed_dim, bank.num_experts)

    def forward(self, image_features: Tensor) -> Routing:
        """Route normalised image features (B, D)."""
        logits = self.gate(image_features)
        return Routing.top_k(logits, logits.shape[-1])


class Uniform(Router):
    """Equal weights 1 / E; nothing is learned. The same numbers as without a router, by a name for tables.

    Args:
        task: what is routed.
        bank: the experts.
    """

    def __init__(self, task: Task, bank: PromptBank) -> None:
        super().__init__()
        self.experts = bank.num_experts

    def forward(self, image_features: Tensor) -> Routing:
        """Route normalised image features (B, D)."""
        return Routing.top_k(torch.zeros_like(image_features[:, :1]).expand(-1, self.experts), self.experts)


@hookimpl
def register_routers(registry: Registry) -> None:
    """Add both routers."""
    registry.register(Soft)
    registry.register(Uniform)
