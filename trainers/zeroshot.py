"""ZeroshotCLIP: Learning Transferable Visual Models From Natural Language Supervision.

Alec Radford et al. ICML 2021. https://arxiv.org/abs/2103.00020

The classifier is the normalised mean of normalised hard-prompt features (section 3.1.4); nothing is learned. Training it
simply evaluates it, where CoOp's ZeroshotCLIP fails without ``--eval-only``.
"""

from __future__ import annotations

from typing import Annotated

from promptmix.plugins.prompt_bank.hard import Hard

from promptmix import register
from promptmix.config.declare import Setting
from promptmix.data.templates import IMAGENET_7, IMAGENET_80
from promptmix.prompts.heads import Cosine
from promptmix.prompts.learner import Learner
from promptmix.prompts.roles import Task
from promptmix.prompts.trainer import PromptTrainer


@register
class ZeroshotCLIP(PromptTrainer):
    """CLIP with hand-written prompts: the data set's first template (CoOp's baseline), all of its own, or OpenAI's ensembles."""

    def compose(
        self,
        task: Task,
        templates: Annotated[
            str,
            Setting(
                "the first or all of the data set's, OpenAI's 80, or 7 with the first",
                choices=("first", "dataset", "imagenet80", "imagenet7"),
            ),
        ] = "first",
    ) -> Learner:
        chosen = {
            "first": task.templates[:1],
            "dataset": task.templates,
            "imagenet80": IMAGENET_80,
            "imagenet7": (*IMAGENET_7, task.templates[0]),
        }
        prompts = Hard(task, chosen[templates])
        return Learner(task, prompts, head=Cosine(task, prompts))

    def train(self) -> None:  # type: ignore[override]  # takes no epochs, as in Dassl
        """Evaluate: there is nothing to learn."""
        if not self.cfg.TEST.NO_TEST:
            self.test()

    def load_model(self, directory: str, epoch: int | None = None) -> None:
        """Load nothing: there are no learned tensors."""
