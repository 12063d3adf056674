"""FullFineTune: the whole image tower trained, a yardstick for methods that leave it frozen.

As a baseline in Mitchell Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022. https://arxiv.org/abs/2109.01903

| paper | here |
|---|---|
| V_enc, every tensor of the image tower, from CLIP's | ``TunedTowers`` with ``all``, ``VISION_START`` |
| W_classifier from the zero-shot weights | ``HEAD linear``: ``LinearHead``, ``START`` |
| W_zero-shot kept as it is | ``HEAD text``: scores against the hand-written prompt, which serves other classes too |
| cross-entropy | ``CrossEntropy`` |

Weight decay pulls the values themselves to zero, as it would in a tower trained by itself. Features can't be kept, and the text
tower runs once. Batch norms of a ResNet keep CLIP's statistics; their weights and biases learn.

There is no code to be held to (the paper's trains on full data sets); tests hold it to a tower whose own tensors are trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from promptmix.plugins.heads.linear import LinearHead
from promptmix.plugins.prompt_bank.tuned_towers import TunedTowers
from yacs.config import CfgNode

from promptmix import register
from promptmix.config import source_of
from promptmix.config.declare import Setting
from promptmix.errors import ConfigError
from promptmix.prompts.heads import Cosine
from promptmix.prompts.learner import Learner
from promptmix.prompts.roles import Head, Task
from promptmix.prompts.trainer import PromptTrainer


@register
class FullFineTune(PromptTrainer):
    """Every tensor of the image tower, trained with cross-entropy."""

    def compose(
        self,
        task: Task,
        head: Annotated[
            str, Setting("weights of its own for each class, or the hand-written prompt", choices=("linear", "text"))
        ] = "linear",
        start: Annotated[str, Setting("what a linear head starts from", choices=("zeroshot", "random"))] = "zeroshot",
        vision_start: Annotated[int, Setting("first block that learns, from 0; 0 = all there is", low=0)] = 0,
        templates: Annotated[Sequence[str], Setting("the hand-written prompt; () = the data set's first")] = (),
    ) -> Learner:
        bank = TunedTowers(task, "all", "vision", vision_start=vision_start, templates=templates)
        scores: Head = LinearHead(task, bank, start) if head == "linear" else Cosine(task, bank)
        return Learner(task, bank, head=scores)

    @classmethod
    def validate(cls, cfg: CfgNode) -> None:
        """Refuse a start for a head that has none."""
        super().validate(cfg)
        source = source_of(cfg, "TRAINER.FULLFINETUNE.START")
        if cfg.TRAINER.FULLFINETUNE.HEAD == "text" and source:
            raise ConfigError(f"TRAINER.FULLFINETUNE.START (set by {source}) would be ignored, since HEAD is text; drop one")
