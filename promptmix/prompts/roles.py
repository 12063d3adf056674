"""The roles that a method is made of, and how YAML chooses which part takes each.

B images, C classes, E experts (prompts), K experts chosen per image, M patches, D joint width. A part is a class with plain
constructor arguments, ``(task, **settings)`` for a bank and ``(task, bank, **settings)`` for the other roles. Settings are
declared in the constructor (``promptmix.config.declare``) and lie in the config node ``<ROLE>.<NAME IN UPPER CASE>``.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn
from yacs.config import CfgNode

from promptmix.clip.kept import find
from promptmix.clip.vision import TokenKind, VisualPrompts
from promptmix.config.declare import declare_all, parse_sum, retire
from promptmix.errors import ConfigError, PluginError, SettingError
from promptmix.prompts.step import Routing as Routing
from promptmix.prompts.step import Step
from promptmix.prompts.step import Task as Task
from promptmix.registry import (
    DISTILLER_REGISTRY,
    HEAD_REGISTRY,
    PROMPT_BANK_REGISTRY,
    ROLES,
    ROUTER_REGISTRY,
    TEXT_SUPERVISION_REGISTRY,
    Registry,
)

ImageLevel = Literal["unit", "raw", "unprojected"]
#: From what all have to what most can be computed from.
IMAGE_LEVELS: tuple[ImageLevel, ...] = ("unit", "raw", "unprojected")


class Component(nn.Module):
    """What all roles share."""

    #: Learned tensors and buffers whose first axis follows from the training data; a checkpoint decides it when it is loaded.
    sized_by_data: ClassVar[tuple[str, ...]] = ()
    #: Buffers that only training reads, so that a checkpoint of the authors' code may lack them.
    training_only: ClassVar[tuple[str, ...]] = ()
    #: Whether ``prepare`` wants to see the training pictures.
    needs_preparing: ClassVar[bool] = False
    #: Whether something is learned for each class, which then serves these very class names only.
    class_specific: bool = False
    #: What that is, in an error's words.
    per_class: ClassVar[str] = "weights"
    #: Which image features it reads: ``unit`` ones, ``raw`` ones as they come from the tower (``step.raw_image``), or those
    #: before the tower's last linear map (``step.unprojected_image``).
    image_level: ImageLevel = "unit"
    #: Whether it reads ``step.raw_text``, text features as they come from the tower.
    needs_raw_text: ClassVar[bool] = False
    #: Protocol ``federated``: whether what it learned stays with a client; otherwise the server averages it.
    stays_local: ClassVar[bool] = False
    #: Protocol ``federated``: its tensors that hold other clients' tensors, one after another, and the name of those.
    borrows: ClassVar[dict[str, str]] = {}
    #: Keys of the part's node that are gone, each with what to write instead; old records may hold them at their defaults.
    retired: ClassVar[dict[str, str]] = {}

    @classmethod
    def add_config(cls, node: CfgNode) -> None:
        """Declare the constructor's settings in ``node``."""
        declare_all(node, cls)
        retire(node, cls.retired)

    @classmethod
    def check_settings(cls, cfg: CfgNode, node: str) -> None:
        """Raise ``ConfigError`` for settings under the key ``node`` that contradict each other; ranges are checked before."""

    def prepare(self, look: Callable[[], Iterable[Step]]) -> None:
        """Take what is needed from the training pictures before the first step, such as a cache of features.

        It is not called where a checkpoint is loaded or resumed, which holds what was taken.

        Args:
            look: goes once through the training pictures in the data set's order, augmented as configured (anew each time it is
                called), and gives their steps without a graph.
        """

    def take_sizes(self, state: Mapping[str, Tensor]) -> None:
        """Take sizes that ``sized_by_data`` can't say from a checkpoint that is about to be loaded.

        Args:
            state: the checkpoint's tensors of this part, by their names in it.
        """

    def before_training(self) -> None:
        """Take what only training reads, such as sentences about the classes, so that evaluation does without.

        It is called before the first step of a training, also of a resumed one.
        """


