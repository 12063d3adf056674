"""pFedMoAP: Mixture of Experts Made Personalized: Federated Prompt Learning for Vision-Language Models.

Jun Luo, Chen Chen, Shandong Wu. ICLR 2025. https://arxiv.org/abs/2410.10114

| paper | here |
|---|---|
| P_i, the client's own prompt | ``LocalAndOthers.ctx`` (1, M, W), with ``CSC`` (1, C, M, W) |
| P_j, prompts of other clients | ``LocalAndOthers.others`` (K - 1, M, W), frozen, brought by the protocol ``federated`` |
| local attention-based gating network | ``AttentionGate`` |
| lambda | ``LAMBDA`` |
| rounds, clients, the server's average, which others' prompts | protocol ``federated`` (``promptmix.runs.federated``) |

This file is what one client trains. Alone, without a server, there are no prompts of others: scores are CoOp's, the gate waits.

Deviations from the authors' code: schedule and momentum belong to each client, where theirs run on from client to client and past
the cosine's end; each client keeps its own gate, where theirs leak. The gate's rate is constant (``GATE_LR``), as theirs is in
effect, and its weight decay that of ``OPTIM``. Biases of W_k, W_v and W_o have no gradient but rounding: no softmax sees
a shift.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from promptmix.plugins.heads.attention_gate import AttentionGate
from promptmix.plugins.prompt_bank.shared_experts import LocalAndOthers

from promptmix import register
from promptmix.config.declare import Setting, inherits, parted
from promptmix.engine import build_optimizer
from promptmix.prompts.learner import Learner, PromptLearner
from promptmix.prompts.roles import Task
from promptmix.prompts.trainer import PromptTrainer


@register
class PFedMoAP(PromptTrainer):
    """One client: its own soft prompt, prompts of other clients, and a gate over them."""

    @inherits(LocalAndOthers)
    @inherits(AttentionGate)
    def compose(
        self,
        task: Task,
        gate_lr: Annotated[float, Setting("learning rate of the gate, the same in every epoch", above=0)] = 0.01,
        **parts: Any,
    ) -> Learner:
        self.gate_lr = gate_lr
        prompts, gate = parted(parts, LocalAndOthers)
        bank = LocalAndOthers(task, **prompts)
        return Learner(task, bank, head=AttentionGate(task, bank, **gate))

    def build_optimizer(self, model: PromptLearner) -> torch.optim.Optimizer:
        """Return the optimizer that ``OPTIM`` names, with the gate as its second group."""
        learner: Any = model
        gate = {"params": list(learner.head.parameters()), "lr": self.gate_lr, "constant": True}
        return build_optimizer(model, self.cfg.OPTIM, [{"params": [learner.bank.ctx]}, gate])
