"""MMRL++: Parameter-Efficient and Interaction-Aware Representation Learning for Vision-Language Models.

Yuncheng Guo, Xiaodong Gu. IJCV 2026. https://arxiv.org/abs/2505.10088

| paper | here |
|---|---|
| MMRL's tokens, scores and loss | ``Representations``, ``ClassAndRepresentation``; see ``trainers/mmrl.py`` |
| SRRA: W + A_i B_i with one W per tower, rank r' | ``SharedAligner``, ``RES_LORA_DIM`` |
| PRC: beta F_i(R) + (1 - beta) (tokens that leave layer i - 1) | ``Representations`` with ``BETA`` |
| P_v^r = P_v^c + A B, rank r | ``LowRankBeside``, ``PROJ_LORA_DIM`` |

A run may be evaluated with another BETA. The authors' cross-data-set numbers take one for each target, a choice that looks at the
targets; say so beside any figure made that way.

Deviations from the authors' code (github.com/yunncheng/MMRL, trainers/mmrlpp.py): as in ``trainers/mmrl.py``.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from promptmix.plugins.distillation.frozen_image import FrozenImageCosine
from promptmix.plugins.heads.representation import TASKS, ClassAndRepresentation, scores_both
from promptmix.plugins.prompt_bank.representations import Representations
from promptmix.plugins.text_supervision.hard_prompts import CosineToHard
from torch import Tensor, nn

from promptmix import register
from promptmix.clip.projection import last_map, map_last
from promptmix.config.declare import Setting, inherits
from promptmix.engine.layout import Layout, Rule
from promptmix.prompts.learner import Learner
from promptmix.prompts.losses import CrossEntropy
from promptmix.prompts.roles import Task
from promptmix.prompts.trainer import PromptTrainer


class LowRankChange(nn.Module):
    """A product A B (out, in) of rank r that starts at zero.

    Args:
        rows: out.
        rank: r.
        columns: in.
    """

    def __init__(self, rows: int, rank: int, columns: int) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(rows, rank))
        self.B = nn.Parameter(torch.zeros(rank, columns))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self) -> Tensor:
        """Return A B."""
        return self.A @ self.B


class SharedAligner(nn.Module):
    """Linear maps of ``count`` layers into a tower: one weight W, and for each layer A_i B_i and a bias of its own.

    Args:
        rep_dim: d_r.
        width: of the tower.
        count: layers.
        rank: of A_i B_i.
    """

    def __init__(self, rep_dim: int, width: int, count: int, rank: int) -> None:
        super().__init__()
        start = nn.Linear(rep_dim, width)
        self.weight = start.weight
        self.residuals = nn.ModuleList(LowRankChange(width, rank, rep_dim) for _ in range(count))
        self.biases = nn.ParameterList(start.bias.detach().clone() for _ in range(count))

    def forward(self, tokens: Tensor) -> list[Tensor]:
        """Return the tokens (K, W) of each layer."""
        changes = zip(self.residuals, self.biases, strict=True)
        return [F.linear(tokens, self.weight + residual(), bias) for residual, bias in changes]


class LowRankBeside(nn.Module):
    """P_v^r: the pretrained map plus A B.

    Args:
        rank: r.
    """

    def __init__(self, task: Task, rank: int) -> None:
        super().__init__()
        width, joint = last_map(task.clip.image)[0].shape
        self.pretrained = partial(map_last, task.clip.image)  # frozen, and so no submodule
        self.change = LowRankChange(width, rank, joint)

    def forward(self, x: Tensor) -> Tensor:
        """Return features (..., D) of ``x`` (..., W)."""
        return self.pretrained(x) + x @ self.change()


@register
class MMRLpp(PromptTrainer):
    """MMRL with shared aligners, tokens that flow from layer to layer, and a low-rank projection."""

    published_keys = {"TASK": "TASK"}
    layout = Layout(
        "MultiModalRepresentationLearner",
        (
            Rule("representation_learner.compound_rep_tokens", "bank.tokens"),
            *(
                rule
                for theirs, ours in (("r2v", "image"), ("r2t", "text"))
                for rule in (
                    Rule(f"representation_learner.srra_{theirs}proj.weight", f"bank.{ours}.weight"),
                    *(
                        Rule(f"representation_learner.srra_{theirs}proj.srra.{{i}}.{side}", f"bank.{ours}.residuals.{{i}}.{side}")
                        for side in "AB"
                    ),
                    Rule(f"representation_learner.srra_{theirs}proj.srra.{{i}}.bias", f"bank.{ours}.biases.{{i}}"),
                )
            ),
            Rule("image_encoder.A", "head.projection.change.A"),
            Rule("image_encoder.B", "head.projection.change.B"),
        ),
        whole=True,
        beside=r"representation_learner\..+|image_encoder\.[AB]",
        unused=(r"prompt_embeddings",),
    )

    @inherits(Representations, beta=0.9)
    def compose(
        self,
        task: Task,
        alpha: Annotated[float, Setting("alpha: weight of the class token's scores", low=0, high=1)] = 0.7,
        reg_weight: Annotated[float, Setting("lambda: factor on 1 - mean cosine to frozen features, of each tower", low=0)] = 1.0,
        res_lora_dim: Annotated[int, Setting("r': rank of a layer's own change of the shared map", low=1)] = 4,
        proj_lora_dim: Annotated[int, Setting("r: rank of the change of the projection", low=1)] = 64,
        task_: Annotated[str, Setting("when evaluation takes both scores", choices=TASKS, at_test=True)] = "B2N",
        source: Annotated[str, Setting("TASK CD: data set that was trained on", at_test=True)] = "ImageNet",
        **representations: Any,
    ) -> Learner:
        """Return the tokens of both towers with the loss alpha L_ce^c + (1 - alpha) L_ce^r + lambda (L_cos^v + L_cos^t)."""
        bank = Representations(task, **representations, aligner=partial(SharedAligner, rank=res_lora_dim))
        fuses = scores_both(self, task, task_, source)
        head = ClassAndRepresentation(task, bank, LowRankBeside(task, proj_lora_dim), alpha=alpha, fuses=fuses)
        own, tokens = CrossEntropy(head.class_scores), CrossEntropy(head.token_scores, "ce_rep")
        image, text = FrozenImageCosine(task, bank).named("image"), CosineToHard(task, bank)
        return Learner(task, bank, head=head, loss=alpha * own + (1 - alpha) * tokens + reg_weight * image + reg_weight * text)
