"""PromptSRC: Self-regulating Prompts: Foundational Model Adaptation without Forgetting.

Muhammad Uzair Khattak, Syed Talal Wasim, Muzammal Naseer, Salman Khan, Ming-Hsuan Yang, Fahad Shahbaz Khan. ICCV 2023.
https://arxiv.org/abs/2307.06948

| paper | here |
|---|---|
| P_t, P_v, independent prompts of the first layers | ``IndependentPrompts``, keys as IVLP's |
| g~, f~: frozen features; g~ is the mean over 60 templates (textual diversity) | ``ensemble`` (C, D), ``frozen`` (B, D) |
| L_SCL-text = L1(g_p, g~), weight lambda_1 = 25 | part ``text_l1``, ``TEXT_LOSS_WEIGHT`` |
| L_SCL-image = L1(f_p, f~), weight lambda_2 = 10 | part ``image_l1``, ``IMAGE_LOSS_WEIGHT`` |
| L_SCL-logits = KL of the two logits | part ``logit_kl``, over B * C as the authors compute it |
| Gaussian weighted prompt aggregation, N(mu, sigma^2) over epochs | ``GaussianAverage``, ``GPA_MEAN``, ``GPA_STD`` |

L1 is the mean over all elements. The model that is tested and saved after the last epoch is the average.

Deviations from the authors' code (github.com/muzairkhattak/PromptSRC, trainers/promptsrc.py): the average takes learned tensors
only and is a checkpoint of its own, so that a resumed run goes on with it; it is kept as a running mean, which is the same number
and also defined where every weight of the Gaussian is too small for a float. amp and bf16 work, where theirs fails in amp;
no rounding to fp16 in fp32; PREC is ``TRAINER.PREC`` for every method.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from yacs.config import CfgNode

from promptmix import hookimpl
from promptmix.errors import ConfigError
from promptmix.prompts.deep import (
    DeepPromptTrainer,
    IndependentPrompts,
    TextPrompts,
    VisionPrompts,
    add_independent_config,
    require_at_least,
    validate_independent,
)
from promptmix.prompts.roles import LossTerms, PromptLearner, Task
from promptmix.prompts.templates import IMAGENET_60
from promptmix.registry import Registry
from promptmix.utils import get_logger


class SelfRegulatingPrompts(IndependentPrompts):
    """Independent prompts of both towers, held near the frozen model's features and predictions.

    Args:
        task: the frozen model and the class names.
        text: the text tower's prompts.
        vision: the image tower's prompts.
        text_weight: lambda_1.
        image_weight: lambda_2.
    """

    ensemble: Tensor

    def __init__(
        self, task: Task, text: TextPrompts, vision: VisionPrompts | None, text_weight: float = 25.0, image_weight: float = 10.0
    ) -> None:
        super().__init__(task, text, vision)
        self.text_weight, self.image_weight = text_weight, image_weight
        self.register_buffer("ensemble", self._ensemble(), persistent=False)

    @torch.no_grad()
    def _ensemble(self) -> Tensor:
        """Return g~ (C, D): the mean of the templates' features as they come from the tower, normalised afterwards."""
        tower, names = self.clip.text, self.task.classnames
        return F.normalize(sum(tower(tower.compose_text(t, names))[0] for t in IMAGENET_60) / len(IMAGENET_60), dim=-1)

    def encode_images(self, images: Tensor) -> Tensor:
        """Return normalised image features (B, D); in training (B, 2, D), the prompted ones and the frozen ones."""
        prompted = super().encode_images(images)
        if not self.training:
            return prompted
        with torch.no_grad():
            frozen = self.clip.encode_image(images)
        return torch.stack([prompted, frozen], dim=1)

    def logits(self, image_features: Tensor, classifier: Tensor) -> Tensor:
        """Return scores (B, C) of the prompted features."""
        return super().logits(image_features[:, 0] if image_features.dim() == 3 else image_features, classifier)

    def loss(self, image_features: Tensor, labels: Tensor) -> LossTerms:
        """Return CE + lambda_1 text + lambda_2 image + logits for features (B, 2, D) of ``encode_images`` in training."""
        prompted, frozen = image_features.unbind(dim=1)
        text = self.classifier()
        logits = self.logits(prompted, text)
        zero_shot = self.logits(frozen, self.ensemble)
        divergence = F.kl_div(logits.log_softmax(-1), zero_shot.log_softmax(-1), reduction="sum", log_target=True)
        parts = {
            "ce": F.cross_entropy(logits, labels),
            "text_l1": self.text_weight * F.l1_loss(text, self.ensemble.to(text.dtype)),
            "image_l1": self.image_weight * F.l1_loss(prompted, frozen.to(prompted.dtype)),
            "logit_kl": divergence / logits.numel(),
        }
        return LossTerms(torch.stack([part.float() for part in parts.values()]).sum(), parts, logits)


