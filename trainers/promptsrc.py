"""PromptSRC: Self-regulating Prompts: Foundational Model Adaptation without Forgetting.

Muhammad Uzair Khattak, Syed Talal Wasim, Muzammal Naseer, Salman Khan, Ming-Hsuan Yang, Fahad Shahbaz Khan. ICCV 2023.
https://arxiv.org/abs/2307.06948

| paper | here |
|---|---|
| P_t, P_v, independent prompts of the first layers | ``IndependentDeep``, keys as IVLP's |
| g~, f~: frozen features; g~ over 60 templates | ``L1ToEnsemble.hard`` (C, D), ``Step.frozen_image`` (B, D) |
| L_SCL-text = L1(g_p, g~), weight lambda_1 = 25 | ``L1ToEnsemble``, ``TEXT_LOSS_WEIGHT`` |
| L_SCL-image = L1(f_p, f~), weight lambda_2 = 10 | ``FrozenImageL1``, ``IMAGE_LOSS_WEIGHT`` |
| L_SCL-logits = KL of the two logits | ``ZeroshotKL``, over B * C as the authors compute it |
| Gaussian weighted prompt aggregation, N(mu, sigma^2) over epochs | ``GaussianAverage``, ``GPA_MEAN``, ``GPA_STD`` |

L1 is the mean over all elements. The model that is tested and saved after the last epoch is the average.

Deviations from the authors' code (github.com/muzairkhattak/PromptSRC, trainers/promptsrc.py): the average takes learned tensors
only and is a checkpoint of its own, so that a resumed run goes on with it; it is kept as a running mean, which is the same number
and also defined where every weight of the Gaussian is too small for a float. amp and bf16 work, where theirs fails in amp;
no rounding to fp16 in fp32; PREC is ``TRAINER.PREC`` for every method.
"""

from __future__ import annotations

from typing import Annotated, Any

from promptmix.plugins.distillation.frozen_image import FrozenImageL1
from promptmix.plugins.distillation.zeroshot_kl import ZeroshotKL
from promptmix.plugins.prompt_bank.independent_deep import IndependentDeep
from promptmix.plugins.text_supervision.hard_prompts import L1ToEnsemble

from promptmix import register
from promptmix.config.declare import Setting, inherits
from promptmix.data.templates import IMAGENET_60
from promptmix.engine.layout import INDEPENDENT, Layout
from promptmix.errors import SettingError
from promptmix.prompts.average import GaussianAverage
from promptmix.prompts.heads import Cosine
from promptmix.prompts.learner import Learner, PromptLearner
from promptmix.prompts.losses import CrossEntropy
from promptmix.prompts.roles import Task
from promptmix.prompts.trainer import PromptTrainer


@register
class PromptSRC(PromptTrainer):
    """Deep prompts in both towers, regulated by the frozen model and averaged over epochs."""

    layout = Layout("VLPromptLearner", INDEPENDENT, whole=True, unused=(r"ZS_image_encoder\..*",))

    @inherits(IndependentDeep, without=["n_prompts"], n_ctx_vision=4, n_ctx_text=4)
    def compose(
        self,
        task: Task,
        text_loss_weight: Annotated[float, Setting("lambda_1", low=0)] = 25.0,
        image_loss_weight: Annotated[float, Setting("lambda_2; without visual prompts it would do nothing", low=0)] = 10.0,
        gpa_mean: Annotated[float, Setting("mu: epoch, counted from 1, with the largest weight in the average")] = 15.0,
        gpa_std: Annotated[float, Setting("sigma, in epochs", above=0)] = 1.0,
        **deep: Any,
    ) -> Learner:
        """Return the prompts of both towers with the loss L_ce + lambda_1 L_text + lambda_2 L_image + L_logits."""
        if not deep["n_ctx_vision"]:
            raise SettingError("n_ctx_vision", 0, "but PromptSRC regulates prompted image features; set it to 1 or more")
        prompts = IndependentDeep(task, **deep)
        text = L1ToEnsemble(task, prompts, IMAGENET_60).named("text_l1", weighted=True)
        image = FrozenImageL1(task, prompts).named("image_l1", weighted=True)
        scores = ZeroshotKL(task, prompts, IMAGENET_60, raw=True, over_classes=True).named("logit_kl")
        loss = CrossEntropy() + text_loss_weight * text + image_loss_weight * image + scores
        return Learner(task, prompts, head=Cosine(task, prompts), loss=loss)

    def weight_average(self, model: PromptLearner) -> GaussianAverage:
        """Return the average over epochs, N(mu, sigma^2)."""
        return GaussianAverage(model, self.node.GPA_MEAN, self.node.GPA_STD)
