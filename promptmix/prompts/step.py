"""One batch on its way through a method: every part is made once, when it is first asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from promptmix.clip.model import unit
from promptmix.clip.projection import map_last
from promptmix.clip.vision import VisualPrompts, prompts_of
from promptmix.prompts.bank import ImageLevel, PromptBank
from promptmix.prompts.task import Task

Made = TypeVar("Made")
Owner = TypeVar("Owner")


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


class Composition(Protocol):
    """What a step asks of the learner that it is of (``promptmix.prompts.learner.Learner``, which says what each of these is)."""

    task: Task
    bank: PromptBank
    image_level: ImageLevel
    image_is_frozen: bool
    image_per_expert: bool
    keeps_frozen: bool
    stacks_images: bool
    needs_raw_text: bool

    @property
    def router(self) -> Callable[[Step], Routing] | None:
        """Sends images to experts."""

    @property
    def head(self) -> Scores:
        """Scores classes."""

    @property
    def skips_experts(self) -> bool:
        """Whether experts that no image chose are left out."""

    @property
    def routes_first(self) -> bool:
        """Whether class scores need of visual experts what they give of those images alone that chose them."""

    @property
    def skips_images(self) -> bool:
        """Whether the losses need no more either."""

    @property
    def frozen_text(self) -> Tensor:
        """Normalised features (C, D) of the data set's first hard template."""

    def encode_unprompted(self, images: Tensor) -> Tensor:
        """Return the frozen tower's features (B, D)."""

    def encode_set(self, images: Tensor, schedule: VisualPrompts | None, changes: Mapping[str, Any]) -> Tensor:
        """Return features of images with one set of visual prompts."""

    def features(self, images: Tensor) -> Tensor:
        """Return what caches keep of images."""


class Scores(Protocol):
    """What a step asks of a head."""

    @property
    def needs_tokens(self) -> bool:
        """Whether it reads ``step.tokens``."""

    def __call__(self, step: Step) -> Tensor:
        """Return class scores (B, C)."""


class made_once(Generic[Owner, Made]):
    """``functools.cached_property`` without the lock that Python 3.11 still takes, which ``torch.compile`` can't follow."""

    def __init__(self, make: Callable[[Owner], Made]) -> None:
        self.make = make
        self.__doc__ = make.__doc__

    @overload
    def __get__(self, owner: None, kind: type) -> made_once[Owner, Made]: ...

    @overload
    def __get__(self, owner: Owner, kind: type) -> Made: ...

    def __get__(self, owner: Owner | None, kind: type) -> made_once[Owner, Made] | Made:
        """Make the value and put it where it is found first from now on."""
        if owner is None:
            return self
        value = self.make(owner)
        setattr(owner, self.make.__name__, value)
        return value


