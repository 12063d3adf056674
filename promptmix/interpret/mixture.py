"""Does a mixture mix? What its router does, and what is left of its accuracy when something else chooses the experts.

N test pictures, C classes, E experts, K chosen ones. Whatever takes weights of its experts can be asked: every head that mixes,
a method that mixes prompts by itself (TRIP), a head that attends to experts for each class (pFedMoAP), and the gate over hard
prompts that teaches MoPD's student.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from promptmix.interpret.opened import Opened
from promptmix.prompts.step import Routing, Step
from promptmix.tables.paired import mcnemar

__all__ = ["Choice", "Findings", "look_into", "mixtures_of"]

SHUFFLES = 20
_SEED = 0
TRAINED, EQUAL, SAME, OFF, SHUFFLED, BEST = (
    "as trained",
    "the chosen experts, equal weights",
    "the mean weights for every picture",
    "router off: all experts equally",
    "routing of another picture (shuffled)",
    "the best expert for each picture, in hindsight",
)


@runtime_checkable
class Gate(Protocol):
    """A loss that chooses among frozen teachers for each picture, as MoPD's."""

    teachers: Tensor  # (E, C, D)
    scale: float

    def route(self, image_features: Tensor) -> Routing:
        """Return which teachers each image listens to."""


@runtime_checkable
class Attends(Protocol):
    """A head that weighs experts anew for each class, as pFedMoAP's; weights (B, E) that it is given hold for all classes."""

    def __call__(self, step: Step, given: Tensor | None = None) -> Tensor:
        """Return class scores (B, C)."""
        ...

    def attention(self, step: Step) -> Tensor:
        """Return the weights of the experts (B, C, H, E)."""
        ...


@dataclass(frozen=True)
class Mixed:
    """Something that weighs experts.

    Attributes:
        title: what it is, in words.
        names: of its E experts.
        weighed: (features, classifier, weights (B, E)) -> scores (B, C).
        routing: (features, classifier) -> routing; it may return None, then all count equally.
        trained: (features, classifier) -> scores (B, C) as trained, where the routing's weights don't give them.
    """

    title: str
    names: tuple[str, ...]
    weighed: Callable[[Tensor, Any, Tensor], Tensor]
    routing: Callable[[Tensor, Any], Routing | None]
    trained: Callable[[Tensor, Any], Tensor] | None = None


@dataclass
class Choice:
    """One way of choosing the experts.

    Attributes:
        name: in words.
        accuracy: in percent.
        spread: standard deviation over shuffles; None where nothing is drawn.
        p: McNemar's, against the mixture as trained; None where it does not apply.
        only_this: pictures that only this way gets right, for McNemar.
        only_trained: pictures that only the mixture as trained gets right.
    """

    name: str
    accuracy: float
    spread: float | None = None
    p: float | None = None
    only_this: int | None = None
    only_trained: int | None = None


@dataclass
class Findings:
    """What was found of one mixture on the test pictures.

    Attributes:
        title: what it is.
        experts: their names.
        routed: whether a router chooses; without one all count equally.
        pictures: N.
        share: (E,) share of the pictures for which each expert is among the chosen.
        weight: (E,) mean weight.
        first: (E,) share of the pictures for which each expert has the largest weight.
        entropy: mean entropy of the softmax over all E scores of the router, over log E; 1 = uniform.
        weight_entropy: the same of the weights that are used, over log K; None for K = 1.
        by_class: (C, E) mean weight over each class's pictures.
        ways: accuracies.
        agreement: (E, E) share of the pictures on which two experts alone say the same class.
        text_cosine: (E, E) mean cosine of two experts' text features of a class; empty where they have none.
    """

    title: str
    experts: list[str]
    routed: bool
    pictures: int
    share: list[float] = field(default_factory=list)
    weight: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    entropy: float = 1.0
    weight_entropy: float | None = None
    by_class: list[list[float]] = field(default_factory=list)
    ways: list[Choice] = field(default_factory=list)
    agreement: list[list[float]] = field(default_factory=list)
    text_cosine: list[list[float]] = field(default_factory=list)


def mixtures_of(learner: Any) -> list[Mixed]:  # a PromptLearner
    """Return what weighs experts in a method: its own mixture, and gates over teachers."""
    found = []
    if len(learner.expert_names) > 1:
        found.append(Mixed("the mixture", learner.expert_names, learner.weighed, learner.routing))
    head = getattr(learner, "head", None)
    if isinstance(head, Attends) and learner.bank.num_experts > 1:
        found.append(_of_attention(learner, head))
    for loss in getattr(learner, "losses", {}).values():
        if isinstance(loss, Gate):
            names = getattr(loss, "templates", None) or range(1, len(loss.teachers) + 1)
            found.append(_of_gate(learner, loss, tuple(map(str, names))))
    return found


def _of_attention(learner: Any, head: Attends) -> Mixed:
    def step(features: Tensor, classifier: Any) -> Step:
        return Step(learner, None, features=features, text=classifier)

    def routing(features: Tensor, classifier: Any) -> Routing:
        weights = head.attention(step(features, classifier)).mean(dim=(1, 2))
        return Routing(torch.arange(weights.shape[1]).expand(weights.shape), weights, weights.clamp_min(1e-12).log())

    return Mixed(
        "the attention to the experts, its mean over classes and heads; scores of the own prompt stay beside it",
        learner.bank.expert_names,
        lambda features, classifier, weights: head(step(features, classifier), weights),
        routing,
        lambda features, classifier: head(step(features, classifier)),
    )


