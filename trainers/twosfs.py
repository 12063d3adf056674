"""2SFS: Rethinking Few-Shot Adaptation of Vision-Language Models in Two Stages.

Matteo Farina, Massimiliano Mancini, Giovanni Iacca, Elisa Ricci. CVPR 2025. https://arxiv.org/abs/2503.11609

| paper | here |
|---|---|
| first stage: a few tensors of both towers, by cross-entropy | ``first``: ``TunedTowers`` or ``LowRank``, ``PEFT`` |
| alpha, its share of the steps | ``FIRST_STAGE`` |
| second stage: a classifier from the tuned text features, on frozen towers | ``ClassifierOf.classifier`` (C, D) |
| selective inference: learned rows by class name, the tuned text tower for other classes | ``ClassifierOf.forward`` |

Each stage has an optimizer's fresh state and a cosine of its own, by step, from the first rate to 1e-6. The authors take 300
steps for each shot whatever the data set has; here MAX_EPOCH says how often each picture is seen (the config states both).

As in the authors' code (github.com/FarinaMatteo/rethinking_fewshot_vlms), ``ln`` trains the layer norms inside the blocks alone:
ln_pre, ln_post and ln_final are announced there and stay frozen. ``bitfit`` has those three, but no bias of queries, keys or
values. Deviations: the classifier starts from text features without LoRA's dropout; PEFT has one
ENCODER for all its kinds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from promptmix.plugins.prompt_bank.low_rank import LowRank
from promptmix.plugins.prompt_bank.tuned_towers import TunedTowers
from torch import Tensor, nn
from yacs.config import CfgNode

from promptmix import register
from promptmix.clip.vision import VisualPrompts
from promptmix.config import source_of
from promptmix.config.declare import Setting, inherits, key_of, parted, settings_of
from promptmix.errors import ConfigError
from promptmix.prompts.heads import Cosine
from promptmix.prompts.learner import Learner, PromptLearner
from promptmix.prompts.roles import PromptBank, Task
from promptmix.prompts.stages import Stage
from promptmix.prompts.trainer import PromptTrainer

#: Where the cosine of each stage ends.
LAST_RATE = 1e-6
#: What the first stage trains -> the tensors of ``TunedTowers``; lora has a bank of its own.
TENSORS = {"ln": "norms", "bitfit": "biases"}


class ClassifierOf(PromptBank):
    """Another bank's text features, and in their place a classifier learned from them, for the classes it was learned for.

    Args:
        first: the bank, of one expert.
    """

    sized_by_data = ("classifier", "names")

    def __init__(self, task: Task, first: PromptBank) -> None:
        super().__init__(task)
        self.first = first
        self.classifier = nn.Parameter(torch.zeros(len(task.classnames), task.clip.embed_dim))
        self.names: Tensor
        #: (C,), the class of each row of the classifier by its name's digest; 0 before there is a classifier.
        self.register_buffer("names", torch.zeros(len(task.classnames), dtype=torch.int64))
        #: Whether training is about the classifier.
        self.begun = False

    @property
    def num_experts(self) -> int:
        return self.first.num_experts

    @property
    def image_is_frozen(self) -> bool:
        """Whether the bank leaves the image tower as it is."""
        return self.first.image_is_frozen

    def visual(self) -> Sequence[VisualPrompts]:
        return self.first.visual()

    def image_changes(self) -> dict[str, Any]:
        return self.first.image_changes()

    def start(self) -> None:
        """Start the classifier from the bank's text features."""
        training = self.first.training
        self.classifier.copy_(self.first.eval()(self.task.classnames)[0])
        self.names.copy_(torch.tensor([digest(name) for name in self.task.classnames]))
        self.first.train(training)

    def forward(self, names: Sequence[str], image_features: Tensor | None = None, *, full_stop: bool | None = None) -> Tensor:
        """Return normalised class weights (1, C, D); those without a row of the classifier are the bank's text features."""
        if self.training:
            return F.normalize(self.classifier, dim=-1)[None] if self.begun else self.first(names, full_stop=full_stop)
        rows = {name: row for row, name in enumerate(self.names.tolist()) if name}
        others = [name for name in names if digest(name) not in rows]
        text = dict(zip(others, self.first(others, full_stop=full_stop)[0], strict=True)) if others else {}
        learned = F.normalize(self.classifier, dim=-1)
        return torch.stack([text[name] if name in text else learned[rows[digest(name)]] for name in names])[None]

    def references(self, names: Sequence[str]) -> Tensor:
        return self.first.references(names)


def digest(name: str) -> int:
    """Return a number of 64 bits that stands for a class name."""
    return int.from_bytes(hashlib.sha256(name.replace("_", " ").encode()).digest()[:8], "big", signed=True)


@register
class TwoSFS(PromptTrainer):
    """A few tensors of both towers first, then a classifier on frozen features."""

    schedule_unit = "step"

    @inherits(LowRank)
    @inherits(TunedTowers, without=["tensors"])
    def compose(
        self,
        task: Task,
        peft: Annotated[str, Setting("what the first stage trains", choices=(*TENSORS, "lora"))] = "ln",
        first_stage: Annotated[float, Setting("alpha: share of the steps that the first stage has", low=0, high=1)] = 0.6,
        **first: Any,
    ) -> Learner:
        bank: PromptBank
        if peft == "lora":
            bank = LowRank(task, **parted(first, LowRank)[0])
        else:
            bank = TunedTowers(task, TENSORS[peft], **parted(first, TunedTowers)[0])
        both = ClassifierOf(task, bank)
        return Learner(task, both, head=Cosine(task, both))

    @classmethod
    def validate(cls, cfg: CfgNode) -> None:
        """Refuse settings of another kind of first stage."""
        super().validate(cfg)
        kinds = {kind: set(settings_of(bank)) for kind, bank in (("lora", LowRank), ("ln and bitfit", TunedTowers))}
        peft = cfg.TRAINER.TWOSFS.PEFT
        ours, theirs = ("lora", "ln and bitfit") if peft == "lora" else ("ln and bitfit", "lora")
        for name in sorted(kinds[theirs] - kinds[ours] - {"tensors"}):
            key = f"TRAINER.TWOSFS.{key_of(name)}"
            if source := source_of(cfg, key):
                raise ConfigError(f"{key} (set by {source}) is for PEFT {theirs} and PEFT is {peft}; drop one of the two")

    def build_stages(self, model: PromptLearner) -> list[Stage]:
        """Return the stage of the towers and that of the classifier."""
        both: Any = model.bank

        def enter(begun: bool) -> None:
            both.begun = begun

        share = self.node.FIRST_STAGE
        return [
            Stage(both.first, share, enter=lambda: enter(False)),
            Stage([both.classifier], 1 - share, enter=lambda: enter(True), begin=both.start),
        ]

    def build_scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        """Return a cosine by step for each stage."""
        return self.stages.cosine(optimizer, LAST_RATE)
