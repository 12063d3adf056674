"""GMoP: gated mixture of prompts for OpenworldAUC.

ICML 2025. https://arxiv.org/abs/2505.05180

| paper | here |
|---|---|
| prompt of the base classifier | ``Soft`` with ``N_CTX`` = 4 |
| K detectors of new classes, each with its own pseudo-new ones | ``Detectors.ctx`` (K, ``OOD_N_CTX``, W) |
| pseudo-split i: class j is new to detector i where j mod K = i | ``Detectors.known`` |
| gate: sigmoid of the true class's probability | ``OpenworldLoss.forward`` |
| L = CE + alpha mean CE_i + lambda mean AUC_i | ``ALPHA``, ``LAMBDA`` |
| base score r(x) | ``Detectors.base_scores`` |

AUC_i is the mean over pairs of a known and a pseudo-new picture of gate * gate' * (1 - (r_i(x) - r_i(x')))^2, where r_i is
detector i's largest probability. A detector whose batch holds only one of the two kinds is left out, and the divisor stays K.

Base pictures are classified by the learned prompt, new ones by the frozen model, so accuracy on new classes is zero-shot CLIP's.
`promptmix run open-world` reports OpenworldAUC.

Deviations from the authors' code (github.com/huacong/OpenworldAUC): it does not start as published; what is here are its
equations, with its evaluation given the class names. The K detectors' contexts are one tensor, so their files (one a part, not in
a run's folder) are not read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from promptmix.plugins.prompt_bank.soft import Soft
from torch import Tensor

from promptmix import register
from promptmix.clip.compose import index_of
from promptmix.config.declare import Setting
from promptmix.data.fewshot import num_base
from promptmix.prompts.heads import Cosine
from promptmix.prompts.learner import Learner
from promptmix.prompts.losses import CrossEntropy
from promptmix.prompts.roles import Loss, PromptBank, Task
from promptmix.prompts.step import Step
from promptmix.prompts.trainer import PromptTrainer


def base_names(task: Task) -> tuple[str, ...]:
    """Return the names that are base: those told apart, or the first half of all where these are the others or all of them."""
    half = task.all_classnames[: num_base(len(task.all_classnames))]
    return task.classnames if set(half) & set(task.classnames) and not task.open_world else half


class Detectors(Soft):
    """K soft prompts, each of which takes some of the base classes for new ones.

    Args:
        k: K.
        n_ctx: context vectors of each.
    """

    def __init__(self, task: Task, k: int, n_ctx: int) -> None:
        super().__init__(task, n_ctx, n_prompts=k)
        self.names = base_names(task)
        rows = [[-1 if j % k == i else self.known(i).index(j) for j in range(len(self.names))] for i in range(k)]
        self.positions: Tensor  # (K, C) of base classes among a detector's names, -1 for what is new to it
        self.register_buffer("positions", torch.tensor(rows), persistent=False)

    def known(self, i: int) -> list[int]:
        """Return the base classes among the names of detector i: those it knows, and class i where these are too few."""
        n, k = len(self.names), self.num_experts
        found = [j for j in range(n) if j % k != i]
        return found if len(found) >= math.ceil(n * (k - 1) / k) else [*found, i]

    def labels(self, i: int, labels: Tensor) -> Tensor:
        """Return labels (B,) as detector i counts them, -1 for what is new to it."""
        return self.positions[i][labels]

    def log_probabilities(self, image: Tensor, others: Sequence[str] | None = None) -> list[Tensor]:
        """Return each detector's log-probabilities (B, C_i), its own names first.

        Args:
            image: normalised features (B, D).
            others: names beside the base classes, to tell all of them apart; None = each detector's own names alone.
        """
        text = self((*self.names, *(others or ()))).to(image.dtype)
        scores = self.task.clip.scale * torch.einsum("bd,kcd->kbc", image, text)
        found = []
        for i, row in enumerate(scores):
            own = self.known(i)
            rest = [] if others is None else [j for j in range(row.shape[1]) if j not in own]
            found.append(row[:, index_of((*own, *rest), str(row.device))].float().log_softmax(dim=-1))
        return found

    @torch.no_grad()
    def base_scores(self, image: Tensor) -> Tensor:
        """Return how likely images (B, D) are of a base class: the largest probability that a detector gives to its own names."""
        new = [name for name in self.task.all_classnames if name not in self.names]
        found = self.log_probabilities(image, new)
        best = [row[:, : len(self.known(i))].amax(dim=-1) for i, row in enumerate(found)]
        return torch.stack(best).amax(dim=0).exp()


class BaseOrNew(Cosine):
    """The learned prompt's scores for base classes, the frozen model's for the others.

    Args:
        bank: the learned prompt.
        detectors: say how much a picture looks like one of a base class.
    """

    def __init__(self, task: Task, bank: PromptBank, detectors: Detectors) -> None:
        super().__init__(task, bank)
        self.looks_base = detectors.base_scores

    def forward(self, step: Step) -> Tensor:
        base = base_names(step.task)
        if base == step.task.classnames:
            return super().forward(step)
        frozen = step.scores(step.frozen_text)
        if not step.task.open_world:
            return frozen
        return torch.cat([super().forward(step)[:, : len(base)], frozen[:, len(base) :]], dim=1)

    def base_scores(self, step: Step) -> Tensor:
        """Return the detectors' scores (B,)."""
        return self.looks_base(step.image)


