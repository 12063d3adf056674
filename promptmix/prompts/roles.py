"""The four roles of a mixture of prompts, and how YAML chooses who plays them.

B images, C classes, E experts (prompts), K experts chosen per image, D joint width. A component is a class with plain constructor
arguments, ``(task, **settings)`` for a bank and ``(task, bank, **settings)`` for the other roles; its config node
``<ROLE>.<NAME IN UPPER CASE>`` holds the settings under the same names in upper case, declared by ``add_config``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from yacs.config import CfgNode

from promptmix.clip import CLIP
from promptmix.registry import (
    DISTILLER_REGISTRY,
    PROMPT_BANK_REGISTRY,
    ROUTER_REGISTRY,
    TEXT_SUPERVISION_REGISTRY,
    Registry,
)

#: Config node of each role, and the registry of those who can play it.
ROLES: dict[str, Registry] = {
    "PROMPT_BANK": PROMPT_BANK_REGISTRY,
    "ROUTER": ROUTER_REGISTRY,
    "TEXT_SUPERVISION": TEXT_SUPERVISION_REGISTRY,
    "DISTILLER": DISTILLER_REGISTRY,
}


@dataclass(frozen=True)
class Task:
    """What components are built for: the frozen model and the data set's words.

    Attributes:
        clip: the frozen model, on its device.
        classnames: names of the C classes that are told apart, by label.
        all_classnames: names of all classes of the data set, base classes first.
        templates: the data set's hard templates, such as ``"a photo of a {}."``.
        template_groups: hard templates in groups of similar ones (MoCoOp's experts).
    """

    clip: CLIP
    classnames: tuple[str, ...]
    all_classnames: tuple[str, ...]
    templates: tuple[str, ...]
    template_groups: tuple[tuple[str, ...], ...]

    def label_rows(self, features: Tensor) -> Tensor:
        """Pick from features (E, C_all, D) of all class names those of the classes told apart: (E, C, D)."""
        rows = {name: row for row, name in reversed(list(enumerate(self.all_classnames)))}
        return features[:, [rows[name] for name in self.classnames]]


class Component(nn.Module):
    """What the four roles share."""

    @staticmethod
    def add_config(node: CfgNode) -> None:
        """Declare settings with defaults in ``node``, one commented key per constructor argument."""


class PromptBank(Component, ABC):
    """Where the prompts of the E experts come from."""

    #: Whether prompts depend on the image, so that ``forward`` gives (B, E, C, D).
    per_image: bool = False
    #: Whether something is learned for each class, which then serves these very class names only.
    class_specific: bool = False
    #: Whether ``forward`` takes ``experts``, a tensor of indices, and then gives features (len(experts), C, D) of those alone.
    takes_experts: bool = False

    @property
    @abstractmethod
    def num_experts(self) -> int:
        """Number of experts E."""

    @abstractmethod
    def forward(self, names: Sequence[str], image_features: Tensor | None = None, *, full_stop: bool | None = None) -> Tensor:
        """Encode every expert's prompt for every class name.

        Args:
            names: C class names.
            image_features: (B, D), for banks with ``per_image``.
            full_stop: end the prompts with a full stop; None leaves it to the bank.

        Returns:
            Normalised text features (E, C, D), or (B, E, C, D) for banks with ``per_image``.
        """

    @abstractmethod
    def references(self, names: Sequence[str]) -> Tensor:
        """Return each expert's normalised hard-prompt features (E, C, D) for C class names, without gradient."""


@dataclass(frozen=True)
class Routing:
    """Which experts each image goes to.

    Attributes:
        experts: (B, K) indices of the chosen experts.
        weights: (B, K) their weights, summing to 1.
        logits: (B, E) scores of all experts before the choice.
    """

    experts: Tensor
    weights: Tensor
    logits: Tensor

    @property
    def dense(self) -> Tensor:
        """Weights over all experts (B, E), zero where an expert was not chosen."""
        return torch.zeros_like(self.logits, dtype=self.weights.dtype).scatter(1, self.experts, self.weights)

    @classmethod
    def top_k(cls, logits: Tensor, k: int) -> Routing:
        """Keep the ``k`` largest logits (B, E) and weigh them by the softmax over those."""
        kept, experts = logits.topk(k, dim=-1)
        return cls(experts, kept.softmax(dim=-1), logits)


class Router(Component, ABC):
    """Which experts an image is sent to."""

    @abstractmethod
    def forward(self, image_features: Tensor) -> Routing:
        """Route normalised image features (B, D)."""

    def loss(self, routing: Routing, image_features: Tensor, labels: Tensor) -> Tensor | None:
        """Return the router's own loss (scalar) for a batch with labels (B,), or None where it has none."""
        return None


class TextSupervision(Component, ABC):
    """A loss that holds soft prompts near hard ones."""

    #: Whether it also takes the features (B, E, C, D) of banks with ``per_image``.
    takes_per_image: bool = False

    @abstractmethod
    def forward(self, bank: PromptBank, text_features: Tensor) -> Tensor:
        """Return the loss (scalar) of the batch's normalised text features (E, C, D)."""


class Distiller(Component, ABC):
    """A loss that teaches the student's logits from hard-prompt teachers."""

    @abstractmethod
    def forward(self, image_features: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss (scalar) for normalised image features (B, D), student logits (B, C) and labels (B,)."""


@dataclass(frozen=True)
class LossTerms:
    """A batch's loss: the sum that is propagated, its parts as they are reported, and the logits (B, C)."""

    total: Tensor
    parts: dict[str, Tensor]
    logits: Tensor


class PromptLearner(nn.Module, ABC):
    """The learned part of a method: its state dict is its checkpoint, the frozen model is kept outside of it."""

    #: Whether image features can be computed without gradient, and so once for all epochs.
    image_is_frozen: bool = True
    #: Whether something is learned for each class, which then serves these very class names only.
    class_specific: bool = False
    #: Whether experts that no image of a batch chose may be left out, where no loss needs them (``MODEL.SPARSE_EXPERTS``).
    sparse_experts: bool = True

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task = task  # a plain object, so that the frozen model does not become a submodule

    @property
    def clip(self) -> CLIP:
        """The frozen model."""
        return self.task.clip

    def encode_images(self, images: Tensor) -> Tensor:
        """Return normalised image features (B, D); methods with visual prompts override this.

        With ``image_is_frozen`` it runs in inference mode, so what it makes on the way must not be kept for steps that learn.
        """
        return self.clip.encode_image(images)

    @abstractmethod
    def classifier(self) -> Any:  # noqa: ANN401
        """Return what ``logits`` needs and no image changes (text features); computed once per evaluation."""

    @abstractmethod
    def logits(self, image_features: Tensor, classifier: Any) -> Tensor:  # noqa: ANN401
        """Return class scores (B, C) for normalised image features (B, D)."""

    def loss(self, image_features: Tensor, labels: Tensor) -> LossTerms:
        """Return the loss of a batch; the default is the cross-entropy of the logits."""
        logits = self.logits(image_features, self.classifier())
        return LossTerms(F.cross_entropy(logits, labels), {}, logits)


def component_node(cfg: CfgNode, role: str, name: str) -> CfgNode:
    """Return the settings of component ``name`` in ``role``."""
    return cfg[role][name.upper()]


def build_component(cfg: CfgNode, role: str, default: str, task: Task, *parts: Any) -> Any:  # noqa: ANN401
    """Build who plays ``role``: ``cfg.<role>.NAME``, or the trainer's ``default``; None where that is empty or ``none``.

    Args:
        cfg: the whole tree.
        role: ``PROMPT_BANK``, ``ROUTER``, ``TEXT_SUPERVISION`` or ``DISTILLER``.
        default: registry name that the trainer chooses; empty = the trainer does without.
        task: what it is built for.
        parts: further constructor arguments (the bank, for those who need its references).

    Raises:
        RegistryError: the registry has no component of this name.
    """
    name = cfg[role].NAME or default
    if not name or name == "none":
        return None
    component = ROLES[role].get(name)
    settings = {key.lower(): value for key, value in component_node(cfg, role, name).items()}
    return component(task, *parts, **settings)
