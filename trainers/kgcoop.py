"""KgCoOp: Visual-Language Prompt Tuning with Knowledge-guided Context Optimization.

Hantao Yao, Rui Zhang, Changsheng Xu. CVPR 2023. https://arxiv.org/abs/2303.13283

| paper | here |
|---|---|
| t_i, learnable prompt | ``Soft.ctx`` (1, M, W), M = 4 from "a photo of a" |
| w_i^clip, general knowledge | ``CosineToHard.hard``: features of the data set's hard template |
| w_i, learned embedding | ``Soft.forward`` |
| L_kg | ``CosineToHard.forward``: 1 - mean cosine, half the squared distance of unit vectors |
| lambda = 8 | ``W`` |
| L = L_ce + lambda L_kg | ``Mixture.loss`` |

Deviations from the authors' code: hard features have the trainer's precision (theirs stay fp16 even in fp32 mode). Their
meta-net, adapter and bias vectors touch nothing that is used and are left out.
"""

from __future__ import annotations

from yacs.config import CfgNode

from promptmix import hookimpl
from promptmix.prompts.context import add_context_keys, build_soft_prompt, validate_context
from promptmix.prompts.learner import Mixture
from promptmix.prompts.roles import PromptLearner, Task
from promptmix.prompts.trainer import PromptTrainer
from promptmix.registry import TEXT_SUPERVISION_REGISTRY, Registry


class KgCoOp(PromptTrainer):
    """One soft prompt, held near the hard prompt by the cosine of their text features."""

    @staticmethod
    def add_config(node: CfgNode) -> None:
        """Declare KgCoOp's keys, as the authors name them."""
        add_context_keys(node, n_ctx=4, ctx_init="a photo of a")
        node.W = 8.0  # lambda: factor on 1 - mean cosine
        node.TEMPLATES = ()  # ours: hard prompts to stay near, ensembled; () = the data set's first

    @classmethod
    def validate(cls, cfg: CfgNode) -> None:
        """Refuse a context length that the initial words would override."""
        validate_context(cfg, "TRAINER.KGCOOP")

    def build_learner(self, task: Task) -> PromptLearner:
        """Return one soft prompt under cosine supervision."""
        bank = build_soft_prompt(task, self.node)
        supervision = TEXT_SUPERVISION_REGISTRY.get("CosineToHard")(task, bank, templates=self.node.TEMPLATES)
        return Mixture(task, bank, supervision=supervision, text_weight=self.node.W)


@hookimpl
def register_trainers(registry: Registry) -> None:
    """Add the trainer."""
    registry.register(KgCoOp)