class PromptBank(Component, ABC):
    """What stands at both towers: the prompts of E experts, in the text tower, the image tower, or both.

    A bank defines ``encode``, or ``forward`` where its features are not those of a tower made unit vectors.

    Args:
        task: the frozen model and the data set's words.
    """

    registry: ClassVar[Registry] = PROMPT_BANK_REGISTRY
    task: Task
    #: Whether text prompts depend on the image, so that ``forward`` gives (B, E, C, D).
    per_image: bool = False
    #: Whether ``forward`` takes ``experts``, a tensor of indices, and then gives features (len(experts), C, D) of those alone.
    takes_experts: bool = False

    #: Whether image features are mixed with those of the frozen tower (``join``), which then also runs in evaluation.
    needs_frozen_image: ClassVar[bool] = False

    def __init__(self, task: Task | None = None) -> None:
        super().__init__()
        self._once: dict[Hashable, Tensor] = {}
        if task is not None:
            self.task = task

    @property
    def num_experts(self) -> int:
        """Number of experts E."""
        return 1

    @property
    def expert_names(self) -> tuple[str, ...]:
        """What tables call the experts."""
        return tuple(map(str, range(1, self.num_experts + 1)))

    def forward(self, names: Sequence[str], image_features: Tensor | None = None, *, full_stop: bool | None = None) -> Tensor:
        """Encode every expert's prompt for every class name.

        Args:
            names: C class names.
            image_features: (B, D), for banks with ``per_image``.
            full_stop: end the prompts with a full stop; None leaves it to the bank.

        Returns:
            Normalised text features (E, C, D), or (B, E, C, D) for banks with ``per_image``.
        """
        return F.normalize(self.encode(names, full_stop=full_stop), dim=-1)

    def encode(self, names: Sequence[str], *, full_stop: bool | None = None) -> Tensor:
        """Return text features (E, C, D) as they come from the tower, which parts with ``needs_raw_text`` read too.

        Raises:
            ConfigError: the bank gives normalised features alone.
        """
        raise ConfigError(f"a part reads text features before they are normalised, which {type(self).__name__} does not give")

    def references(self, names: Sequence[str]) -> Tensor:
        """Return each expert's normalised hard-prompt features (E, C, D) for C class names, without gradient.

        By default those of the data set's first template, the same for every expert.
        """
        return self.task.clip.hard_features(self.task.templates[:1], names).expand(self.num_experts, -1, -1)

    def stop(self, full_stop: bool | None = True) -> Tensor:
        """Return the embedding (1, 1, W) of the full stop behind a class name; (1, 0, W) for False."""
        tower = self.task.clip.text
        return tower.embed(tower.tokenizer.encode("." if full_stop in (None, True) else ""))[None]

    def once(self, what: str, names: Sequence[str], make: Callable[[], Tensor]) -> Tensor:
        """Return ``make()``, some frozen features of these class names, made when they are first asked for on a device."""
        return find(self._once, (what, *names, str(self.task.clip.scale.device)), make)

    @property
    def image_is_frozen(self) -> bool:
        """Whether the image tower runs as it is, so that its features can be kept."""
        own = type(self)
        return own.visual is PromptBank.visual and own.image_changes is PromptBank.image_changes

    def visual(self) -> Sequence[VisualPrompts]:
        """Return what the image tower's prompts are: one schedule that all experts share, one for each, or none."""
        return ()

    def image_changes(self) -> dict[str, Any]:
        """Return what else changes the image tower: ``weights`` inside layers and ``actions`` (``promptmix.clip.places``)."""
        return {}

    def adapt(self, image: Tensor) -> Tensor:
        """Change the frozen tower's features, as adapters behind the tower do.

        Args:
            image: normalised features (B, D), or what the bank's ``image_level`` asks for.

        Returns:
            Normalised features (B, D).
        """
        return image

    def join(self, image: Tensor, frozen: Tensor) -> Tensor:
        """Mix the features that ``adapt`` gave with the frozen tower's, for banks with ``needs_frozen_image``.

        Args:
            image: normalised features (B, D), or (B, E, D) where each expert prompts the image tower in its own way.
            frozen: normalised features (B, D).

        Returns:
            Normalised features in the shape of ``image``.
        """
        return image


