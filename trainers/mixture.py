"""Mixture: any composition of the four roles, stated in YAML alone.

No paper stands behind it. ``PROMPT_BANK.NAME``, ``ROUTER.NAME``, ``TEXT_SUPERVISION.NAME`` and ``DISTILLER.NAME`` choose the
parts, their settings lie under ``<ROLE>.<NAME IN UPPER CASE>``, and the loss is

    CE_WEIGHT * CE + ROUTER_WEIGHT * router + TEXT_WEIGHT * supervision + DISTILL_WEIGHT * distiller.

| kind of prompts | written as |
|---|---|
| one soft prompt | ``PROMPT_BANK.NAME: Soft`` |
| N soft prompts | ``Soft`` with ``PROMPT_BANK.SOFT.N_PROMPTS: N`` |
| class-specific | ``Soft`` with ``PROMPT_BANK.SOFT.CSC: True`` |
| template groups | ``TemplateGroups``, the data set's own groups or ``TEMPLATES`` and ``GROUPS`` |
| instance-conditional | ``InstanceConditional`` |

Routers: HardPromptTopK, TopK, NoisyTopK, Soft, Uniform, or none (equal weights). Supervision: GroupedContrastive, CosineToHard,
L1ToEnsemble, or none. Distillers: GatedHardPrompts, ZeroshotKL, or none. ``promptmix list`` names those of plugins too.
"""

from __future__ import annotations

from yacs.config import CfgNode

from promptmix import hookimpl
from promptmix.config import source_of
from promptmix.errors import ConfigError
from promptmix.prompts import learner as mixture
from promptmix.prompts.roles import PromptLearner, Task, build_component
from promptmix.prompts.trainer import PromptTrainer
from promptmix.registry import Registry

#: The weight that belongs to each role a mixture may do without.
WEIGHTS = {"ROUTER": "ROUTER_WEIGHT", "TEXT_SUPERVISION": "TEXT_WEIGHT", "DISTILLER": "DISTILL_WEIGHT"}


class Mixture(PromptTrainer):
    """Whoever the config names for each role; one soft prompt and nothing else where it names nobody, which is CoOp."""

    roles = {"PROMPT_BANK": "Soft", "ROUTER": "", "TEXT_SUPERVISION": "", "DISTILLER": ""}

    @staticmethod
    def add_config(node: CfgNode) -> None:
        """Declare the weights of the loss."""
        node.CE_WEIGHT = 1.0  # factor on the cross-entropy
        node.ROUTER_WEIGHT = 1.0  # factor on the router's loss
        node.TEXT_WEIGHT = 1.0  # factor on the text supervision
        node.DISTILL_WEIGHT = 1.0  # factor on the distiller's loss

    @classmethod
    def validate(cls, cfg: CfgNode) -> None:
        """Refuse a mixture without prompts, and weights that nobody reads."""
        if cfg.PROMPT_BANK.NAME == "none":
            raise ConfigError("PROMPT_BANK.NAME is 'none', but a mixture can't do without prompts; leave the key out")
        for role, weight in WEIGHTS.items():
            key = f"TRAINER.MIXTURE.{weight}"
            if cfg[role].NAME in ("", "none") and source_of(cfg, key):
                raise ConfigError(
                    f"{key} (set by {source_of(cfg, key)}) would be ignored, since {role}.NAME names nobody; drop it"
                )

    def build_learner(self, task: Task) -> PromptLearner:
        """Return the composition that the config states."""
        cfg, node = self.cfg, self.node
        bank = build_component(cfg, "PROMPT_BANK", self.roles["PROMPT_BANK"], task)
        router, supervision, distiller = (build_component(cfg, role, "", task, bank) for role in WEIGHTS)
        return mixture.Mixture(
            task,
            bank,
            router,
            supervision,
            distiller,
            ce_weight=node.CE_WEIGHT,
            router_weight=node.ROUTER_WEIGHT,
            text_weight=node.TEXT_WEIGHT,
            distill_weight=node.DISTILL_WEIGHT,
        )


@hookimpl
def register_trainers(registry: Registry) -> None:
    """Add the trainer."""
    registry.register(Mixture)
