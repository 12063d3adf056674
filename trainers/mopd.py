"""MoPD: Mixture-of-Prompts Distillation for Vision-Language Models.

Yang Chen, Shuai Fu, Yu Zhang. IEEE Transactions on Multimedia 2025. https://arxiv.org/abs/2412.19087

| paper | here |
|---|---|
| student: soft prompt | ``Soft.ctx`` (1, M, W), M = 4 from "a photo of a" |
| teachers: pool of P hard prompts | ``GatedHardPrompts.teachers`` (P, C, D), of ``TEMPLATES`` |
| gating network, top k | ``GatedHardPrompts.gate`` (D, P), ``K`` |
| L_MPD, distillation | ``GatedHardPrompts.terms``, temperature ``T`` |
| L_MPS, prompt selection | ``GatedHardPrompts.terms`` |
| L = W L_ce + (1 - W) L_MPD + W2 L_MPS | ``Mixture.loss`` |

Inference uses the student alone. Deviations from the authors' code: none in the numbers; teachers and gate have the joint width
of the model, where theirs is fixed at 512.
"""

from __future__ import annotations

from yacs.config import CfgNode

from promptmix import hookimpl
from promptmix.errors import ConfigError
from promptmix.prompts.context import add_context_keys, build_soft_prompt, validate_context
from promptmix.prompts.learner import Mixture
from promptmix.prompts.roles import PromptLearner, Task
from promptmix.prompts.trainer import PromptTrainer
from promptmix.registry import DISTILLER_REGISTRY, Registry


class MoPD(PromptTrainer):
    """One soft prompt, taught by the hard prompts that a gate trusts for the image."""

    @staticmethod
    def add_config(node: CfgNode) -> None:
        """Declare MoPD's keys; W and W2 as the authors name them."""
        add_context_keys(node, n_ctx=4, ctx_init="a photo of a")
        node.TEMPLATES = ()  # the P hard prompts; () = the data set's own
        node.K = 2  # hard prompts kept per image
        node.T = 1.0  # temperature of the distillation
        node.W = 0.8  # factor on the cross-entropy, from 0 to 1; the distillation gets 1 - W
        node.W2 = 0.1  # factor on the prompt selection

    @classmethod
    def validate(cls, cfg: CfgNode) -> None:
        """Refuse a weight outside 0 to 1, and a context length that the initial words would override."""
        weight = cfg.TRAINER.MOPD.W
        if not 0 <= weight <= 1:
            raise ConfigError(f"TRAINER.MOPD.W is {weight}; choose from 0 to 1, since the distillation is weighed by 1 - W")
        validate_context(cfg, "TRAINER.MOPD")

    def build_learner(self, task: Task) -> PromptLearner:
        """Return the student with its gated teachers."""
        node = self.node
        bank = build_soft_prompt(task, node)
        distiller = DISTILLER_REGISTRY.get("GatedHardPrompts")(
            task, bank, templates=node.TEMPLATES, k=node.K, t=node.T, mpd_weight=1 - node.W, mps_weight=node.W2
        )
        return Mixture(task, bank, distiller=distiller, ce_weight=node.W)


@hookimpl
def register_trainers(registry: Registry) -> None:
    """Add the trainer."""
    registry.register(MoPD)