class GaussianAverage(nn.Module):
    """Average of learned tensors over epochs, weighted by a Gaussian over the epochs; it has no parameters of its own.

    Args:
        learner: whose parameters are averaged.
        mean: mu, in epochs counted from 1.
        std: sigma, in epochs.
    """

    def __init__(self, learner: nn.Module, mean: float, std: float) -> None:
        super().__init__()
        self.mean, self.std = mean, std
        for name, parameter in learner.named_parameters():
            self.register_buffer(_flat(name), parameter.detach().clone())

    @torch.no_grad()
    def update(self, learner: nn.Module, epoch: int) -> None:
        """Take the parameters after ``epoch`` (counted from 1) into the average."""
        logs = -0.5 * ((torch.arange(1, epoch + 1, dtype=torch.float64) - self.mean) / self.std) ** 2
        share = float(logs.softmax(dim=0)[-1])  # of this epoch among those so far; 1 for the first
        for name, parameter in learner.named_parameters():
            average = self.get_buffer(_flat(name))
            average.copy_(torch.lerp(average, parameter, share))

    @torch.no_grad()
    def write_to(self, learner: nn.Module) -> None:
        """Give ``learner`` the averaged parameters."""
        for name, parameter in learner.named_parameters():
            parameter.copy_(self.get_buffer(_flat(name)))


def _flat(name: str) -> str:
    return name.replace(".", "/")  # names of buffers take no dots


class PromptSRC(DeepPromptTrainer):
    """Deep prompts in both towers, regulated by the frozen model and averaged over epochs."""

    @staticmethod
    def add_config(node: CfgNode) -> None:
        """Declare PromptSRC's keys, as the authors name them."""
        add_independent_config(node, n_ctx=4, depth=9)
        node.TEXT_LOSS_WEIGHT = 25.0  # lambda_1
        node.IMAGE_LOSS_WEIGHT = 10.0  # lambda_2
        node.GPA_MEAN = 15.0  # mu: epoch, counted from 1, with the largest weight in the average
        node.GPA_STD = 1.0  # sigma, in epochs

    @classmethod
    def validate(cls, cfg: CfgNode) -> None:
        """Refuse numbers that can't work; without visual prompts the image loss would do nothing."""
        validate_independent(cfg, "TRAINER.PROMPTSRC")
        require_at_least(cfg, "TRAINER.PROMPTSRC", N_CTX_VISION=1, TEXT_LOSS_WEIGHT=0, IMAGE_LOSS_WEIGHT=0)
        if cfg.TRAINER.PROMPTSRC.GPA_STD <= 0:
            raise ConfigError(f"TRAINER.PROMPTSRC.GPA_STD is {cfg.TRAINER.PROMPTSRC.GPA_STD}, but must be above 0")

    def build_learner(self, task: Task) -> PromptLearner:
        """Return the regulated prompts of both towers."""
        weights = self.node.TEXT_LOSS_WEIGHT, self.node.IMAGE_LOSS_WEIGHT
        return SelfRegulatingPrompts(task, *self.independent_parts(task), *weights)

    def build_model(self) -> None:
        """Build the learner and, beside it, its average over epochs."""
        super().build_model()
        self.average = GaussianAverage(self.model, self.node.GPA_MEAN, self.node.GPA_STD)
        self.register_model("weight_average", self.average)

    def run_epoch(self) -> None:
        """Learn for one epoch and take it into the average, which replaces the weights after the last."""
        super().run_epoch()
        self.average.update(self.model, self.epoch + 1)
        if self.epoch + 1 == self.max_epoch:
            get_logger().info("Using the Gaussian-weighted average of %d epochs", self.max_epoch)
            self.average.write_to(self.model)


@hookimpl
def register_trainers(registry: Registry) -> None:
    """Add the trainer."""
    registry.register(PromptSRC)
