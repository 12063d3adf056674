"""Noisy top-K gating with load balancing: Outrageously Large Neural Networks (Shazeer et al., ICLR 2017, arXiv 1701.06538).

| paper | here |
|---|---|
| W_g, W_noise, both starting at zero | ``gate``, ``noise`` |
| H(x)_i = (x W_g)_i + N(0, 1) softplus((x W_noise)_i), equation 4 | ``Routing.logits``; in evaluation without the noise |
| G(x) = softmax(KeepTopK(H(x), k)), equations 3 and 5 | ``Routing.weights`` |
| L_importance = w_importance CV(sum_x G(x))^2, equations 6 and 7 | ``IMPORTANCE_WEIGHT`` |
| P(x, i) and L_load = w_load CV(sum_x P(x, i))^2, appendix A | ``chance_of_choice``, ``LOAD_WEIGHT`` |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from promptmix import register
from promptmix.config.declare import Setting
from promptmix.errors import SettingError
from promptmix.prompts.roles import PromptBank, Router, Routing, Task
from promptmix.prompts.step import Step


@dataclass(frozen=True)
class NoisyRouting(Routing):
    """A choice under noise.

    Attributes:
        clean: (B, E) logits without noise.
        spread: (B, E) standard deviation of the noise on each.
    """

    clean: Tensor
    spread: Tensor


@register
class NoisyTopK(Router):
    """Keeps the K largest of the noisy logits, and is pushed to use all experts alike.

    Raises:
        ConfigError: ``k`` is below 1 or above the number of experts.
    """

    reads_query_alone = True

    def __init__(
        self,
        task: Task,
        bank: PromptBank,
        k: Annotated[int, Setting("experts kept per image", low=1)] = 2,
        importance_weight: Annotated[float, Setting("w_importance, on the experts' summed weights", low=0)] = 0.1,
        load_weight: Annotated[float, Setting("w_load, on their expected numbers of images", low=0)] = 0.1,
    ) -> None:
        super().__init__()
        if not 1 <= k <= bank.num_experts:
            raise SettingError("k", k, f"but must be from 1 to the number of experts, {bank.num_experts}")
        self.k, self.importance_weight, self.load_weight = k, importance_weight, load_weight
        self.gate = nn.Parameter(torch.zeros(task.clip.embed_dim, bank.num_experts))
        self.noise = nn.Parameter(torch.zeros(task.clip.embed_dim, bank.num_experts))

    def forward(self, step: Step) -> NoisyRouting:
        """Route a batch by its image features; noise is drawn in training mode only."""
        clean = (step.query @ self.gate).float()
        spread = F.softplus((step.query @ self.noise).float())
        logits = clean + torch.randn_like(clean) * spread if self.training else clean
        kept = Routing.top_k(logits, self.k)
        return NoisyRouting(kept.experts, kept.weights, logits, clean, spread)

    def as_linear(self) -> tuple[Tensor, Tensor, int]:
        """Return the weight without noise, no bias, and k."""
        return self.gate.T, torch.zeros(self.gate.shape[1]), self.k

    def loss(self, step: Step) -> Tensor:
        """Return L_importance + L_load (scalar)."""
        routing = step.routing
        assert isinstance(routing, NoisyRouting)  # noqa: S101  (what ``forward`` returned)
        importance = routing.dense.sum(dim=0)
        load = chance_of_choice(routing, self.k).sum(dim=0)
        return self.importance_weight * variation(importance) + self.load_weight * variation(load)


def chance_of_choice(routing: NoisyRouting, k: int) -> Tensor:
    """Return P(x, i) (B, E): how likely expert i is among the K if only its own noise were drawn again."""
    experts = routing.logits.shape[-1]
    if k == experts:
        return torch.ones_like(routing.clean)
    highest = routing.logits.topk(k + 1, dim=-1).values
    chosen = torch.zeros_like(routing.logits, dtype=torch.bool).scatter(1, routing.experts, True)
    # The K-th largest of the others: one further down the list for an expert that is itself among the K largest.
    threshold = torch.where(chosen, highest[:, k:], highest[:, k - 1 : k])
    return torch.special.ndtr((routing.clean - threshold) / routing.spread)


def variation(values: Tensor) -> Tensor:
    """Return the squared coefficient of variation of ``values`` (E,): variance over squared mean."""
    return values.var(correction=0) / values.mean().square().clamp_min(1e-10)