class Step:
    """What routers, heads and losses read of a batch.

    B images, C classes, E experts, M patches, D joint width. All features are normalised.

    Args:
        learner: the method.
        images: (B, 3, S, S); None where only kept features are at hand.
        labels: (B,); None in evaluation.
        features: what ``learner.encode_images`` gave for the images, where it was computed or kept before.
        text: the bank's text features, where they were computed before.
        views: (V, B, 3, S, S), several augmented views of each picture, of which ``images`` is the first.
        scores_only: class scores and routing are all that is asked for, so that what these don't need is left out.
    """

    def __init__(
        self,
        learner: Composition,
        images: Tensor | None,
        labels: Tensor | None = None,
        *,
        features: Tensor | None = None,
        text: Tensor | None = None,
        views: Tensor | None = None,
        scores_only: bool = False,
    ) -> None:
        self.learner, self.images, self.views, self.scores_only = learner, images, views, scores_only
        self._labels, self._features, self._text = labels, features, text

        self._made: dict[Any, Any] = {}

    def once(self, make: Callable[[Step], Made]) -> Made:
        """Return ``make(self)``, made when it is first asked for: what a head and the losses both read."""
        if make not in self._made:
            self._made[make] = make(self)
        found: Made = self._made[make]
        return found

    @property
    def task(self) -> Task:
        """The frozen model and the data set's words."""
        return self.learner.task

    @property
    def bank(self) -> PromptBank:
        """The experts' prompts."""
        return self.learner.bank

    @property
    def labels(self) -> Tensor:
        """Labels (B,).

        Raises:
            ValueError: in evaluation, which has none.
        """
        if self._labels is None:
            raise ValueError("this step has no labels: only losses may ask for them")
        return self._labels

    @made_once
    def features(self) -> Tensor:
        """What the image tower gives (``Learner.encode_images``), and what caches keep."""
        if self._features is not None:
            return self._features
        if self.images is None:
            raise ValueError("this step has neither images nor their features")
        return self.learner.features(self.images)

    @made_once
    def image(self) -> Tensor:
        """Image features (B, D), or (B, E, D) where each expert prompts the image tower in its own way.

        Those experts are the ones that ``text`` holds. Where a step is sparse (``Learner.routes_first``, ``skips_images``), the
        frozen tower's features stand in for images that did not choose an expert.
        """
        image = self.bank.adapt(getattr(self, f"{self.bank.image_level}_image"))
        return self.bank.join(image, self.frozen_image) if self.bank.needs_frozen_image else image

    @made_once
    def unit_image(self) -> Tensor:
        """The tower's normalised features (B, D) or (B, E, D), before ``bank.adapt``."""
        return self._image if self.learner.image_level == "unit" else unit(self.raw_image)

    @made_once
    def raw_image(self) -> Tensor:
        """The tower's features (B, D) or (B, E, D) as they come, not normalised, for parts whose ``image_level`` is ``raw``."""
        return self._image if self.learner.image_level == "raw" else map_last(self.task.clip.image, self.unprojected_image)

    @made_once
    def unprojected_image(self) -> Tensor:
        """What the tower's last linear map takes (B, W), for parts whose ``image_level`` is ``unprojected``.

        Raises:
            ValueError: no part says that it reads them.
        """
        self._check_unprojected()
        return self._image

    @made_once
    def tokens(self) -> Tensor:
        """Patch features (B, M, D), or (B, E, M, D) as in ``image``, for heads with ``needs_tokens``.

        Raises:
            ValueError: the head does not say that it needs them.
        """
        return self._tokens if self.learner.image_level == "unit" else F.normalize(self.raw_tokens, dim=-1)

    @made_once
    def raw_tokens(self) -> Tensor:
        """Patch features (B, M, D) as they come, not normalised, for heads with ``needs_tokens`` and ``image_level`` ``raw``."""
        return self._tokens if self.learner.image_level == "raw" else map_last(self.task.clip.image, self.unprojected_tokens)

    @made_once
    def unprojected_tokens(self) -> Tensor:
        """Patch features before the tower's last linear map (B, M, W), for heads with ``image_level`` ``unprojected``."""
        self._check_unprojected()
        return self._tokens

    def _check_unprojected(self) -> None:
        if self.learner.image_level != "unprojected":
            raise ValueError("set image_level in the part that reads these image features")

    @property
    def _image(self) -> Tensor:
        return self._own[..., 0, :] if self.learner.head.needs_tokens else self._own

    @property
    def _tokens(self) -> Tensor:
        if not self.learner.head.needs_tokens:
            raise ValueError(f"set needs_tokens in {type(self.learner.head).__name__}, which reads step.tokens")
        return self._own[..., 1:, :]

    @property
    def _is_sparse(self) -> bool:
        if self.images is None or self._features is not None:
            return False
        return self.learner.routes_first if self.scores_only else self._labels is not None and self.learner.skips_images

    @made_once
    def _own(self) -> Tensor:
        """The bank's own features (B, D), of E' experts (B, E', D); with patches (B, 1 + M, D) or (B, E', 1 + M, D)."""
        learner = self.learner
        if self._is_sparse:
            return self._chosen()
        if not learner.stacks_images:
            return self.features
        begin = int(learner.keeps_frozen)
        if not learner.image_per_expert:
            return self.features[:, begin]
        own = self.features[:, begin:]
        if learner.head.needs_tokens:
            own = own.unflatten(1, (self.bank.num_visual, -1))
        return own if self.experts is None else own[:, self.experts]

    def _chosen(self) -> Tensor:
        """What visual experts give of the images that chose them; the frozen tower's features stand in for all others.

        Returns:
            (B, E', D), or (B, E', 1 + M, D) with the patches behind the image's.
        """
        assert self.images is not None and self.routing is not None  # noqa: S101  (what sparse means)
        images, unprompted = self.images, self._unprompted
        schedules, changes = self.bank.visual(), self.bank.image_changes()
        choices = self.routing.experts.cpu()  # one wait for the device
        idle, columns, found = [], [], None
        for expert in range(len(schedules)) if self.experts is None else self.experts.tolist():
            rows = (choices == expert).any(dim=1).nonzero()[:, 0].to(images.device)
            if len(rows):
                found = self.learner.encode_set(images[rows], prompts_of(schedules[expert], rows), changes)
            else:
                idle += [step.tokens for step in schedules[expert].values() if isinstance(step.tokens, Tensor)]
            columns.append((rows, found if len(rows) else None))
        shape = found.shape[1:] if found is not None else unprompted.shape[1:]
        others = (unprompted if len(shape) == 1 else unprompted[:, None]).expand(-1, *shape)
        own = [others if new is None else others.to(new.dtype).index_copy(0, rows, new) for rows, new in columns]
        stacked = torch.stack(own, dim=1)
        # Idle experts get a gradient of zero, so that weight decay and momentum move them as if they had been encoded.
        learns = idle and torch.is_grad_enabled()
        return stacked + 0.0 * torch.stack([tokens.sum() for tokens in idle]).sum() if learns else stacked

    @made_once
    def _unprompted(self) -> Tensor:
        """The frozen tower's features (B, D) at the learner's level, where they are kept beside the bank's own."""
        if self._is_sparse:
            assert self.images is not None  # noqa: S101  (what sparse means)
            return self.learner.encode_unprompted(self.images)
        return self.features[:, 0]

    @made_once
    def frozen_image(self) -> Tensor:
        """Features (B, D) of the frozen image tower, without prompts or adapters.

        Raises:
            ValueError: the image tower is prompted, and the pictures are not at hand.
        """
        if self.learner.stacks_images and self.learner.keeps_frozen:
            return self._unprompted if self.learner.image_level == "unit" else F.normalize(self._unprompted, dim=-1)
        if self.learner.image_is_frozen:
            return self.unit_image
        if self.images is None:
            raise ValueError("frozen image features need the pictures, and this step has prompted features only")
        images, clip = self.images, self.task.clip
        return clip.encode_frozen(lambda: clip.encode_image(images))

    @made_once
    def frozen_view(self) -> Tensor:
        """Features (B, D) of the frozen image tower for the last of several augmented views; ``frozen_image`` where there is one.

        Raises:
            ValueError: the image tower is prompted, and the pictures are not at hand.
        """
        if self.views is None or len(self.views) == 1:
            return self.frozen_image
        other, clip = self.views[-1], self.task.clip
        return clip.encode_frozen(lambda: clip.encode_image(other))

    @made_once
    def query(self) -> Tensor:
        """What routers look at (B, D): the image features, or the frozen ones where each expert has image features of its own."""
        return self.frozen_image if self.learner.image_per_expert else self.image

    @made_once
    def routing(self) -> Routing | None:
        """Which experts each image goes to; None without a router."""
        return None if self.learner.router is None else self.learner.router(self)

    @made_once
    def experts(self) -> Tensor | None:
        """Indices (E',) of the experts that ``text`` holds; None where it holds all E."""
        if self._text is not None or self._labels is None or self.routing is None or not self.learner.skips_experts:
            return None
        return self.routing.experts.unique()

    @made_once
    def text(self) -> Tensor:
        """Text features (E, C, D) of the experts, or (B, E, C, D) for banks with ``per_image``."""
        if self.learner.needs_raw_text:
            return unit(self.raw_text)
        if self._text is not None:
            return self._text
        names = self.task.classnames
        if self.bank.per_image:
            return self.bank(names, self.query)
        return self.bank(names) if self.experts is None else self.bank(names, experts=self.experts)

    @made_once
    def raw_text(self) -> Tensor:
        """Text features (E, C, D) as they come from the tower, for parts with ``needs_raw_text``.

        Raises:
            ValueError: no part says that it reads them.
        """
        if not self.learner.needs_raw_text:
            raise ValueError("set needs_raw_text in the part that reads step.raw_text")
        return self.bank.encode(self.task.classnames) if self._text is None else self._text

    def scores(self, text: Tensor | None = None, scale: float = 0.0) -> Tensor:
        """Return ``s <f_b, t_c>`` (B, C) for text features (C, D).

        Args:
            text: None = those of the bank's one prompt.
            scale: s; 0 = the model's temperature.
        """
        image = self.image  # before the text: the order decides in which order random numbers are drawn and gradients added up
        text = self.text[0] if text is None else text
        return (scale or self.task.clip.scale) * image @ text.to(image.dtype).T

    @made_once
    def frozen_text(self) -> Tensor:
        """Normalised features (C, D) of the data set's first hard template."""
        return self.learner.frozen_text

    @made_once
    def logits(self) -> Tensor:
        """Class scores (B, C)."""
        return self.learner.head(self)
