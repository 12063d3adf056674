"""SurPL: Surrogate Prompt Learning.

ICML 2025, PMLR 267:39755-39773. https://github.com/llcllc1997/SurPL

| paper | here |
|---|---|
| basic prompts in both towers | ``IndependentDeep``, as IVLP's; t = ``Step.raw_text`` |
| SFG, surrogate feature generator | ``Surrogate``: features of a prompt that was never encoded, from t and a signal |
| instance signal: the picture's own feature | ``SurrogateScores.instance`` |
| fine-grained signals, learned | ``SurrogateScores.fg_signals`` (``FG_SCALE``, D) |
| local features, projected; the best (k + 1) * ``FG_INTERVAL`` of them | ``feature_proj``, ``SurrogateScores.fine`` |
| L = CE + CE_instance + mean CE_fine + 25 L1(text) + 10 L1(image) | ``SurPL.compose`` |

A class's score is the mean of the plain, the instance and the fine score. The signal is one token, so the generator's attention
always looks at it alone: it adds the same vector to all classes, and its query and key weights never learn, as in the authors'
code. The visual prompts' own local features compete with those of the patches.

Deviations from the authors' code (few-shot): the weights of the losses, the number of signals and the interval are keys; PREC is
``TRAINER.PREC`` for every method, and nothing is rounded to fp16 in fp32. Their variant for base-to-new, with sharpness-aware
minimisation, is not published.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
import torch.nn.functional as F
from promptmix.plugins.distillation.frozen_image import FrozenImageL1
from promptmix.plugins.prompt_bank.independent_deep import IndependentDeep
from promptmix.plugins.text_supervision.hard_prompts import L1ToEnsemble
from torch import Tensor, nn

from promptmix import register
from promptmix.config.declare import Setting, inherits
from promptmix.data.templates import IMAGENET_60
from promptmix.engine.layout import INDEPENDENT, Layout, Rule, linear
from promptmix.errors import SettingError
from promptmix.prompts.deep import STD
from promptmix.prompts.learner import Learner
from promptmix.prompts.losses import CrossEntropy
from promptmix.prompts.roles import Head, PromptBank, Task
from promptmix.prompts.step import Step
from promptmix.prompts.trainer import PromptTrainer


class MLP(nn.Module):
    """Linear(D, D/2), quick GELU, Linear(D/2, D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(width, width // 2), nn.Linear(width // 2, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return what is added to ``x`` (..., D)."""
        hidden = self.c_fc(x)
        return self.c_proj(hidden * torch.sigmoid(1.702 * hidden))


class Surrogate(nn.Module):
    """Makes features of prompts that carry a signal from those of the basic prompts, instead of encoding them.

    Args:
        width: D.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, 1)  # how many heads look at one token makes no difference
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = MLP(width)

    def forward(self, text: Tensor, signal: Tensor) -> Tensor:
        """Return features (N, C, D) for text features (C, D), not normalised, and signals (N, D)."""
        width = text.shape[-1]
        value = F.linear(self.ln_1(signal), self.attn.in_proj_weight[2 * width :], self.attn.in_proj_bias[2 * width :])
        x = text + self.attn.out_proj(value)[:, None]
        return x + self.mlp(self.ln_2(x))


class SurrogateScores(Head):
    """Mean of the plain scores, those of surrogates for each picture, and those of surrogates for the best local features.

    Args:
        bank: the basic prompts.
        fg_scale: number of fine-grained signals.
        fg_interval: local features that the first signal looks at, and by how many more each further one does.
    """

    needs_tokens = True
    token_kind = "values and prompts"
    image_level = "raw"
    needs_raw_text = True

    def __init__(self, task: Task, bank: PromptBank, fg_scale: int, fg_interval: int) -> None:
        super().__init__()
        width, self.fg_interval = task.clip.embed_dim, fg_interval
        self.SFG = Surrogate(width)
        self.fg_signals = nn.Parameter(torch.empty(fg_scale, width).normal_(1 / width, STD))
        self.feature_proj = nn.Linear(width, width, bias=False)
        nn.init.eye_(self.feature_proj.weight)

    def forward(self, step: Step) -> Tensor:
        return (self.plain(step) + step.once(self.instance) + step.once(self.fine).mean(dim=0)) / 3

    def plain(self, step: Step) -> Tensor:
        """Return the scores (B, C) of the basic prompts."""
        return step.scores()

    def instance(self, step: Step) -> Tensor:
        """Return the scores (B, C) of surrogates that carry the picture's own feature."""
        text = F.normalize(self.SFG(step.raw_text[0].to(step.image.dtype), step.raw_image), dim=-1)
        return step.task.clip.scale * torch.einsum("bd,bcd->bc", step.image, text)

    def fine(self, step: Step) -> Tensor:
        """Return the scores (K, B, C) of the K learned signals: means over the best of the local features."""
        local = F.normalize(self.feature_proj(step.raw_tokens), dim=-1)
        text = F.normalize(self.SFG(step.raw_text[0].to(local.dtype), self.fg_signals.to(local.dtype)), dim=-1)
        best = (min((k + 1) * self.fg_interval, local.shape[1]) for k in range(len(text)))
        means = [(local @ row.T).topk(k, dim=1).values.mean(dim=1) for k, row in zip(best, text, strict=True)]
        return step.task.clip.scale * torch.stack(means)


@register
class SurPL(PromptTrainer):
    """Deep prompts in both towers, and surrogates of many more prompts that are never encoded."""

    layout = Layout(
        "VLPromptLearner",
        (
            *INDEPENDENT,
            Rule("fg_signals", "head.fg_signals"),
            Rule("feature_proj.linear.weight", "head.feature_proj.weight"),
            Rule("SFG.attn.in_proj_weight", "head.SFG.attn.in_proj_weight"),
            Rule("SFG.attn.in_proj_bias", "head.SFG.attn.in_proj_bias"),
            *(
                rule
                for name in ("attn.out_proj", "ln_1", "ln_2", "mlp.c_fc", "mlp.c_proj")
                for rule in linear(f"SFG.{name}", f"head.SFG.{name}")
            ),
        ),
        whole=True,
        unused=(r"(prompt_learner\.)?ZS_image_encoder\..*",),
        beside=r"(SFG|feature_proj)\..+|fg_signals",
    )

    @inherits(IndependentDeep, without=["n_prompts"], n_ctx_vision=4, n_ctx_text=4, prompt_depth_vision=12, prompt_depth_text=12)
    def compose(
        self,
        task: Task,
        fg_scale: Annotated[int, Setting("fine-grained signals", low=1)] = 4,
        fg_interval: Annotated[int, Setting("local features more for each further signal", low=1)] = 10,
        text_loss_weight: Annotated[float, Setting("factor on L1 to 60 templates' mean", low=0)] = 25.0,
        image_loss_weight: Annotated[float, Setting("factor on L1 to the frozen image features", low=0)] = 10.0,
        **deep: Any,
    ) -> Learner:
        """Return the prompts, the generator and the sum of five losses."""
        if not deep["n_ctx_vision"]:
            raise SettingError("n_ctx_vision", 0, "but SurPL regulates prompted image features; set it to 1 or more")
        prompts = IndependentDeep(task, **deep)
        head = SurrogateScores(task, prompts, fg_scale, fg_interval)
        text = L1ToEnsemble(task, prompts, IMAGENET_60).named("text_l1", weighted=True)
        image = FrozenImageL1(task, prompts).named("image_l1", weighted=True)
        scores = CrossEntropy(head.plain) + CrossEntropy(head.instance, "instance") + CrossEntropy(head.fine, "fine")
        return Learner(task, prompts, head=head, loss=scores + text_loss_weight * text + image_loss_weight * image)