class OpenworldLoss(Loss):
    """alpha mean_i CE_i + lambda mean_i AUC_i of K detectors, which it holds.

    Args:
        k: K.
        n_ctx: context vectors of a detector.
        alpha: factor on the detectors' cross-entropy.
        lambda_: factor on AUC_i.
    """

    part = "openworld"

    def __init__(self, task: Task, bank: PromptBank, k: int, n_ctx: int, alpha: float, lambda_: float) -> None:
        super().__init__()
        self.detectors, self.alpha, self.lambda_ = Detectors(task, k, n_ctx), alpha, lambda_

    def forward(self, step: Step) -> Tensor:
        warm, auc = self.terms(step)
        return self.alpha * warm.mean() + self.lambda_ * auc.mean()

    def terms(self, step: Step) -> tuple[Tensor, Tensor]:
        """Return CE_i and AUC_i (K,), zero where the batch does not show a detector both kinds; nothing waits for the device."""
        own = step.labels[:, None]
        frozen = step.scores(step.frozen_text)
        right = step.logits.softmax(dim=-1).gather(1, own).sigmoid()[:, 0]
        by_chance = frozen.softmax(dim=-1).gather(1, own).sigmoid()[:, 0]
        warm, auc = [], []
        for i, found in enumerate(self.detectors.log_probabilities(step.image)):
            labels = self.detectors.labels(i, step.labels)
            known, score = labels >= 0, found.amax(dim=-1).exp()
            pairs = known[:, None] & ~known
            both = pairs.any()
            losses = F.nll_loss(found, labels.clamp(min=0), reduction="none")
            warm.append(_mean(losses, known & both))
            gates = right[:, None] * by_chance
            auc.append(_mean(gates * (1 - (score[:, None] - score)).square(), pairs))
        return torch.stack(warm), torch.stack(auc)


def _mean(values: Tensor, chosen: Tensor) -> Tensor:
    """Return the mean of the chosen values, 0 where none is chosen."""
    return values.where(chosen, 0.0).sum() / chosen.sum().clamp(min=1)


@register
class GMoP(PromptTrainer):
    """A soft prompt for base classes and several detectors of new ones."""

    def compose(
        self,
        task: Task,
        k: Annotated[int, Setting("K: detectors, each with its own pseudo-new classes", low=2)] = 3,
        n_ctx: Annotated[int, Setting("context vectors of the classifier", low=1)] = 4,
        ood_n_ctx: Annotated[int, Setting("context vectors of a detector", low=1)] = 16,
        alpha: Annotated[float, Setting("alpha: factor on the detectors' cross-entropy", low=0)] = 0.5,
        lambda_: Annotated[float, Setting("lambda: factor on AUC_i", low=0)] = 1.0,
    ) -> Learner:
        """Return the classifier's prompt with the loss of all."""
        prompt = Soft(task, n_ctx)
        own = OpenworldLoss(task, prompt, k, ood_n_ctx, alpha, lambda_)
        return Learner(task, prompt, head=BaseOrNew(task, prompt, own.detectors), loss=CrossEntropy() + own)