class ManyPrompts(PromptBank):
    """A bank of several prompts, each of which goes through the text tower by itself, so that some of them can."""

    takes_experts = True

    def forward(
        self,
        names: Sequence[str],
        image_features: Tensor | None = None,
        *,
        full_stop: bool | None = None,
        experts: Tensor | None = None,
    ) -> Tensor:
        """Return normalised text features (E, C, D), or (len(experts), C, D) of those ``experts`` (E',) alone."""
        return F.normalize(self.encode(names, full_stop=full_stop, experts=experts), dim=-1)

    @abstractmethod
    def encode(self, names: Sequence[str], *, full_stop: bool | None = None, experts: Tensor | None = None) -> Tensor:
        """Return text features (E, C, D) as they come from the tower, or those of ``experts`` alone."""


class Router(Component, ABC):
    """Which experts an image is sent to."""

    registry: ClassVar[Registry] = ROUTER_REGISTRY

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Say what to change in a router of promptmix 0.1's first form."""
        super().__init_subclass__(**kwargs)
        _takes_step(cls, "forward", "forward(image_features)", "step.query")
        _takes_step(cls, "loss", "loss(routing, image_features, labels)", "step.routing, step.query and step.labels")

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
    mixes: ClassVar[bool] = False
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
    #: Whether it also takes the features (B, E, C, D) of banks with ``per_image``.
    takes_per_image: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Say what to change in a supervision of promptmix 0.1's first form."""
        super().__init_subclass__(**kwargs)
        _takes_step(cls, "forward", "forward(bank, text_features)", "step.bank and step.text")


class Distiller(Loss):
    """A loss that teaches the student from frozen teachers."""

    registry: ClassVar[Registry] = DISTILLER_REGISTRY
    part = "distill"
    needs_all_experts = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Say what to change in a distiller of promptmix 0.1's first form."""
        super().__init_subclass__(**kwargs)
        _takes_step(cls, "forward", "forward(image_features, logits, labels)", "step.image, step.logits and step.labels")


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


def _takes_step(cls: type, method: str, before: str, now: str) -> None:
    """Refuse a class whose own ``method`` still has the signature ``before``."""
    own = vars(cls).get(method)
    if own is not None and len(inspect.signature(own).parameters) != 2 or f"{method}({_second(own)})" == before:
        raise PluginError(f"{cls.__module__}.{cls.__qualname__}: {before} is now {method}(step); read {now}")


def _second(method: Any) -> str:
    return "" if method is None else list(inspect.signature(method).parameters)[1]


def component_node(cfg: CfgNode, role: str, name: str) -> CfgNode:
    """Return the settings of component ``name`` in ``role``."""
    return cfg[role][name.upper()]


def build_component(cfg: CfgNode, role: str, default: str, task: Task, *parts: Any) -> Any:
    """Build the part that takes ``role``: ``cfg.<role>.NAME``, or the trainer's ``default``; None where that is ``none``.

    Args:
        cfg: the whole tree.
        role: a key of ``ROLES``.
        default: registry name that the trainer chooses; empty = the trainer does without.
        task: what it is built for.
        parts: further constructor arguments (the bank, for those who need its references).

    Raises:
        RegistryError: the registry has no component of this name.
        ConfigError: its settings don't fit the model or the data set.
    """
    name = cfg[role].NAME or default
    return None if not name or name == "none" else _build(cfg, role, name, task, *parts)


def build_losses(cfg: CfgNode, role: str, default: str, task: Task, bank: PromptBank) -> LossSum | None:
    """Build the loss that takes ``role``, or the sum of several: ``NAME: "10 * FrozenImageL1 + ZeroshotKL"``.

    Raises:
        RegistryError: the registry has no loss of this name.
        ConfigError: its settings don't fit the model or the data set.
    """
    chosen = cfg[role].NAME or default
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
    settings = {key.lower(): value for key, value in component_node(cfg, role, name).items()}
    try:
        return component(task, *parts, **settings)
    except SettingError as error:
        raise error.under(f"{role}.{name.upper()}") from None
