"""CLAP: A Closer Look at the Few-Shot Adaptation of Large Vision-Language Models; with it ZS-LP, its probe without constraint.

Julio Silva-Rodriguez, Sina Hajimiri, Ismail Ben Ayed, Jose Dolz. CVPR 2024. https://arxiv.org/abs/2312.12730

| paper | here |
|---|---|
| t_c, zero-shot prototypes: mean of the templates' features, not normalised | ``Prototypes.base`` (C, D) |
| w_c, class prototypes, from t_c at the start | ``Prototypes.prototypes`` (C, D), normalised in the scores only; ``START`` |
| lambda_c, from the zero-shot model's probability of the right class | ``Constraint.multipliers`` (C,) |
| L_ce + mean_c lambda_c |w_c - t_c|^2 | ``CLAP.compose``; ZS-LP is ``CONSTRAINT none`` |

Class names keep their underscores, as in the authors' code. There are no prototypes for other classes than those trained on.

Deviations from the authors' code: a step sees one cached view of pictures drawn without repetition (theirs draws from the pool of
all 20 views of all pictures, as many batches as one view has). ``START random``, ``DISTANCE cosine`` and ``ADAPTIVE`` are
switches of their code that the paper's results don't use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from promptmix.plugins.prompt_bank.hard import Hard
from torch import Tensor, nn

from promptmix import register
from promptmix.config.declare import Setting, inherits
from promptmix.config.published import Theirs
from promptmix.engine.layout import Layout, Rule
from promptmix.errors import ConfigError
from promptmix.prompts.heads import Cosine
from promptmix.prompts.learner import Learner
from promptmix.prompts.losses import CrossEntropy
from promptmix.prompts.roles import Loss, Task
from promptmix.prompts.step import Step
from promptmix.prompts.trainer import PromptTrainer

KINDS = ("l2", "corrected", "constant", "balanced")


class Prototypes(Hard):
    """A classifier learned from the hard one's weights."""

    class_specific = True
    per_class = "a prototype"

    def __init__(
        self,
        task: Task,
        templates: Annotated[Sequence[str], Setting("hard templates that are averaged; () = the data set's first")] = (),
        start: Annotated[str, Setting("random: normal, of deviation sqrt(2 / D)", choices=("zeroshot", "random"))] = "zeroshot",
    ) -> None:
        super().__init__(task, templates)
        self.base: Tensor
        base = task.clip.raw_features(self.templates, task.classnames, verbatim=True).mean(dim=0)
        self.register_buffer("base", base, persistent=False)
        self.prototypes = nn.Parameter(base.clone())
        if start == "random":
            nn.init.kaiming_normal_(self.prototypes)

    def forward(self, names: Sequence[str], image_features: Tensor | None = None, *, full_stop: bool | None = None) -> Tensor:
        """Return normalised class weights (1, C, D).

        Raises:
            ConfigError: the names are not those that prototypes were learned for.
        """
        if tuple(names) != tuple(self.task.classnames):
            raise ConfigError(f"prototypes were learned for {len(self.base)} classes and can't serve other names")
        return F.normalize(self.prototypes, dim=-1)[None]

    def moved(self) -> Tensor:
        """Return the squared distance of each prototype from the zero-shot one (C,)."""
        return (self.prototypes - self.base).square().sum(dim=-1)

    def turned(self) -> Tensor:
        """Return one minus the cosine of each prototype with the zero-shot one (C,)."""
        return 1 - F.cosine_similarity(self.prototypes, self.base)

    def references(self, names: Sequence[str]) -> Tensor:
        """Return the hard classifier (1, C, D), of any names."""
        return self.encode(names)


