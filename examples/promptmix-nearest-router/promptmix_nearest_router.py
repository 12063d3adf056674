"""A router that sends an image to the experts whose own hard prompts are nearest to it.

The hard prompts of expert e give one feature per class; the score of e is the best cosine between the image and any of them.
Nothing is learned but how sharply to choose.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from promptmix import hookimpl
from promptmix.errors import ConfigError
from promptmix.prompts.roles import PromptBank, Router, Routing, Task
from promptmix.registry import Registry

__version__ = "0.1.0"


class NearestRouter(Router):
    """Softmax over the K experts with the nearest hard prompts.

    Args:
        task: the frozen model and the data set's words.
        bank: the experts, with their hard-prompt references.
        k: experts kept per image; 0 keeps all.
        sharpness: factor on the cosines at the start; it is learned from there.

    Raises:
        ConfigError: ``k`` is negative or above the number of experts, or ``sharpness`` is not positive.
    """

    def __init__(self, task: Task, bank: PromptBank, k: int = 0, sharpness: float = 20.0) -> None:
        super().__init__()
        if not 0 <= k <= bank.num_experts or sharpness <= 0:
            raise ConfigError(
                f"ROUTER.NEARESTROUTER: K is {k} (choose from 0, all, to the number of experts, {bank.num_experts}) "
                f"and SHARPNESS is {sharpness} (choose a number above 0)"
            )
        self.k = k or bank.num_experts
        # Not in the checkpoint: another set of classes has other prompts.
        self.register_buffer("prompts", bank.references(task.classnames), persistent=False)  # (E, C, D)
        self.log_sharpness = nn.Parameter(torch.tensor(float(sharpness)).log())

    @staticmethod
    def add_config(node: CfgNode) -> None:
        """Declare the settings: the constructor's arguments in upper case."""
        node.K = 0  # experts kept per image; 0 = all
        node.SHARPNESS = 20.0  # factor on the cosines at the start

    def forward(self, image_features: Tensor) -> Routing:
        """Route normalised image features (B, D)."""
        cosines = torch.einsum("bd,ecd->bec", image_features, self.prompts.to(image_features.dtype))
        return Routing.top_k(self.log_sharpness.exp() * cosines.amax(dim=-1), self.k)


@hookimpl
def register_routers(registry: Registry) -> None:
    """Add the router; promptmix calls this when it loads the plugin."""
    registry.register(NearestRouter)
