"""ProDA: Prompt Distribution Learning.

Yuning Lu, Jianzhuang Liu, Yonggang Zhang, Yajing Liu, Xinmei Tian. CVPR 2022. https://arxiv.org/abs/2205.03340

| paper | here |
|---|---|
| K prompts with the class name in front, in the middle, at the end | ``PromptDistribution``, ``N_PROMPT``; ``positions`` |
| mini-batch of B prompts a step | ``PROMPT_BS`` |
| mu, Sigma of the classes' text features | ``UpperBound``: mean and covariance over the step's prompts |
| L_upper, the surrogate of the expected cross-entropy | ``UpperBound`` |
| L_so, semantic orthogonality, lambda = 0.1 | ``Orthogonality``, ``ALPHA`` |

The test scores s <f, mean over all prompts>, which is not normalised again. The authors published no code; this follows one that
others measure with (github.com/ml-stat-Sustech/CLIP_Calibration, trainers/classification/proda.py): moments are divided by the
number of prompts + 1. Deviations from it: names are tokenised after underscores are replaced, in all positions
alike; N_PROMPT need not be a multiple of 4; a permutation of the prompts starts anew with each epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from promptmix import register
from promptmix.clip.tokens import ClassTokens
from promptmix.config.declare import Setting
from promptmix.engine.layout import Layout, Rule
from promptmix.errors import SettingError
from promptmix.prompts.context import initial_context
from promptmix.prompts.learner import Learner
from promptmix.prompts.roles import Loss, PromptBank, Task
from promptmix.prompts.step import Step
from promptmix.prompts.trainer import PromptTrainer


def positions(prompts: int) -> list[str]:
    """Return where the class name stands in each prompt: a quarter in front, a quarter in the middle, the others at the end."""
    quarter = prompts // 4
    return ["front"] * quarter + ["middle"] * quarter + ["end"] * (prompts - 2 * quarter)


class PromptDistribution(PromptBank):
    """Many soft prompts, of which each training step encodes some, in an order drawn anew whenever all had their turn.

    Args:
        n_prompt: K.
        n_ctx: M, context vectors of each.
        prompt_bs: prompts a step.
    """

    def __init__(self, task: Task, n_prompt: int, n_ctx: int, prompt_bs: int) -> None:
        super().__init__(task)
        if prompt_bs > n_prompt:
            raise SettingError(
                "prompt_bs", prompt_bs, f"but there are N_PROMPT = {n_prompt} prompts; set it to {n_prompt} or less"
            )
        self.prompt_bs = prompt_bs
        self.ctx = nn.Parameter(initial_context(task.clip.text, n_ctx, "", n_prompt))
        self.positions = positions(n_prompt)
        self._turn: list[int] = []

    @property
    def num_experts(self) -> int:
        return len(self.ctx)

    def train(self, mode: bool = True) -> PromptDistribution:
        """Begin an epoch with a permutation of its own, so that a resumed run draws as an unbroken one does."""
        self._turn = []
        return super().train(mode)

    def forward(self, names: Sequence[str], image_features: Tensor | None = None, *, full_stop: bool | None = None) -> Tensor:
        """Return normalised text features (K, C, D), in training (PROMPT_BS, C, D) of the prompts whose turn it is."""
        some = list(range(self.num_experts))
        if self.training and torch.is_grad_enabled() and self.prompt_bs < self.num_experts:
            if len(self._turn) < self.prompt_bs:
                self._turn = torch.randperm(self.num_experts).tolist()
            some, self._turn = self._turn[: self.prompt_bs], self._turn[self.prompt_bs :]
        return self.encode_some(self.task.clip.text.tokenizer.class_tokens(names), some)

    def without_names(self) -> Tensor:
        """Return the normalised features (K, D) of all prompts without a class name."""
        nothing = ClassTokens(("",), ((),))
        return self.encode_some(nothing, list(range(self.num_experts)))[:, 0]

    def encode_some(self, names: ClassTokens, prompts: list[int]) -> Tensor:
        """Return normalised features (len(prompts), C, D); prompts of one position go through the tower together."""
        tower, half = self.task.clip.text, self.ctx.shape[1] // 2
        features: dict[int, Tensor] = {}
        for position, split in (("front", 0), ("middle", half), ("end", self.ctx.shape[1])):
            members = [i for i in prompts if self.positions[i] == position]
            if members:
                ctx = self.ctx[members]
                features |= zip(members, tower(tower.compose(ctx[:, :split], names, ctx[:, split:], self.stop())), strict=True)
        return F.normalize(torch.stack([features[i] for i in prompts]), dim=-1)


class UpperBound(Loss):
    """L_upper: cross-entropy of s f.mu + s^2 / 2 * sigma, where sigma_bc is the variance of f_b.(t_c - t_y) over the prompts.

    The variance is taken dimension by dimension, over PROMPT_BS prompts and divided by one more than their number.
    """

    part = "upper"

    def forward(self, step: Step) -> Tensor:
        return F.cross_entropy(self.scores(step), step.labels)

    def scores(self, step: Step) -> Tensor:
        """Return the raised scores (B, C) of the other classes."""
        scale, text, image = step.task.clip.scale, step.text.float(), step.image.float()
        mean = text.mean(dim=0)  # (C, D)
        centred = text - mean
        # sum_d f_bd^2 (S_d[y,y] + S_d[c,c] - 2 S_d[y,c]) without a matrix (C, C) for each dimension d.
        weighed = image.square()[:, None] * (centred[:, None] - centred[:, step.labels, None]).square().sum(dim=0)
        sigma = weighed.sum(dim=-1) / (len(text) + 1)
        return scale * image @ mean.T + scale**2 / 2 * sigma


class Orthogonality(Loss):
    """L_so: mean absolute cosine between different prompts without a class name."""

    part = "diversity"

    def __init__(self, bank: PromptDistribution) -> None:
        super().__init__()
        self.without_names = bank.without_names

    def forward(self, step: Step) -> Tensor | None:
        """Return the loss (scalar); None for one prompt."""
        features = self.without_names().float()
        count = len(features)
        if count == 1:
            return None
        cosines = (features @ features.T).abs()
        return (cosines.sum() - cosines.diagonal().sum()) / (count * (count - 1))


@register
class ProDA(PromptTrainer):
    """A distribution of prompts, trained with an upper bound of the expected cross-entropy."""

    layout = Layout("prompt_learner", (Rule("ctx", "bank.ctx"),), unused=(r"nc_token_(prefix|suffix)",))

    def compose(
        self,
        task: Task,
        n_prompt: Annotated[int, Setting("K: prompts", low=1)] = 32,
        n_ctx: Annotated[int, Setting("M: context vectors of each", low=1)] = 16,
        prompt_bs: Annotated[int, Setting("prompts a step", low=1)] = 4,
        alpha: Annotated[float, Setting("lambda: factor on the orthogonality", low=0)] = 0.1,
    ) -> Learner:
        """Return the prompts with the loss L_upper + lambda L_so."""
        prompts = PromptDistribution(task, n_prompt, n_ctx, prompt_bs)
        return Learner(task, prompts, loss=UpperBound() + alpha * Orthogonality(prompts))
