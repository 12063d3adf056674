"""A router that sends every image to one expert, chosen in the config."""

import torch

from promptmix import hookimpl
from promptmix.prompts.roles import Router, Routing


class FirstExpert(Router):
    """All weight on one expert; nothing is learned."""

    def __init__(self, task, bank, expert=0):
        super().__init__()
        self.expert, self.count = expert, bank.num_experts

    @staticmethod
    def add_config(node):
        node.EXPERT = 0  # which expert

    def forward(self, step):
        logits = torch.zeros(len(step.query), self.count)
        return Routing.top_k(logits.index_fill(1, torch.tensor([self.expert]), 1.0), 1)


@hookimpl
def register_routers(registry):
    registry.register(FirstExpert)
