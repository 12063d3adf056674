"""PLOT: Prompt Learning with Optimal Transport for Vision-Language Models.

Guangyi Chen, Weiran Yao, Xiangchen Song, Xinyue Li, Yongming Rao, Kun Zhang. ICLR 2023. https://arxiv.org/abs/2210.01253

| paper | here |
|---|---|
| G_k, N prompts of class k | ``Soft`` with N_PROMPTS = 4 |
| F, M local visual features | ``Step.tokens`` (B, M, D) |
| d_OT(k), optimal transport with entropy | ``Transport``, ``EPS``, ``MAX_ITER``, ``THRESH`` |
| p(y = k given x), equation 8 | softmax of s * sum T * cosine, no gradient through T |

Deviations from the authors' code (github.com/CHENGY12/PLOT, plot-coop): it runs on vision transformers too, where their own file
gives one vector and fails: every patch goes through ``ln_post`` and the projection; ADD_GLOBAL is a key, where theirs asks for
the data set's name (ImageNet); CLASS_TOKEN_POSITION serves any N, where theirs fails but at the end for more than one prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from promptmix.plugins.heads.transport import Transport
from promptmix.plugins.prompt_bank.soft import Soft
from torch import Tensor

from promptmix import register
from promptmix.config.declare import Setting, inherits
from promptmix.config.published import Theirs
from promptmix.engine.layout import Layout, Rule
from promptmix.prompts.context import POSITIONS
from promptmix.prompts.learner import Learner
from promptmix.prompts.roles import Task
from promptmix.prompts.step import Step
from promptmix.prompts.trainer import PromptTrainer


class PooledSoft(Soft):
    """Soft prompts, and behind them their mean: of the features as they come from the tower, then normalised."""

    def forward(
        self,
        names: Sequence[str],
        image_features: Tensor | None = None,
        *,
        full_stop: bool | None = None,
        experts: Tensor | None = None,
    ) -> Tensor:
        raw = self.encode(names, full_stop=full_stop, experts=experts)
        return F.normalize(torch.cat([raw, raw.mean(dim=0, keepdim=True)]), dim=-1)


class TransportAndGlobal(Transport):
    """Transport over the patches, plus the cosine of the image feature and the prompts' mean."""

    def forward(self, step: Step) -> Tensor:
        *_, pooled = step.text
        return step.scores(pooled) + self.transport(step, step.tokens, step.text[:-1])


@register
class PLOT(PromptTrainer):
    """Several soft prompts, each of which finds its own patches by optimal transport."""

    published_keys = {"TRAINER.PLOT.CSC": Theirs(values={"False": False}, instead="leave it out")}
    layout = Layout("prompt_learner", (Rule("ctx", "bank.ctx"),))

    @inherits(Transport)
    def compose(
        self,
        task: Task,
        n: Annotated[int, Setting("N: soft prompts", low=1)] = 4,
        n_ctx: Annotated[int, Setting("M: context vectors of each", low=1)] = 16,
        class_token_position: Annotated[str, Setting("where the class name stands", choices=POSITIONS)] = "end",
        add_global: Annotated[bool, Setting("add the score of whole image and mean prompt (the authors, on ImageNet)")] = False,
        **transport: Any,
    ) -> Learner:
        kind, head = (PooledSoft, TransportAndGlobal) if add_global else (Soft, Transport)
        prompts = kind(task, n_ctx, class_token_position=class_token_position, n_prompts=n)
        return Learner(task, prompts, head=head(task, prompts, **transport))
