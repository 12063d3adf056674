"""MMRL: Multi-Modal Representation Learning for Vision-Language Models.

Yuncheng Guo, Xiaodong Gu. CVPR 2025. https://arxiv.org/abs/2503.08497

| paper | here |
|---|---|
| R, K tokens of the representation space | ``Representations.tokens`` (``N_REP_TOKENS``, ``REP_DIM``) |
| F_i^v, F_i^t, aligning functions of layer i | ``Representations.image``, ``Representations.text``: linear maps |
| layers J ... L | ``REP_LAYERS``, counted from 1 |
| f_c = P_v^c(c), frozen | ``Step.image`` |
| f_r = P_v^r(mean of the tokens), learned | ``ClassAndRepresentation.projection`` |
| L_ce = alpha L_ce^c + (1 - alpha) L_ce^r | ``ALPHA`` |
| L_cos^v + L_cos^t, weight lambda | ``FrozenImageCosine``, ``CosineToHard``, ``REG_WEIGHT`` |
| base classes: both scores; new classes: f_c alone | ``TASK`` |

TASK is the authors' key: both scores are taken for base classes (B2N), always (FS), or for the data set that was trained on (CD).
Text prompts share their first tokens with the representation tokens in between, since these are the same for every class.

Deviations from the authors' code (github.com/yunncheng/MMRL, trainers/mmrl.py): image tokens stand behind the patches, not in
front, which no attention can tell; text features are never kept from one evaluation to the next; class names that a run
did not train on (``promptmix predict --classnames``) are scored by f_c alone; what TASK CD takes for the source is a key.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from promptmix.plugins.distillation.frozen_image import FrozenImageCosine
from promptmix.plugins.heads.representation import TASKS, ClassAndRepresentation, scores_both
from promptmix.plugins.prompt_bank.representations import Representations
from promptmix.plugins.text_supervision.hard_prompts import CosineToHard
from torch import Tensor, nn

from promptmix import register
from promptmix.clip.projection import last_map
from promptmix.config.declare import Setting, inherits
from promptmix.engine.layout import Layout, Rule, linear
from promptmix.prompts.learner import Learner
from promptmix.prompts.losses import CrossEntropy
from promptmix.prompts.roles import Task
from promptmix.prompts.trainer import PromptTrainer


class OwnProjection(nn.Module):
    """P_v^r: a map (W, D) without bias, of the pretrained one's form but with a random start."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        width, joint = last_map(task.clip.image)[0].shape
        self.proj_rep = nn.Parameter(width**-0.5 * torch.randn(width, joint))

    def forward(self, x: Tensor) -> Tensor:
        """Return features (..., D) of ``x`` (..., W)."""
        return x @ self.proj_rep


@register
class MMRL(PromptTrainer):
    """Tokens of a shared representation space in the last layers of both towers, scored beside the class token."""

    published_keys = {"TASK": "TASK"}
    layout = Layout(
        "MultiModalRepresentationLearner",
        (
            Rule("representation_learner.compound_rep_tokens", "bank.tokens"),
            *linear("representation_learner.compound_rep_tokens_r2vproj.{i}", "bank.image.{i}"),
            *linear("representation_learner.compound_rep_tokens_r2tproj.{i}", "bank.text.{i}"),
            Rule("image_encoder.proj_rep", "head.projection.proj_rep"),
        ),
        whole=True,
        beside=r"representation_learner\..+|image_encoder\.proj_rep",
        unused=(r"prompt_embeddings",),
    )

    @inherits(Representations, without=["beta"])
    def compose(
        self,
        task: Task,
        alpha: Annotated[float, Setting("alpha: weight of the class token's scores", low=0, high=1)] = 0.7,
        reg_weight: Annotated[float, Setting("lambda: factor on 1 - mean cosine to frozen features, of each tower", low=0)] = 1.0,
        task_: Annotated[str, Setting("when evaluation takes both scores", choices=TASKS, at_test=True)] = "B2N",
        source: Annotated[str, Setting("TASK CD: data set that was trained on", at_test=True)] = "ImageNet",
        **representations: Any,
    ) -> Learner:
        """Return the tokens of both towers with the loss alpha L_ce^c + (1 - alpha) L_ce^r + lambda (L_cos^v + L_cos^t)."""
        bank = Representations(task, **representations)
        fuses = scores_both(self, task, task_, source)
        head = ClassAndRepresentation(task, bank, OwnProjection(task), alpha=alpha, fuses=fuses)
        own, tokens = CrossEntropy(head.class_scores), CrossEntropy(head.token_scores, "ce_rep")
        image, text = FrozenImageCosine(task, bank).named("image"), CosineToHard(task, bank)
        return Learner(task, bank, head=head, loss=alpha * own + (1 - alpha) * tokens + reg_weight * image + reg_weight * text)
