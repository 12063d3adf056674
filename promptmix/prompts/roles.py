"""The roles that a method is made of beside its bank of prompts, and how YAML chooses which part takes each.

B images, C classes, E experts (prompts), K experts chosen per image, M patches, D joint width. A part is a class with plain
constructor arguments, ``(task, **settings)`` for a bank and ``(task, bank, **settings)`` for the other roles. Settings are
declared in the constructor (``promptmix.config.declare``) and lie in the config node ``<ROLE>.<NAME IN UPPER CASE>``.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor
from yacs.config import CfgNode

from promptmix.clip.vision import TokenKind
from promptmix.config.declare import parse_sum
from promptmix.errors import ConfigError, PluginError, SettingError
from promptmix.prompts.bank import IMAGE_LEVELS as IMAGE_LEVELS
from promptmix.prompts.bank import Component as Component
from promptmix.prompts.bank import ImageLevel as ImageLevel
from promptmix.prompts.bank import ManyPrompts as ManyPrompts
from promptmix.prompts.bank import PromptBank as PromptBank
from promptmix.prompts.step import Routing as Routing
from promptmix.prompts.step import Step
from promptmix.prompts.task import Task as Task
from promptmix.registry import (
    DISTILLER_REGISTRY,
    HEAD_REGISTRY,
    ROLES,
    ROUTER_REGISTRY,
    TEXT_SUPERVISION_REGISTRY,
    Registry,
    name_of,
)


class Router(Component, ABC):
    """Which experts an image is sent to."""

    registry: ClassVar[Registry] = ROUTER_REGISTRY
    #: Whether ``forward`` reads nothing but ``step.query``, so that images can be routed before experts encode them.
    reads_query_alone: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Say what to change in a router of promptmix 0.1's first form."""
        super().__init_subclass__(**kwargs)
        takes_step(cls, "forward", "forward(image_features)", "step.query")
        takes_step(cls, "loss", "loss(routing, image_features, labels)", "step.routing, step.query and step.labels")

    @abstractmethod
    def forward(self, step: Step) -> Routing:
        """Route a batch, by ``step.query`` (B, D) or whatever else of the step."""

    def loss(self, step: Step) -> Tensor | None:
        """Return the router's own loss (scalar) for a batch with labels, or None where it has none."""
        return None

    def as_linear(self) -> tuple[Tensor, Tensor, int] | None:
        """Return (weight (E, D), bias (E,), k) where in evaluation the k largest of weight q + bias are weighed by their softmax.

        That is what other programs get of a router (``promptmix export``); None where it is something else.
        """
        return None


class Head(Component, ABC):
    """How image and text features become class scores."""

    registry: ClassVar[Registry] = HEAD_REGISTRY
    #: Whether it reads ``step.tokens``, the patches' features.
    needs_tokens: ClassVar[bool] = False
    #: Whether it weighs the experts by ``step.routing``, all equally without one.
    mixes: bool = False
    #: Which: the patches as they leave the last layer, or its ``values``, where no attention has mixed them.
    token_kind: ClassVar[TokenKind] = "patches"

    @abstractmethod
    def forward(self, step: Step) -> Tensor:
        """Return class scores (B, C)."""

    def base_scores(self, step: Step) -> Tensor | None:
        """Return how much each picture looks like one of a base class (B,); None leaves it to the class scores (OpenworldAUC)."""
        return None


class Loss(Component, ABC):
    """A term of the loss; ``CrossEntropy() + 8.0 * loss`` is a sum of two."""

    #: Its name in log lines.
    part: str = "loss"
    #: Whether it looks at the text features of experts that no image of the batch chose.
    needs_all_experts: bool = True
    #: Whether it looks at the features that visual experts give of images that did not choose them.
    needs_all_images: bool = True

    @abstractmethod
    def forward(self, step: Step) -> Tensor | None:
        """Return the term (scalar) for a batch with labels; None leaves it out."""

    def named(self, part: str, *, weighted: bool = False) -> LossSum:
        """Return the sum of this one term under another name in log lines, which show it ``weighted`` or as it is."""
        return LossSum((Term(self, 1.0, part, weighted),))

    def __rmul__(self, weight: float) -> LossSum:
        return weight * self.named(self.part)

    def __add__(self, other: Loss | LossSum) -> LossSum:
        return self.named(self.part) + other


class TextSupervision(Loss):
    """A loss that holds soft prompts near hard ones."""

    registry: ClassVar[Registry] = TEXT_SUPERVISION_REGISTRY
    part = "text"
    needs_all_images = False
    #: Whether it also takes the features (B, E, C, D) of banks with ``per_image``.
    takes_per_image: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Say what to change in a supervision of promptmix 0.1's first form."""
        super().__init_subclass__(**kwargs)
        takes_step(cls, "forward", "forward(bank, text_features)", "step.bank and step.text")


