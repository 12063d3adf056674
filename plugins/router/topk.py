"""Linear routers that keep the K best experts: guided by hard prompts (MoCoOp, arXiv 2409.12011), or plain."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from promptmix import hookimpl
from promptmix.errors import ConfigError
from promptmix.prompts.roles import PromptBank, Router, Routing, Task
from promptmix.registry import Registry


class TopK(Router):
    """A linear map from the image feature to E logits; softmax over the K largest.

    Args:
        task: what is routed.
        bank: the experts.
        k: experts kept per image, at most E.

    Raises:
        ConfigError: ``k`` is below 1 or above the number of experts.
    """

    def __init__(self, task: Task, bank: PromptBank, k: int = 2) -> None:
        super().__init__()
        if not 1 <= k <= bank.num_experts:
            raise ConfigError(
                f"ROUTER.{type(self).__name__.upper()}.K is {k}; choose from 1 to the number of experts, {bank.num_experts}"
            )
        self.k = k
        self.gate = nn.Linear(task.clip.embed_dim, bank.num_experts)

    @staticmethod
    def add_config(node: CfgNode) -> None:
        """Declare the router's settings."""
        node.K = 2  # experts kept per image

    def forward(self, image_features: Tensor) -> Routing:
        """Route normalised image features (B, D)."""
        return Routing.top_k(self.gate(image_features), self.k)


class HardPromptTopK(TopK):
    """``TopK`` whose choice is taught by hard prompts: an image should go where its class's prototype is nearest.

    With prototypes P (E, C, D), q_e = <f, P_e,label>; ``boost`` is added to the K largest q; the loss is the cross-entropy
    between the router's logits and softmax(q).

    Args:
        task: what is routed.
        bank: the experts, with their hard-prompt references.
        k: experts kept per image.
        boost: what is added to the K largest q before the softmax.
    """

    def __init__(self, task: Task, bank: PromptBank, k: int = 2, boost: float = 10.0) -> None:
        super().__init__(task, bank, k)
        self.boost = boost
        self._prototypes = lambda: task.label_rows(bank.references(task.all_classnames))

    @staticmethod
    def add_config(node: CfgNode) -> None:
        """Declare the router's settings."""
        TopK.add_config(node)
        node.BOOST = 10.0  # added to the K largest hard-prompt scores

    def loss(self, routing: Routing, image_features: Tensor, labels: Tensor) -> Tensor:
        """Return the gate loss (scalar)."""
        with torch.no_grad():
            own = self._prototypes()[:, labels]  # (E, B, D)
            scores = torch.einsum("bd,ebd->be", image_features.to(own.dtype), own)
            best = scores.topk(self.k, dim=-1).indices
            target = scores.scatter_add(1, best, torch.full_like(best, self.boost, dtype=scores.dtype)).softmax(dim=-1)
        return -(target * routing.logits.float().log_softmax(dim=-1)).sum(dim=-1).mean()


@hookimpl
def register_routers(registry: Registry) -> None:
    """Add both routers."""
    registry.register(TopK)
    registry.register(HardPromptTopK)
