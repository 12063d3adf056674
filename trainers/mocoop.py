"""MoCoOp: Mixture of Prompt Learning for Vision Language Models.

Yu Du, Tong Niu, Rong Zhao. Frontiers in Artificial Intelligence 2025. https://arxiv.org/abs/2409.12011

| paper | here |
|---|---|
| hard prompt template groups G_1 ... G_E | ``TemplateGroups.groups``, one soft prompt each |
| router r, top-K | ``HardPromptTopK.gate``, ``ROUTER.HARDPROMPTTOPK.K`` |
| hard prompt guided routing loss | ``HardPromptTopK.loss``, weight ``GATE_WEIGHT`` |
| semantically grouped text supervision | ``GroupedContrastive``, weight ``TEXT_WEIGHT`` |
| L = L_ce + 5 L_text + L_gate | ``Mixture.loss`` |

Deviations from the authors' code, each where theirs does not do what it says: context lengths are counted in tokens, not words;
all class names keep the data set's order, base first (theirs pass through a set, so the loss depends on the hash seed);
GROUPS and the templates are declared keys; the joint width may differ from the token width. Their noise on hard features
touches nothing that is used and is left out.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from yacs.config import CfgNode

from promptmix import hookimpl
from promptmix.engine import build_lr_scheduler, build_optimizer
from promptmix.errors import ConfigError
from promptmix.prompts.learner import Mixture
from promptmix.prompts.roles import PromptLearner, Task, build_component
from promptmix.prompts.trainer import PromptTrainer
from promptmix.registry import Registry


class MoCoOp(PromptTrainer):
    """Template groups as experts, a router taught by hard prompts, and grouped text supervision."""

    roles = {"PROMPT_BANK": "TemplateGroups", "ROUTER": "HardPromptTopK", "TEXT_SUPERVISION": "GroupedContrastive"}

    @staticmethod
    def add_config(node: CfgNode) -> None:
        """Declare MoCoOp's keys; the components' own settings lie under ``PROMPT_BANK``, ``ROUTER``, ``TEXT_SUPERVISION``."""
        node.TEXT_WEIGHT = 5.0  # factor on the text supervision
        node.GATE_WEIGHT = 1.0  # factor on the router's loss
        node.TUNE_LAYERNORM = False  # also train ln_1 and ln_2 of the image tower's layers
        node.LAYERNORM_LR_FACTOR = 0.1  # their learning rate over OPTIM.LR

    def build_learner(self, task: Task) -> PromptLearner:
        """Return the mixture of whoever plays the three roles."""
        bank = build_component(self.cfg, "PROMPT_BANK", self.roles["PROMPT_BANK"], task)
        if bank is None:
            raise ConfigError("PROMPT_BANK.NAME is 'none', but MoCoOp can't do without prompts; leave the key out")
        router = build_component(self.cfg, "ROUTER", self.roles["ROUTER"], task, bank)
        supervision = build_component(self.cfg, "TEXT_SUPERVISION", self.roles["TEXT_SUPERVISION"], task, bank)
        return Mixture(task, bank, router, supervision, router_weight=self.node.GATE_WEIGHT, text_weight=self.node.TEXT_WEIGHT)

    def build_model(self) -> None:
        """Build the mixture and, if asked for, put the image tower's layer norms under training as a second model."""
        super().build_model()
        if not self.node.TUNE_LAYERNORM:
            return
        norms = _layer_norms(self.clip.image.visual)
        if not norms:
            raise ConfigError(
                f"TRAINER.MOCOOP.TUNE_LAYERNORM: backbone {self.cfg.MODEL.BACKBONE.NAME} has no ln_1 and ln_2 in its layers; "
                "choose a vision transformer or leave the key out"
            )
        norms.requires_grad_(True)
        self.model.image_is_frozen = False
        schedule = self.cfg.OPTIM.clone()
        schedule.defrost()  # the clone of a frozen tree is frozen too
        schedule.LR *= self.node.LAYERNORM_LR_FACTOR
        optim = build_optimizer(norms, schedule)
        self.register_model("image_norms", norms, optim, build_lr_scheduler(optim, schedule))


def _layer_norms(visual: nn.Module) -> nn.ModuleDict:
    """Return the layer norms ln_1 and ln_2 of a vision transformer's layers, named ``<layer>_ln_1``."""
    blocks: Any = getattr(getattr(visual, "transformer", None), "resblocks", [])
    return nn.ModuleDict({f"{i}_{name}": getattr(block, name) for i, block in enumerate(blocks) for name in ("ln_1", "ln_2")})


@hookimpl
def register_trainers(registry: Registry) -> None:
    """Add the trainer."""
    registry.register(MoCoOp)
