"""Gated distillation from hard prompts (MoPD, arXiv 2412.19087, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from promptmix import register
from promptmix.config.declare import Setting
from promptmix.errors import SettingError
from promptmix.prompts.roles import Distiller, PromptBank, Routing, Task
from promptmix.prompts.step import Step


@register
class GatedHardPrompts(Distiller):
    """P hard prompts teach; a gate (D, P) chooses K of them for each image and weighs them by a.

    With teachers h_j = s <f, hard_j>: MPD = mean_b sum_j a_j T^2 KL(softmax(h_j / T) || softmax(student / T)) hands on what
    they know, and MPS = mean_b sum_j a_j CE(h_j, y) teaches the gate which of them to trust.

    Raises:
        ConfigError: ``k`` is above the number of teachers.
    """

    teachers: Tensor

    needs_all_images = False

    def __init__(
        self,
        task: Task,
        bank: PromptBank,
        templates: Annotated[Sequence[str], Setting("the P hard templates; () = the data set's own")] = (),
        k: Annotated[int, Setting("hard prompts kept per image", low=1)] = 2,
        t: Annotated[float, Setting("temperature T of the distillation", above=0)] = 1.0,
        mpd_weight: Annotated[float, Setting("factor on MPD: 1 - W in the paper, where CE_WEIGHT is W", low=0)] = 0.2,
        mps_weight: Annotated[float, Setting("factor on MPS: W2 in the paper", low=0)] = 0.1,
    ) -> None:
        super().__init__()
        templates = templates or task.templates
        if not 1 <= k <= len(templates):
            raise SettingError("k", k, f"but must be from 1 to the number of hard templates, {len(templates)}")
        self.templates = tuple(templates)
        self.scale, self.k, self.t = task.clip.scale.item(), k, t
        self.mpd_weight, self.mps_weight = mpd_weight, mps_weight
        self.register_buffer("teachers", task.clip.hard_features(templates, task.classnames), persistent=False)  # (P, C, D)
        self.gate = nn.Parameter(torch.zeros(task.clip.embed_dim, len(templates)))

    def forward(self, step: Step) -> Tensor:
        """Return the weighted sum of both losses (scalar)."""
        mpd, mps = self.terms(step.query, step.logits, step.labels)
        return self.mpd_weight * mpd + self.mps_weight * mps

    def route(self, image_features: Tensor) -> Routing:
        """Return which teachers (B, K) each image listens to, and their weights a."""
        return Routing.top_k(image_features @ self.gate, self.k)

    def terms(self, image_features: Tensor, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return MPD and MPS (scalars) for features (B, D), student logits (B, C) and labels (B,)."""
        routing = self.route(image_features)
        with torch.no_grad():
            # All teachers' scores (B, P, C) are a matrix product; picking features first would take a (B, K, C, D) copy.
            scores = torch.einsum("bd,pcd->bpc", image_features.to(self.teachers.dtype), self.teachers)
            taught = self.scale * scores.take_along_dim(routing.experts[:, :, None], dim=1).float()  # (B, K, C)
        target = (taught / self.t).log_softmax(dim=-1)
        student = (logits.float() / self.t).log_softmax(dim=-1)[:, None].expand_as(target)
        divergence = self.t**2 * F.kl_div(student, target, reduction="none", log_target=True).sum(dim=-1)  # (B, K)
        wrong = F.cross_entropy(taught.transpose(1, 2), labels[:, None].expand(-1, self.k), reduction="none")  # (B, K)
        return (routing.weights * divergence).sum(dim=1).mean(), (routing.weights * wrong).sum(dim=1).mean()