class Constraint(Loss):
    """``mean_c lambda_c |w_c - t_c|^2``; lambda_c is how sure the zero-shot model is of class c's training pictures.

    Args:
        bank: the prototypes.
        kind: ``l2``: lambda_c as it is; ``corrected``: with mean 1; ``constant``: their mean for all; ``balanced``: 1 for all.
        views: augmented views of each picture that lambda_c is taken from.
        distance: ``l2``, or ``cosine`` for one minus the cosine.
        adaptive: ``update`` is called after each epoch.
    """

    training_only = ("multipliers", "penalty")

    part = "constraint"
    needs_preparing = True

    def __init__(self, bank: Prototypes, kind: str, views: int, distance: str = "l2", adaptive: bool = False) -> None:
        super().__init__()
        self.moved, self.kind, self.views = bank.moved, kind, views
        self.distance = bank.turned if distance == "cosine" else bank.moved
        self.multipliers: Tensor
        self.penalty: Tensor | None
        self.register_buffer("multipliers", torch.ones(len(bank.base)))
        #: (C,), rho of the augmented Lagrangian.
        self.register_buffer("penalty", torch.zeros(len(bank.base)) if adaptive else None)

    def prepare(self, look: Callable[[], Iterable[Step]]) -> None:
        """Take lambda_c from the training pictures; the prototypes are still the zero-shot model's."""
        seen = [(step.logits.float(), step.labels) for _ in range(self.views) for step in look()]
        right = torch.cat([logits.softmax(dim=-1).gather(1, labels[:, None])[:, 0] for logits, labels in seen])
        labels = torch.cat([labels for _, labels in seen])
        total = torch.zeros_like(self.multipliers, device=right.device).index_add(0, labels, right)
        sure = total / labels.bincount(minlength=len(total)).clamp(min=1)
        kinds = {"l2": sure, "corrected": sure / sure.mean(), "constant": sure.mean().expand_as(sure)}
        self.multipliers.copy_(kinds.get(self.kind, torch.ones_like(sure)))

    def forward(self, step: Step) -> Tensor:
        return (self.multipliers * self.distance()).mean()

    @torch.no_grad()
    def update(self) -> None:
        """Take the outer step of the augmented Lagrangian: lambda <- max(0, lambda + rho h), rho <- h, the squared distance."""
        if self.penalty is not None:
            moved = self.moved()
            self.multipliers.add_(self.penalty * moved).clamp_(min=0)
            self.penalty.copy_(moved)


@register
class CLAP(PromptTrainer):
    """A linear probe from the zero-shot weights, held near them class by class."""

    published_as = ("ADAPTER",)
    published_keys = {
        "TRAINER.ADAPTER.*": "*",
        "TRAINER.ADAPTER.INIT": Theirs("START", {"ZS": "zeroshot", "RANDOM": "random"}),
        "TRAINER.ADAPTER.ENHANCED_BASE": Theirs(values={"none": "none"}, instead="give none"),
    }
    layout = Layout("adapter", (Rule("prototypes", "bank.prototypes"),), unused=("base_text_features",), ours_alone=r"losses\..*")

    @inherits(Prototypes)
    def compose(
        self,
        task: Task,
        constraint: Annotated[
            str,
            Setting("weights of the constraint by class; none = ZS-LP", choices=(*KINDS, "none")),
        ] = "l2",
        views: Annotated[int, Setting("augmented views of a picture that the weights are taken from", low=1)] = 20,
        distance: Annotated[str, Setting("what the constraint measures", choices=("l2", "cosine"))] = "l2",
        adaptive: Annotated[bool, Setting("the weights grow with the distance, epoch by epoch")] = False,
        **prototypes: Any,
    ) -> Learner:
        bank = Prototypes(task, **prototypes)
        loss = (
            CrossEntropy() if constraint == "none" else CrossEntropy() + Constraint(bank, constraint, views, distance, adaptive)
        )
        return Learner(task, bank, head=Cosine(task, bank), loss=loss)

    def after_epoch(self) -> None:
        """Let the constraint's weights grow, where they do, before the epoch is saved."""
        learner: Any = self.model  # of compose
        for part in learner.losses.values():
            if isinstance(part, Constraint):
                part.update()
        super().after_epoch()