class Distiller(Loss):
    """A loss that teaches the student from frozen teachers."""

    registry: ClassVar[Registry] = DISTILLER_REGISTRY
    part = "distill"
    needs_all_experts = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Say what to change in a distiller of promptmix 0.1's first form."""
        super().__init_subclass__(**kwargs)
        takes_step(cls, "forward", "forward(image_features, logits, labels)", "step.image, step.logits and step.labels")


@dataclass(frozen=True)
class Term:
    """One weighted term of a loss.

    Attributes:
        loss: what is computed.
        weight: factor on it.
        part: its name in log lines and in checkpoints.
        weighted: whether log lines show it times its weight.
    """

    loss: Loss
    weight: float
    part: str
    weighted: bool = False


@dataclass(frozen=True)
class LossSum:
    """A sum of weighted terms, in the order they are written."""

    terms: tuple[Term, ...]

    def __rmul__(self, weight: float) -> LossSum:
        return LossSum(tuple(replace(term, weight=weight * term.weight) for term in self.terms))

    def __add__(self, other: Loss | LossSum | None) -> LossSum:
        if other is None:
            return self
        return LossSum(self.terms + (other.named(other.part) if isinstance(other, Loss) else other).terms)


def takes_step(cls: type, method: str, before: str, now: str) -> None:
    """Refuse a class whose own ``method`` still has the signature ``before``."""
    own = vars(cls).get(method)
    arguments = list(inspect.signature(own).parameters) if own is not None else ["self", "step"]
    if len(arguments) != 2 or f"{method}({arguments[1]})" == before:
        raise PluginError(f"{cls.__module__}.{cls.__qualname__}: {before} is now {method}(step); read {now}")


def check_parts(parts: Sequence[Component], bank: PromptBank, head: Head) -> None:
    """Refuse parts of one learner that need what its bank does not give.

    Raises:
        ConfigError: a part takes text features that are the same for all images, or reads them raw, where each image has its
            own; or the head reads patches, which the bank does not mix with frozen features.
    """
    name = type(bank).__name__
    for part in parts if bank.per_image else ():
        if isinstance(part, TextSupervision) and not part.takes_per_image:
            raise ConfigError(
                f"TEXT_SUPERVISION.NAME {type(part).__name__} takes one set of text features, but the prompts of {name} differ "
                "from image to image; choose another of the two"
            )
        if part.needs_raw_text:
            raise ConfigError(f"a part reads raw text features, which {name} does not give; choose another of the two")
    if head.needs_tokens and bank.needs_frozen_image:
        raise ConfigError(
            f"{type(head).__name__} reads patches, and {name} mixes features of whole images alone with frozen ones; choose "
            "another of the two"
        )


def build_component(cfg: CfgNode, role: str, default: type | str, task: Task, *parts: Any) -> Any:
    """Build the part that takes ``role``: ``cfg.<role>.NAME``, or the trainer's ``default``; None where that is ``none``.

    Args:
        cfg: the whole tree.
        role: a key of ``ROLES``.
        default: class, or its name, that the trainer chooses; "" = the trainer does without.
        task: what it is built for.
        parts: further constructor arguments (the bank, for those who need its references).

    Raises:
        RegistryError: the registry has no component of this name.
        ConfigError: its settings don't fit the model or the data set.
    """
    name = cfg[role].NAME or name_of(default)
    return None if not name or name == "none" else _build(cfg, role, name, task, *parts)


def build_losses(cfg: CfgNode, role: str, default: type | str, task: Task, bank: PromptBank) -> LossSum | None:
    """Build the loss that takes ``role``, or the sum of several: ``NAME: "10 * FrozenImageL1 + ZeroshotKL"``.

    Raises:
        RegistryError: the registry has no loss of this name.
        ConfigError: its settings don't fit the model or the data set.
    """
    chosen = cfg[role].NAME or name_of(default)
    if not chosen or chosen == "none":
        return None
    total: Any = None
    pairs = parse_sum(chosen)
    for factor, name in pairs:
        loss: Loss = _build(cfg, role, name, task, bank)
        term = factor * loss.named(loss.part if len(pairs) == 1 else f"{loss.part}_{name.lower()}")
        total = term if total is None else total + term
    return total


def _build(cfg: CfgNode, role: str, name: str, task: Task, *parts: Any) -> Any:
    component = ROLES[role].get(name)
    settings = {key.lower(): value for key, value in cfg[role][name.upper()].items()}
    try:
        return component(task, *parts, **settings)
    except SettingError as error:
        raise error.under(f"{role}.{name.upper()}") from None
