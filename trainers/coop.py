"""CoOp: Learning to Prompt for Vision-Language Models.

Kaiyang Zhou, Jingkang Yang, Chen Change Loy, Ziwei Liu. IJCV 2022. https://arxiv.org/abs/2109.01134

| paper | here |
|---|---|
| [V]_1 ... [V]_M | ``Soft.ctx`` (1, M, W), or (1, C, M, W) class-specific |
| g(t_i) | ``TextTower`` on ``[SOT] ctx name . [EOT]`` |
| tau | 1 / ``CLIP.scale`` |

Deviations from the authors' code: none in the numbers (``tests/golden`` holds theirs). Prompts run in the trainer's precision,
fp32 by default, where the authors use fp16 weights.
"""

from __future__ import annotations

from yacs.config import CfgNode

from promptmix import hookimpl
from promptmix.prompts.context import add_context_keys, build_soft_prompt, validate_context
from promptmix.prompts.learner import Mixture
from promptmix.prompts.roles import PromptLearner, Task
from promptmix.prompts.trainer import PromptTrainer
from promptmix.registry import Registry


class CoOp(PromptTrainer):
    """One soft prompt, trained with cross-entropy."""

    @staticmethod
    def add_config(node: CfgNode) -> None:
        """Declare CoOp's keys, as the authors name them."""
        add_context_keys(node)

    @classmethod
    def validate(cls, cfg: CfgNode) -> None:
        """Refuse a context length that the initial words would override."""
        validate_context(cfg, "TRAINER.COOP")

    def build_learner(self, task: Task) -> PromptLearner:
        """Return one soft prompt without router, supervision or distiller."""
        return Mixture(task, build_soft_prompt(task, self.node))


@hookimpl
def register_trainers(registry: Registry) -> None:
    """Add the trainer."""
    registry.register(CoOp)
