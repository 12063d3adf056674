"""The one learner: a bank of prompts, a router, a head and a sum of losses; every method is a composition of these."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from promptmix.clip import CLIP
from promptmix.clip.projection import unprojected
from promptmix.clip.vision import VisualPrompts, are_pictures, are_views
from promptmix.config.declare import Setting
from promptmix.engine.layout import today
from promptmix.errors import PluginError
from promptmix.prompts.bank import IMAGE_LEVELS
from promptmix.prompts.roles import Component, Head, Loss, LossSum, PromptBank, Router, Task, check_parts, takes_step
from promptmix.prompts.step import Routing, Step
from promptmix.registry import register


@dataclass(frozen=True)
class LossTerms:
    """A batch's loss: the sum that is propagated, its parts as they are reported, and the logits (B, C)."""

    total: Tensor
    parts: dict[str, Tensor]
    logits: Tensor


def _refuse_unscalar(part: str, value: object) -> None:
    """Refuse what no sum of losses can be made of.

    Raises:
        PluginError: it is not a scalar of real numbers.
    """
    if value is None or isinstance(value, Tensor) and value.dim() == 0 and value.is_floating_point():
        return
    shape = f" of shape {tuple(value.shape)} and type {value.dtype}" if isinstance(value, Tensor) else ""
    raise PluginError(f"the loss {part!r} returned a {type(value).__name__}{shape}; return a scalar of real numbers, or None")


