"""Linear routers that keep the K best experts: guided by hard prompts (MoCoOp, arXiv 2409.12011), or plain."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor, nn

from promptmix import register
from promptmix.config.declare import Setting, inherits
from promptmix.errors import SettingError
from promptmix.prompts.roles import PromptBank, Router, Routing, Task
from promptmix.prompts.step import Step


@register
class TopK(Router):
    """A linear map from the image feature to E logits; softmax over the K largest.

    Raises:
        ConfigError: ``k`` is below 1 or above the number of experts.
    """

    reads_query_alone = True

    def __init__(self, task: Task, bank: PromptBank, k: Annotated[int, Setting("experts kept per image", low=1)] = 2) -> None:
        super().__init__()
        if not 1 <= k <= bank.num_experts:
            raise SettingError("k", k, f"but must be from 1 to the number of experts, {bank.num_experts}")
        self.k = k
        self.gate = nn.Linear(task.clip.embed_dim, bank.num_experts)

    def forward(self, step: Step) -> Routing:
        return Routing.top_k(self.gate(step.query), self.k)

    def as_linear(self) -> tuple[Tensor, Tensor, int]:
        """Return the gate's weight, its bias, and k."""
        return self.gate.weight, self.gate.bias, self.k


@register
class HardPromptTopK(TopK):
    """``TopK`` whose choice is taught by hard prompts: an image should go where its class's prototype is nearest.

    With prototypes P (E, C, D), q_e = <f, P_e,label>; ``boost`` is added to the K largest q; the loss is the cross-entropy
    between the router's logits and softmax(q).
    """

    @inherits(TopK)
    def __init__(
        self,
        task: Task,
        bank: PromptBank,
        boost: Annotated[float, Setting("added to the K largest hard-prompt scores", low=0)] = 10.0,
        **top_k: Any,
    ) -> None:
        super().__init__(task, bank, **top_k)
        self.boost = boost
        self._prototypes = lambda: task.label_rows(bank.references(task.all_classnames))

    def loss(self, step: Step) -> Tensor:
        """Return the gate loss (scalar)."""
        assert step.routing is not None  # noqa: S101  (made by ``forward``)
        image = step.query
        with torch.no_grad():
            own = self._prototypes()[:, step.labels]  # (E, B, D)
            scores = torch.einsum("bd,ebd->be", image.to(own.dtype), own)
            best = scores.topk(self.k, dim=-1).indices
            target = scores.scatter_add(1, best, torch.full_like(best, self.boost, dtype=scores.dtype)).softmax(dim=-1)
        return -(target * step.routing.logits.float().log_softmax(dim=-1)).sum(dim=-1).mean()
