"""Banks of prompts, and what they share with the other parts of a method.

B images, C classes, E experts (prompts), D joint width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from promptmix.clip.model import unit
from promptmix.clip.tokens import find
from promptmix.clip.vision import VisualPrompts
from promptmix.config.declare import declare_all, retire
from promptmix.errors import ConfigError
from promptmix.prompts.task import Task
from promptmix.registry import PROMPT_BANK_REGISTRY, Registry

Made = TypeVar("Made")
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

    def prepare(self, look: Callable[[], Iterable[Any]]) -> None:
        """Take what is needed from the training pictures before the first step, such as a cache of features.

        It is not called where a checkpoint is loaded or resumed, which holds what was taken.

        Args:
            look: goes once through the training pictures in the data set's order, augmented as configured (anew each time it is
                called), and gives their steps (``promptmix.prompts.step.Step``) without a graph.
        """

    def take_sizes(self, state: Mapping[str, Tensor]) -> None:
        """Take sizes that ``sized_by_data`` can't say from a checkpoint that is about to be loaded.

        Args:
            state: the checkpoint's tensors of this part, by their names in it.
        """

    def fit_state(self, state: dict[str, Tensor], prefix: str) -> None:
        """Make this part and a checkpoint that is about to be loaded agree on sizes, and on what training alone reads.

        Args:
            state: the checkpoint's tensors by their names.
            prefix: of this part's names.
        """
        self.take_sizes({name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)})
        for name in self.training_only:
            if getattr(self, name) is not None:  # its settings can leave it out
                state.setdefault(f"{prefix}{name}", getattr(self, name))
        for name in self.sized_by_data:
            own, theirs = getattr(self, name), state.get(f"{prefix}{name}")
            if theirs is not None and theirs.shape != own.shape and theirs.shape[1:] == own.shape[1:]:
                own.data = torch.empty(theirs.shape, dtype=own.dtype, device=own.device)

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
    #: Whether experts that a step leaves out get a gradient of zero, so that weight decay and momentum move them as if they had
    #: been encoded. Otherwise they get none and stand still, and every step leaves them out.
    idle_learn: bool = True

    #: Whether image features are mixed with those of the frozen tower (``join``), which then also runs in evaluation.
    needs_frozen_image: ClassVar[bool] = False

    def __init__(self, task: Task | None = None) -> None:
        super().__init__()
        self._once: dict[Hashable, Any] = {}
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
        return unit(self.encode(names, full_stop=full_stop))

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

    def once(self, what: str, names: Sequence[str], make: Callable[[], Made]) -> Made:
        """Return ``make()``, something frozen of these class names, made when they are first asked for on a device."""
        return find(self._once, (what, *names, str(self.task.clip.scale.device)), make)

    @property
    def image_is_frozen(self) -> bool:
        """Whether the image tower runs as it is, so that its features can be kept."""
        own = type(self)
        return own.visual is PromptBank.visual and own.image_changes is PromptBank.image_changes

    def visual(self) -> Sequence[VisualPrompts]:
        """Return what the image tower's prompts are: one schedule that all experts share, one for each, or none."""
        return ()

    @property
    def num_visual(self) -> int:
        """Number of sets of visual prompts: 1 where all experts share one, or where there are none."""
        with torch.no_grad():
            return max(len(self.visual()), 1)

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
        return unit(self.encode(names, full_stop=full_stop, experts=experts))

    @abstractmethod
    def encode(self, names: Sequence[str], *, full_stop: bool | None = None, experts: Tensor | None = None) -> Tensor:
        """Return text features (E, C, D) as they come from the tower, or those of ``experts`` alone."""