class PromptLearner(nn.Module, ABC):
    """What a trainer needs of a method's learned part: its state dict is its checkpoint, the frozen model is kept outside of it.

    Methods are compositions (``Learner``); this base is for what has neither prompts nor parts.
    """

    #: Whether image features can be computed without gradient, and so once for all epochs.
    image_is_frozen: bool = True
    #: Whether something is learned for each class, which then serves these very class names only.
    class_specific: bool = False
    #: What that is, in an error's words.
    per_class: str = "weights"
    #: Whether experts that no image of a batch chose may be left out, where no loss needs them (``MODEL.SPARSE_EXPERTS``).
    sparse_experts: bool = True

    #: Whether each picture has text features of its own, so that no classifier can be written down.
    text_per_picture: bool = False

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task = task  # a plain object, so that the frozen model does not become a submodule

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Say what to change in a learner of promptmix 0.1's first form."""
        super().__init_subclass__(**kwargs)
        takes_step(cls, "loss", "loss(image_features, labels)", "step.features and step.labels")

    @property
    def clip(self) -> CLIP:
        """The frozen model."""
        return self.task.clip

    def encode_images(self, images: Tensor) -> Tensor:
        """Return normalised image features (B, D); what ``logits`` and caches take, so any shape (B, ...) will do.

        With ``image_is_frozen`` it runs in inference mode, so what it makes on the way must not be kept for steps that learn.
        """
        return self.clip.encode_image(images)

    @property
    def feature_kind(self) -> str:
        """What ``encode_images`` gives beside the image's feature; caches keep each kind apart."""
        return ""

    def features(self, images: Tensor) -> Tensor:
        """Return ``encode_images(images)``, without a graph where the image side is frozen; kept features are passed on.

        Args:
            images: (B, 3, S, S), or features of any other shape.
        """
        if are_pictures(images):
            return (
                self.clip.encode_frozen(lambda: self.encode_images(images))
                if self.image_is_frozen
                else self.encode_images(images)
            )
        return images

    def step(self, images: Tensor, labels: Tensor | None = None) -> Step:
        """Return the step of a batch of images (B, 3, S, S), of V views of each (V, B, 3, S, S), or of kept features.

        Args:
            images: pictures or features; the first view is the one that is learned from.
            labels: (B,).
        """
        own: Any = self  # a learner without parts has a loss that asks for none
        if are_views(images):
            return Step(own, images[0], labels, views=images)
        if are_pictures(images):
            return Step(own, images, labels)
        return Step(own, None, labels, features=images)

    @abstractmethod
    def classifier(self) -> Any:
        """Return what ``logits`` needs and no image changes (text features); computed once per evaluation."""

    @abstractmethod
    def logits(self, image_features: Tensor, classifier: Any) -> Tensor:
        """Return class scores (B, C) for what ``encode_images`` gave."""

    @property
    def routes_first(self) -> bool:
        """Whether ``infer`` wants pictures rather than their features, since it does not need all of those."""
        return False

    def infer(self, images: Tensor, classifier: Any) -> tuple[Tensor, Routing | None]:
        """Return class scores (B, C) of images or of their features, and which experts they went to (None without a router)."""
        features = self.features(images)
        return self.logits(features, classifier), self.routing(features, classifier)

    def base_scores(self, image_features: Tensor, classifier: Any) -> Tensor | None:
        """Return how much each picture looks like one of a base class (B,); None leaves it to the class scores."""
        return None

    def routing(self, image_features: Tensor, classifier: Any) -> Routing | None:
        """Return which experts images go to in ``logits``, which takes the same arguments; None without a router."""
        return None

    @property
    def expert_names(self) -> tuple[str, ...]:
        """What tables call the experts whose weights ``weighed`` takes; empty where there are none."""
        return ()

    def weighed(self, image_features: Tensor, classifier: Any, weights: Tensor) -> Tensor:
        """Return class scores (B, C) as ``logits`` does, with given weights of the experts (B, E), which sum to 1.

        Raises:
            NotImplementedError: there are no experts that are weighed.
        """
        raise NotImplementedError(f"{type(self).__name__} weighs no experts")

    def loss(self, step: Step) -> LossTerms:
        """Return the loss of a batch; the default is the cross-entropy of the logits."""
        logits = self.logits(step.features, self.classifier())
        return LossTerms(F.cross_entropy(logits, step.labels), {}, logits)

    def prepare(self, look: Callable[[], Iterable[Step]]) -> None:
        """Take what is needed from the training pictures before the first step (see ``Component.prepare``)."""

    @property
    def needs_preparing(self) -> bool:
        """Whether ``prepare`` wants to see the training pictures."""
        return False

    def before_training(self) -> None:
        """Take what only training reads (see ``Component.before_training``)."""

    def fit_state(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return a checkpoint's tensors by today's names, and take the sizes of those that follow from its training data."""
        return state


@register
class WeightedScores(Head):
    """``s * <f_b, sum_k w_bk t_{e_bk, c}>``: the experts' scores, weighed by the router, equally without one (MoCoOp).

    The mixed text feature is not normalised again, so the weighted sum of the experts' own scores is the same number without a
    text feature per image. With one prompt it is the cosine times the scale.
    """

    mixes = True

    def __init__(
        self, task: Task, bank: PromptBank, scale: Annotated[float, Setting("s; 0 = the model's temperature", low=0)] = 0.0
    ) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, step: Step) -> Tensor:
        """Return class scores (B, C)."""
        image = step.image
        text = step.text.to(image.dtype)
        images = "bed" if image.dim() == 3 else "bd"
        scores = torch.einsum(f"{images},{'b' if text.dim() == 4 else ''}ecd->bec", image, text)
        return step.task.clip.with_bias((self.scale or step.task.clip.scale) * weigh(step, scores))


def weigh(step: Step, scores: Tensor) -> Tensor:
    """Return the experts' scores (B, E, C) weighed by the router, equally without one: (B, C)."""
    if step.routing is None:
        return scores.mean(dim=1)
    weights = step.routing.dense if step.experts is None else step.routing.dense[:, step.experts]
    return torch.einsum("be,bec->bc", weights.to(scores.dtype), scores)


class CrossEntropy(Loss):
    """Cross-entropy of class scores, mean over the batch.

    Args:
        scores: a method of a head that gives scores (B, C) of its own, or K sets (K, B, C); None = ``step.logits``.
        part: its name in log lines.
    """

    def __init__(self, scores: Callable[[Step], Tensor] | None = None, part: str = "ce") -> None:
        super().__init__()
        self.scores, self.part = scores, part
        self.needs_all_experts = self.needs_all_images = scores is not None

    def forward(self, step: Step) -> Tensor:
        """Return the loss (scalar)."""
        scores = step.logits if self.scores is None else step.once(self.scores)
        if scores.dim() == 2:
            return F.cross_entropy(scores, step.labels)
        return F.cross_entropy(scores.flatten(0, 1), step.labels.repeat(len(scores)))


class Learner(PromptLearner):
    """A bank, a router, a head and a sum of losses as one learner.

    The loss is a sum that reads like the paper's: ``CrossEntropy() + 8.0 * CosineToHard(task, bank)``.

    Args:
        task: the frozen model and the data set's words.
        bank: the experts' prompts.
        router: None weighs all experts equally.
        head: how features become scores; None weighs the experts' scores (``WeightedScores``).
        loss: None is the cross-entropy.
        measures: losses that are reported under these names, but not learned from.

    Raises:
        ConfigError: a part needs what another does not give (``check_parts``).
    """

    def __init__(
        self,
        task: Task,
        bank: PromptBank,
        router: Router | None = None,
        head: Head | None = None,
        loss: Loss | LossSum | None = None,
        measures: Mapping[str, Loss] | None = None,
    ) -> None:
        super().__init__(task)
        self.bank, self.router = bank, router
        self.head: Head = head if head is not None else WeightedScores(task, bank)
        chosen = loss if loss is not None else CrossEntropy()
        self.terms = (chosen.named(chosen.part) if isinstance(chosen, Loss) else chosen).terms
        self.losses = nn.ModuleDict({term.part: term.loss for term in self.terms})
        self.measures = nn.ModuleDict(dict(measures or {}))
        if len(self.losses) < len(self.terms):
            raise ValueError(f"terms of a loss need names of their own: {[term.part for term in self.terms]}; see Loss.named")
        check_parts(self.components, bank, self.head)
        own = [part.per_class for part in self.components if part.class_specific]
        self.class_specific, self.per_class = bool(own), " and ".join(dict.fromkeys(own))
        #: Which image features the parts read, and so what is encoded and kept.
        self.image_level = max((part.image_level for part in self.components), key=IMAGE_LEVELS.index)
        self.image_is_frozen = bank.image_is_frozen
        self.text_per_picture = bank.per_image or self.text_per_picture
        #: Whether text features are kept as they come from the tower.
        self.needs_raw_text = any(part.needs_raw_text for part in self.components)
        #: Whether each expert has image features of its own.
        self.image_per_expert = not bank.image_is_frozen and bank.num_visual > 1
        #: Whether the frozen tower's features stand in front of the experts' own, which route images or are mixed with them.
        self.keeps_frozen = router is not None or bank.per_image or bank.needs_frozen_image
        #: Whether several features of an image are kept side by side: (B, 1 + E, D), (B, E, D) or (B, 2, D).
        self.stacks_images = self.image_per_expert or bank.needs_frozen_image
        self._frozen_text: Tensor | None = None

    @property
    def components(self) -> list[Component]:
        """All parts: bank, router, head, losses, measures."""
        parts = [self.bank, self.router, self.head, *self.losses.values(), *self.measures.values()]
        return [part for part in parts if isinstance(part, Component)]

    @property
    def skips_experts(self) -> bool:
        """Whether experts that no image chose can be left out: no loss looks at their features (and there are numbers at all)."""
        wanted = any(loss.needs_all_experts for loss in (*self.losses.values(), *self.measures.values()))
        sparse = (self.sparse_experts or not self.bank.idle_learn) and self.bank.takes_experts
        return sparse and not wanted and not self.clip.scale.is_meta

    @property
    def routes_first(self) -> bool:
        """Whether visual experts encode those images alone that chose them, as far as class scores need them."""
        known = self.router is not None and self.router.reads_query_alone and not self.clip.scale.is_meta
        return self.sparse_experts and self.image_per_expert and self.head.mixes and known

    @property
    def skips_images(self) -> bool:
        """Whether they do so in training too: no loss looks at the others' features."""
        wanted = any(loss.needs_all_images for loss in (*self.losses.values(), *self.measures.values()))
        return self.routes_first and not wanted

    @property
    def frozen_text(self) -> Tensor:
        """Normalised features (C, D) of the data set's first hard template."""
        if self._frozen_text is None or self._frozen_text.device != self.clip.scale.device:
            self._frozen_text = self.clip.hard_features(self.task.templates[:1], self.task.classnames)[0]
        return self._frozen_text

    def encode_images(self, images: Tensor) -> Tensor:
        """Return normalised image features.

        Returns:
            (B, D), by ``image_level`` normalised, raw, or before the last linear map; (B, E, D) where each expert prompts the
            image tower in its own way, with a router (B, 1 + E, D), the frozen tower's features by which images are routed first,
            (B, 2, D) where the bank mixes the frozen features with its own. For heads with ``needs_tokens`` the patches' features
            stand behind those of their image: (B, 1 + M, D), or (B, 1 + E (1 + M), D) with experts of the image tower.
        """
        schedules: Sequence[VisualPrompts | None] = self.bank.visual() or [None]
        changes = self.bank.image_changes()
        if not self.stacks_images:
            return self.encode_set(images, schedules[0], changes)
        sets = [self.encode_unprompted(images)] if self.keeps_frozen else []
        sets += [self.encode_set(images, schedule, changes) for schedule in schedules]
        return torch.cat([found if found.dim() == 3 else found[:, None] for found in sets], dim=1)

    def encode_unprompted(self, images: Tensor) -> Tensor:
        """Return the frozen tower's features (B, D) of images, at the learner's ``image_level``."""
        return self.clip.encode_frozen(lambda: self._encoder(self.clip.encode_image)(images))

    def encode_set(self, images: Tensor, schedule: VisualPrompts | None, changes: Mapping[str, Any]) -> Tensor:
        """Return (B, D), or (B, 1 + M, D) with the patches' features behind the image's."""
        if not self.head.needs_tokens:
            features: Tensor = self._encoder(self.clip.encode_image)(images, schedule, **changes)
            return features
        image, tokens = self._encoder(self.clip.encode_both)(images, schedule, **changes, tokens=self.head.token_kind)
        return torch.cat([image[:, None], tokens], dim=1)

    def _encoder(self, unit: Callable[..., Any]) -> Callable[..., Any]:
        """Return what encodes images at ``image_level``: ``unit`` where that is the usual one."""
        if self.image_level == "unprojected":
            return partial(unprojected, self.clip.image)
        return self.clip.image if self.image_level == "raw" else unit

    @property
    def feature_kind(self) -> str:
        """Patches, where the head reads them; raw or unprojected features, where a part reads those."""
        level = "" if self.image_level == "unit" else self.image_level
        return " ".join(filter(None, (level, self.head.token_kind if self.head.needs_tokens else "")))

    def classifier(self) -> Tensor | None:
        """Return text features (E, C, D), raw where a part reads those; None where prompts depend on the image."""
        if self.needs_raw_text:
            return self.bank.encode(self.task.classnames)
        return None if self.bank.per_image else self.bank(self.task.classnames)

    def logits(self, image_features: Tensor, classifier: Tensor | None) -> Tensor:
        """Return scores (B, C) from what ``encode_images`` and ``classifier`` returned."""
        return Step(self, None, features=image_features, text=classifier).logits

    def infer(self, images: Tensor, classifier: Tensor | None) -> tuple[Tensor, Routing | None]:
        """Return scores (B, C) and routing; where images are routed first, experts encode those alone that chose them."""
        if not (self.routes_first and are_pictures(images)):
            return super().infer(images, classifier)
        step = Step(self, images, text=classifier, scores_only=True)
        return step.logits, step.routing

    def base_scores(self, image_features: Tensor, classifier: Tensor | None) -> Tensor | None:
        """Return what the head says of base and new pictures (B,), if it does."""
        return self.head.base_scores(Step(self, None, features=image_features, text=classifier))

    def routing(self, image_features: Tensor, classifier: Tensor | None) -> Routing | None:
        """Return which experts images go to; None without a router."""
        return None if self.router is None else Step(self, None, features=image_features, text=classifier).routing

    @property
    def expert_names(self) -> tuple[str, ...]:
        """The bank's names of its experts, where the head weighs several."""
        return self.bank.expert_names if self.head.mixes and self.bank.num_experts > 1 else ()

    def weighed(self, image_features: Tensor, classifier: Tensor | None, weights: Tensor) -> Tensor:
        """Return scores (B, C) with weights (B, E) in place of the router's."""
        step = Step(self, None, features=image_features, text=classifier)
        experts = torch.arange(weights.shape[1], device=weights.device).expand_as(weights)
        step.routing = Routing(experts, weights, weights.clamp_min(1e-12).log())
        return step.logits

    def loss(self, step: Step) -> LossTerms:
        """Return the weighted sum of the losses for a batch."""
        logits = step.logits
        found = [(term, term.loss(step)) for term in self.terms]
        for term, value in found:
            _refuse_unscalar(term.part, value)
        present = [(term, value, term.weight * value) for term, value in found if value is not None]
        total = torch.stack([weighed.float() for _, _, weighed in present]).sum()
        parts = {term.part: weighed if term.weighted else value for term, value, weighed in present} if len(present) > 1 else {}
        return LossTerms(total, parts | {name: measure(step) for name, measure in self.measures.items()}, logits)

    @torch.no_grad()  # a step computes what is asked of it when it is asked, outside of what ``look`` does
    def prepare(self, look: Callable[[], Iterable[Step]]) -> None:
        """Let every part take what it needs from the training pictures."""
        for component in self.components:
            if component.needs_preparing:
                component.prepare(look)

    def before_training(self) -> None:
        """Let every part take what only training reads."""
        for component in self.components:
            component.before_training()

    @property
    def needs_preparing(self) -> bool:
        """Whether a part wants to see the training pictures."""
        return any(component.needs_preparing for component in self.components)

    @property
    def taken(self) -> int:
        """Numbers that ``prepare`` takes from the training pictures and checkpoints keep, such as a cache."""
        kept = self.state_dict()
        prepared = [name for name, module in self.named_modules() if isinstance(module, Component) and module.needs_preparing]
        return sum(value.numel() for key, value in kept.items() if any(key.startswith(f"{name}.") for name in prepared))

    def fit_state(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return a checkpoint's tensors by today's names, and take the sizes of those that follow from its training data."""
        state = {today(name): tensor for name, tensor in state.items()}
        for prefix, module in self.named_modules():
            if isinstance(module, Component):
                module.fit_state(state, f"{prefix}.")
        return state
