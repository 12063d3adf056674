"""MoPD: Mixture-of-Prompts Distillation for Vision-Language Models.

Yang Chen, Shuai Fu, Yu Zhang. IEEE Transactions on Multimedia 2025. https://arxiv.org/abs/2412.19087

| paper | here |
|---|---|
| student: soft prompt | ``Soft.ctx`` (1, M, W), M = 4 from "a photo of a" |
| teachers: pool of P hard prompts | ``GatedHardPrompts.teachers`` (P, C, D), of ``TEMPLATES`` |
| gating network, top k | ``GatedHardPrompts.gate`` (D, P), ``K`` |
| L_MPD, distillation | ``GatedHardPrompts.terms``, temperature ``T`` |
| L_MPS, prompt selection | ``GatedHardPrompts.terms`` |
| L = W L_ce + (1 - W) L_MPD + W2 L_MPS | ``MoPD.compose`` |

Inference uses the student alone. Deviations from the authors' code: none in the numbers; teachers and gate have the joint width
of the model, where theirs is fixed at 512.
"""

from __future__ import annotations

from typing import Annotated, Any

from promptmix.plugins.distillation.gated_hard_prompts import GatedHardPrompts
from promptmix.plugins.prompt_bank.soft import Soft

from promptmix import register
from promptmix.config.declare import Setting, inherits, parted
from promptmix.config.published import Theirs
from promptmix.engine.layout import Layout, Rule
from promptmix.prompts.learner import Learner
from promptmix.prompts.losses import CrossEntropy
from promptmix.prompts.roles import Task
from promptmix.prompts.trainer import PromptTrainer


@register
class MoPD(PromptTrainer):
    """One soft prompt, taught by the hard prompts that a gate trusts for the image."""

    published_keys = {
        "TRAINER.COOP.*": "*",
        "TRAINER.COOP.CTX_INIT": Theirs("CTX_INIT", {"True": "a photo of a", "False": ""}),
        "LOSS.num_prompts": "K",
        "LOSS.T": "T",
    }
    layout = Layout("prompt_learner", (Rule("ctx", "bank.ctx", expert_axis=True), Rule("gate", "losses.distill.gate")))

    @inherits(Soft, without=["n_prompts"], n_ctx=4, ctx_init="a photo of a")
    @inherits(GatedHardPrompts, without=["mpd_weight", "mps_weight"])
    def compose(
        self,
        task: Task,
        w: Annotated[float, Setting("W: factor on the cross-entropy; the distillation gets 1 - W", low=0, high=1)] = 0.8,
        w2: Annotated[float, Setting("W2: factor on the prompt selection", low=0)] = 0.1,
        **settings: Any,
    ) -> Learner:
        """Return the student with the loss W L_ce + (1 - W) L_MPD + W2 L_MPS."""
        teachers, soft = parted(settings, GatedHardPrompts)
        student = Soft(task, **soft)
        distillation = GatedHardPrompts(task, student, mpd_weight=1 - w, mps_weight=w2, **teachers)
        return Learner(task, student, loss=w * CrossEntropy() + distillation)
