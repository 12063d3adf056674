"""ZeroshotCLIP: Learning Transferable Visual Models From Natural Language Supervision.

Alec Radford et al. ICML 2021. https://arxiv.org/abs/2103.00020

The classifier is the normalised mean of normalised hard-prompt features (section 3.1.4); nothing is learned. Training it
simply evaluates it, where CoOp's ZeroshotCLIP fails without ``--eval-only``.
"""

from __future__ import annotations

from torch import Tensor
from yacs.config import CfgNode

from promptmix import hookimpl
from promptmix.errors import ConfigError
from promptmix.prompts.roles import PromptLearner, Task
from promptmix.prompts.templates import IMAGENET_7, IMAGENET_80
from promptmix.prompts.trainer import PromptTrainer
from promptmix.registry import Registry

CHOICES = ("first", "dataset", "imagenet80", "imagenet7")


class HardClassifier(PromptLearner):
    """Scores by hard prompts alone.

    Args:
        task: the frozen model and class names.
        templates: which are averaged.
    """

    def __init__(self, task: Task, templates: tuple[str, ...]) -> None:
        super().__init__(task)
        self.templates = templates

    def classifier(self) -> Tensor:
        """Return classifier weights (C, D)."""
        return self.clip.ensemble(self.templates, self.task.classnames)

    def logits(self, image_features: Tensor, classifier: Tensor) -> Tensor:
        """Return scores (B, C)."""
        return self.clip.scale * image_features @ classifier.to(image_features.dtype).T


class ZeroshotCLIP(PromptTrainer):
    """CLIP with hand-written prompts: the data set's first template (CoOp's baseline), all of its own, or OpenAI's ensembles."""

    @staticmethod
    def add_config(node: CfgNode) -> None:
        """Declare the one key."""
        node.TEMPLATES = "first"  # first | dataset (all of the data set's) | imagenet80 | imagenet7 (with the first)

    @classmethod
    def validate(cls, cfg: CfgNode) -> None:
        """Refuse an unknown choice of templates."""
        chosen = cfg.TRAINER.ZEROSHOTCLIP.TEMPLATES
        if chosen not in CHOICES:
            raise ConfigError(f"TRAINER.ZEROSHOTCLIP.TEMPLATES is {chosen!r}; choose from {', '.join(CHOICES)}")

    def build_learner(self, task: Task) -> PromptLearner:
        """Return the classifier of the chosen templates."""
        templates = {
            "first": task.templates[:1],
            "dataset": task.templates,
            "imagenet80": IMAGENET_80,
            "imagenet7": (*IMAGENET_7, task.templates[0]),
        }
        return HardClassifier(task, templates[self.node.TEMPLATES])

    def train(self) -> None:  # type: ignore[override]  # takes no epochs, as in Dassl
        """Evaluate: there is nothing to learn."""
        if not self.cfg.TEST.NO_TEST:
            self.test()

    def load_model(self, directory: str, epoch: int | None = None) -> None:
        """Load nothing: there are no learned tensors."""


@hookimpl
def register_trainers(registry: Registry) -> None:
    """Add the trainer."""
    registry.register(ZeroshotCLIP)
