"""Active Prompt Learning in Vision Language Models, PCB (pseudo-class balance).

Jihwan Bang, Sumyeong Ahn, Jae-Gil Lee. CVPR 2024. https://arxiv.org/abs/2311.11178

| paper | here |
|---|---|
| [V]_1 ... [V]_M | ``ctx`` (1, M, W), or with ``CSC`` one context for each class or, with descriptions, for each of those |
| descriptions of a class: AS, average similarity; AE, average embedding | ``MODE``; ``Described`` |
| rounds, selectors, balance | protocol ``active`` (``promptmix.runs.active``, ``PROTOCOL.ACTIVE``), for any method |

``MODE none`` is CoOp. AS averages the scores of a class's descriptions, which is the score of the mean of their normalised
features; AE normalises the mean of their features.

Deviations from the authors' code: none in the classifier. Sentences come from ``DATASET.DESCRIPTIONS``, by names as the data set
writes them; a class without any stops the run, where the authors' files miss some names of EuroSAT and StanfordCars.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from promptmix.plugins.prompt_bank.soft import Soft
from torch import Tensor, nn

from promptmix import register
from promptmix.config.declare import Setting, inherits
from promptmix.config.published import Theirs
from promptmix.engine.layout import Layout, Rule
from promptmix.prompts.context import initial_context
from promptmix.prompts.learner import Learner
from promptmix.prompts.roles import Task
from promptmix.prompts.trainer import PromptTrainer

MODES = ("none", "AS", "AE")
ROUNDS = "rounds are the protocol: promptmix run active --trainer PCB, with PROTOCOL.ACTIVE.SELECTOR and PROTOCOL.ACTIVE.GAMMA"
SENTENCES = "set TRAINER.PCB.MODE AS (or AE) and DATASET.DESCRIPTIONS FILE"


class Described(Soft):
    """A soft context before ``<name>, which is/has <sentence>.`` for each sentence about a class, whose features are averaged.

    Args:
        mode: AS or AE.
        csc: one context for each sentence.
        n_ctx: M, context vectors.
        soft: further settings of the context.
    """

    takes_experts = False

    def __init__(self, task: Task, mode: str, csc: bool, n_ctx: int, **soft: Any) -> None:
        super().__init__(task, n_ctx, csc=csc, **soft)
        self.mode = mode
        sentences = sum(map(len, task.descriptions.of(task.classnames)))
        if csc:
            self.ctx = nn.Parameter(initial_context(task.clip.text, n_ctx, "", 1, sentences))

    def encode(self, names: Sequence[str], *, full_stop: bool | None = None, experts: Tensor | None = None) -> Tensor:
        """Return each class's mean (1, C, D): of its sentences' features, for AS of normalised ones."""
        sentences = self.task.descriptions.of(names)
        phrases = [f"{name.lower()}, which is/has {s}" for name, rows in zip(names, sentences, strict=True) for s in rows]
        features = super().encode(phrases, full_stop=full_stop)
        if self.mode == "AS":
            features = F.normalize(features, dim=-1)
        return torch.stack([rows.mean(dim=1) for rows in features.split([len(rows) for rows in sentences], dim=1)], dim=1)

    def forward(
        self,
        names: Sequence[str],
        image_features: Tensor | None = None,
        *,
        full_stop: bool | None = None,
        experts: Tensor | None = None,
    ) -> Tensor:
        """Return text features (1, C, D), normalised for AE; for AS their length is part of the score."""
        found = self.encode(names, full_stop=full_stop)
        return found if self.mode == "AS" else F.normalize(found, dim=-1)


@register
class PCB(PromptTrainer):
    """A soft prompt, class-specific by default, with or without descriptions of the classes."""

    published_as = ("ALVLM",)
    published_keys = {
        "TRAINER.COOP.*": "*",
        **dict.fromkeys(("TRAINER.COOPAL.METHOD", "TRAINER.COOPAL.GAMMA"), Theirs(instead=ROUNDS)),
        **dict.fromkeys(("TRAINER.COOPAL.ASPATH", "TRAINER.COOPAL.AEPATH"), Theirs(instead=SENTENCES)),
    }
    layout = Layout("prompt_learner", (Rule("ctx", "bank.ctx", expert_axis=True),))

    @inherits(Soft, without=["n_prompts", "count_words"], csc=True)
    def compose(
        self,
        task: Task,
        mode: Annotated[str, Setting("descriptions: none, mean score (AS) or mean feature (AE)", choices=MODES)] = "none",
        **soft: Any,
    ) -> Learner:
        """Return the prompt, with ``csc`` one for each class, or sentence; what it is trained on is the protocol's."""
        return Learner(task, Soft(task, **soft) if mode == "none" else Described(task, mode, **soft))