def _of_gate(learner: Any, gate: Gate, names: tuple[str, ...]) -> Mixed:
    def query(features: Tensor) -> Tensor:
        return Step(learner, None, features=features).query

    def weighed(features: Tensor, _: Any, weights: Tensor) -> Tensor:
        scores = torch.einsum("bd,ecd->bec", query(features).to(gate.teachers.dtype), gate.teachers)
        return gate.scale * torch.einsum("be,bec->bc", weights.to(scores.dtype), scores)

    title = "the teachers (hard prompts) under their gate; the student is tested without them"
    return Mixed(title, names, weighed, lambda features, _: gate.route(query(features)))


@torch.no_grad()
def look_into(run: Opened, mixed: Mixed) -> Findings:
    """Route the test pictures, then score them under every way of choosing the experts.

    Args:
        run: with its test pictures.
        mixed: the mixture.
    """
    count = len(mixed.names)
    dense, logits, chosen, labels = _route(run, mixed)
    found = Findings(mixed.title, list(mixed.names), logits is not None, len(labels))
    _tell_routing(found, dense, logits, chosen, labels, len(run.result.vocabulary["classnames"]))
    ways = {TRAINED: dense}
    ways |= {
        f"expert {name} alone": F.one_hot(torch.tensor(e), count).float().expand_as(dense) for e, name in enumerate(mixed.names)
    }
    ways[OFF] = torch.full_like(dense, 1 / count)
    shuffled: dict[str, Tensor] = {}
    if logits is not None:
        ways[EQUAL] = torch.zeros_like(dense).scatter(1, chosen, 1 / chosen.shape[1])
        ways[SAME] = dense.mean(dim=0, keepdim=True).expand_as(dense)
        draw = torch.Generator().manual_seed(_SEED)
        shuffled = {f"{SHUFFLED} {i}": dense[torch.randperm(len(dense), generator=draw)] for i in range(SHUFFLES)}
    right, said = _score(run, mixed, ways | shuffled, labels)
    alone = [f"expert {name} alone" for name in mixed.names]
    for name in ways:
        found.ways.append(_way(name, right[name], right[TRAINED]))
    if shuffled:
        values = [100 * float(right[name].mean()) for name in shuffled]
        found.ways.append(Choice(SHUFFLED, float(np.mean(values)), float(np.std(values))))
    found.ways.append(_way(BEST, np.any([right[name] for name in alone], axis=0), None))
    found.agreement = [[float((said[one] == said[other]).mean()) for other in alone] for one in alone]
    return found


def _way(name: str, right: np.ndarray, trained: np.ndarray | None) -> Choice:
    way = Choice(name, 100 * float(right.mean()))
    if trained is not None and name != TRAINED:
        way.only_this, way.only_trained = int((right & ~trained).sum()), int((trained & ~right).sum())
        way.p = mcnemar(way.only_this, way.only_trained)
    return way


def _route(run: Opened, mixed: Mixed) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Return weights (N, E), the router's scores (N, E) or None, chosen experts (N, K) and labels (N,), on the CPU."""
    parts: list[Any] = []
    count = len(mixed.names)
    for features, labels, classifier in run.batches():
        routing = mixed.routing(features, classifier)
        if routing is None:
            everyone = torch.arange(count).expand(len(labels), -1)
            parts.append((torch.full((len(labels), count), 1 / count), None, everyone, labels.cpu()))
        else:
            parts.append((routing.dense.float().cpu(), routing.logits.float().cpu(), routing.experts.cpu(), labels.cpu()))
    scores = [part[1] for part in parts if part[1] is not None]
    dense, chosen, truth = (torch.cat([part[place] for part in parts]) for place in (0, 2, 3))
    return dense, torch.cat(scores) if scores else None, chosen, truth


def _tell_routing(found: Findings, dense: Tensor, logits: Tensor | None, chosen: Tensor, labels: Tensor, classes: int) -> None:
    """Fill in what the router does."""
    count = dense.shape[1]
    found.share = torch.zeros_like(dense).scatter(1, chosen, 1.0).mean(dim=0).tolist()
    found.weight = dense.mean(dim=0).tolist()
    found.first = F.one_hot(dense.argmax(dim=1), count).float().mean(dim=0).tolist()
    if logits is not None and count > 1:
        found.entropy = _entropy(logits.softmax(dim=1)) / float(np.log(count))
    if logits is not None and chosen.shape[1] > 1:
        found.weight_entropy = _entropy(dense) / float(np.log(chosen.shape[1]))
    for label in range(classes):
        own = dense[labels == label]
        found.by_class.append(own.mean(dim=0).tolist() if len(own) else [])


def _entropy(shares: Tensor) -> float:
    return float(-(shares * shares.clamp_min(1e-12).log()).sum(dim=1).mean())


def _score(
    run: Opened, mixed: Mixed, ways: dict[str, Tensor], labels: Tensor
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return for each way whether each picture is told right (N,), and what is said (N,)."""
    said: dict[str, list[np.ndarray]] = {name: [] for name in ways}
    first = 0
    for features, own, classifier in run.batches():
        rows = slice(first, first + len(own))
        first += len(own)
        for name, weights in ways.items():
            if name == TRAINED and mixed.trained is not None:
                scores = mixed.trained(features, classifier)
            else:
                scores = mixed.weighed(features, classifier, weights[rows].to(features.device))
            said[name].append(scores.float().argmax(dim=1).cpu().numpy())
    whole = {name: np.concatenate(parts) for name, parts in said.items()}
    return {name: answers == labels.numpy() for name, answers in whole.items()}, whole
