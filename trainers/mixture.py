"""Mixture: any composition of the roles, stated in YAML alone.

No paper stands behind it. ``PROMPT_BANK.NAME``, ``ROUTER.NAME``, ``HEAD.NAME``, ``TEXT_SUPERVISION.NAME`` and ``DISTILLER.NAME``
choose the parts, their settings lie under ``<ROLE>.<NAME IN UPPER CASE>``, and the loss is

    CE_WEIGHT * CE + ROUTER_WEIGHT * router + TEXT_WEIGHT * supervision + DISTILL_WEIGHT * distiller.

| kind of prompts | written as |
|---|---|
| one soft prompt | ``PROMPT_BANK.NAME: Soft`` |
| N soft prompts | ``Soft`` with ``PROMPT_BANK.SOFT.N_PROMPTS: N`` |
| class-specific | ``Soft`` with ``PROMPT_BANK.SOFT.CSC: True`` |
| template groups | ``TemplateGroups``, the data set's own groups or ``TEMPLATES`` and ``GROUPS`` |
| instance-conditional | ``InstanceConditional`` |
| deep in both towers | ``IndependentDeep`` (IVLP), ``CoupledDeep`` (MaPLe), ``N_PROMPTS: E`` makes a mixture of them |

A supervision or distiller may be a sum: ``DISTILLER.NAME: "10 * FrozenImageL1 + ZeroshotKL"``.

Routers: HardPromptTopK, TopK, NoisyTopK, Soft, Uniform, or none (equal weights). Supervisions: GroupedContrastive, CosineToHard,
L1ToEnsemble. Distillers: GatedHardPrompts, ZeroshotKL, FrozenImageL1. ``promptmix list`` names those of plugins too.
"""

from __future__ import annotations

from typing import Annotated

from promptmix.plugins.prompt_bank.soft import Soft
from yacs.config import CfgNode

from promptmix import register
from promptmix.config import source_of
from promptmix.config.declare import Setting
from promptmix.errors import ConfigError
from promptmix.prompts.heads import WeightedScores
from promptmix.prompts.learner import Learner
from promptmix.prompts.losses import CrossEntropy, RouterLoss
from promptmix.prompts.roles import Task
from promptmix.prompts.trainer import PromptTrainer

#: The weight that belongs to each role a mixture may do without.
WEIGHTS = {"ROUTER": "ROUTER_WEIGHT", "TEXT_SUPERVISION": "TEXT_WEIGHT", "DISTILLER": "DISTILL_WEIGHT"}


@register
class Mixture(PromptTrainer):
    """The parts that the config names for each role; one soft prompt and nothing else where it names none, which is CoOp."""

    roles = {"PROMPT_BANK": Soft, "ROUTER": "", "HEAD": WeightedScores, "TEXT_SUPERVISION": "", "DISTILLER": ""}

    @classmethod
    def validate(cls, cfg: CfgNode) -> None:
        """Refuse a mixture without prompts, and weights that nobody reads."""
        if cfg.PROMPT_BANK.NAME == "none":
            raise ConfigError("PROMPT_BANK.NAME is 'none', but a mixture can't do without prompts; leave the key out")
        for role, weight in WEIGHTS.items():
            key = f"TRAINER.MIXTURE.{weight}"
            if cfg[role].NAME in ("", "none") and source_of(cfg, key):
                raise ConfigError(
                    f"{key} (set by {source_of(cfg, key)}) would be ignored, since {role}.NAME names no part; drop it"
                )

    def compose(
        self,
        task: Task,
        ce_weight: Annotated[float, Setting("factor on the cross-entropy", low=0)] = 1.0,
        router_weight: Annotated[float, Setting("factor on the router's loss", low=0)] = 1.0,
        text_weight: Annotated[float, Setting("factor on the text supervision", low=0)] = 1.0,
        distill_weight: Annotated[float, Setting("factor on the distiller's loss", low=0)] = 1.0,
    ) -> Learner:
        bank = self.bank(task)
        router, head = self.part("ROUTER", task, bank), self.part("HEAD", task, bank)
        loss = ce_weight * CrossEntropy() + router_weight * RouterLoss(router)
        for role, weight in (("TEXT_SUPERVISION", text_weight), ("DISTILLER", distill_weight)):
            found = self.losses(role, task, bank)
            loss = loss if found is None else loss + weight * found
        return Learner(task, bank, router, head, loss)
