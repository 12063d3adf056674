"""MoCoOp: Mixture of Prompt Learning for Vision Language Models.

Yu Du, Tong Niu, Rong Zhao. Frontiers in Artificial Intelligence 2025. https://arxiv.org/abs/2409.12011

| paper | here |
|---|---|
| hard prompt template groups G_1 ... G_E | ``TemplateGroups.groups``, one soft prompt each |
| router r, top-K | ``HardPromptTopK.gate``, ``ROUTER.HARDPROMPTTOPK.K`` |
| hard prompt guided routing loss | ``HardPromptTopK.loss``, weight ``GATE_WEIGHT`` |
| semantically grouped text supervision | ``GroupedContrastive``, weight ``TEXT_WEIGHT`` |
| L = L_ce + 5 L_text + L_gate | ``MoCoOp.compose`` |

Deviations from the authors' code, each where theirs does not do what it says: context lengths are counted in tokens, not words
(``COUNT_WORDS`` counts as theirs does, which their checkpoints of ImageNet, Caltech101, DTD and UCF101 have);
all class names keep the data set's order, base first (theirs pass through a set, so the loss depends on the hash seed);
groups of templates are ``DATASET.TEMPLATE_GROUPS``, or the data set's; the joint width may differ from the token width. Their
noise on hard features touches nothing that is used and is left out.
"""

from __future__ import annotations

from typing import Annotated, Any

from promptmix.plugins.prompt_bank.template_groups import TemplateGroups
from promptmix.plugins.router.topk import HardPromptTopK
from promptmix.plugins.text_supervision.grouped import GroupedContrastive
from torch import nn

from promptmix import register
from promptmix.config.declare import Setting
from promptmix.config.published import Theirs
from promptmix.engine import build_lr_scheduler, build_optimizer
from promptmix.engine.layout import Layout, Rule, linear
from promptmix.errors import ConfigError
from promptmix.prompts.learner import Learner
from promptmix.prompts.losses import CrossEntropy, RouterLoss
from promptmix.prompts.roles import Task
from promptmix.prompts.trainer import PromptTrainer


@register
class MoCoOp(PromptTrainer):
    """Template groups as experts, a router taught by hard prompts, and grouped text supervision."""

    roles = {"PROMPT_BANK": TemplateGroups, "ROUTER": HardPromptTopK, "TEXT_SUPERVISION": GroupedContrastive}
    published_keys = {
        "--exp": Theirs(),  # what their log is called
        "DATASET.INCLUDE_ALL_CLASSES": Theirs(values={"True": True, "False": False}),  # as DATASET.SUBSAMPLE_CLASSES says here
    }
    layout = Layout(
        "prompt_learner",
        (
            Rule("ctx_before_{i}", "bank.before.{i}"),
            Rule("ctx_after_{i}", "bank.after.{i}"),
            Rule("w", "bank.correction"),
            *linear("gate", "router.gate"),
            *linear("image_encoder.transformer.resblocks.{i}.ln_1", "image_norms/{i}_ln_1"),
            *linear("image_encoder.transformer.resblocks.{i}.ln_2", "image_norms/{i}_ln_2"),
        ),
        whole=True,
        unused=(r"class_text_features", r"grouped_prototypes"),
    )

    def compose(
        self,
        task: Task,
        text_weight: Annotated[float, Setting("factor on the text supervision", low=0)] = 5.0,
        gate_weight: Annotated[float, Setting("factor on the router's loss", low=0)] = 1.0,
        tune_layernorm: Annotated[bool, Setting("also train ln_1 and ln_2 of the image tower's layers")] = False,
        layernorm_lr_factor: Annotated[
            float, Setting("their learning rate over OPTIM.LR", above=0, needs=(("TRAINER.MOCOOP.TUNE_LAYERNORM", (True,)),))
        ] = 0.1,
    ) -> Learner:
        """Return the experts with their router and the loss L_ce + L_gate + 5 L_text."""
        bank = self.bank(task)
        router = self.part("ROUTER", task, bank)
        text = self.losses("TEXT_SUPERVISION", task, bank)
        loss = CrossEntropy() + gate_weight * RouterLoss(router)
        return Learner(task, bank, router, loss=loss if text is None else loss + text_weight * text)

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
