"""TRIP: token-level prompt mixture with parameter-free routing (its routing and mixture; the federation is left out).

IEEE TIP. https://arxiv.org/abs/2504.21063

| paper | here |
|---|---|
| E prompt experts | ``TokenMixture.bank``, E tensors (M, W) |
| capacity-aware clustering of a picture's tokens | ``cluster`` |
| clusters matched to fixed keys of the experts | ``TokenMixture.keys``, ``match`` |
| weight of an expert: its cluster's share of the tokens that found room | ``TokenMixture.weights`` |
| prompt of a picture: the weighted sum of the experts | ``TokenMixture.logits`` |
| L = CE + alpha * CE(zero-shot, student) | ``ALPHA`` |

The weights follow from the frozen tower alone: they are kept beside the image feature. Every picture has text features of its
own.

Deviations from the authors' code (github.com/GongShuai8210/TRIP): clients and rounds are not here. Centroids start at tokens
drawn once for all pictures and keys from a fixed seed, so that a picture's weights are the same in every run; theirs draw anew.
All experts start equal, as theirs do.
"""

from __future__ import annotations

from math import inf
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from promptmix import register
from promptmix.config.declare import Setting
from promptmix.data.templates import IMAGENET_60
from promptmix.engine.layout import Layout, Rule
from promptmix.errors import ConfigError, SettingError
from promptmix.prompts.context import POSITIONS, initial_context
from promptmix.prompts.learner import LossTerms, PromptLearner
from promptmix.prompts.roles import Task
from promptmix.prompts.step import Routing, Step
from promptmix.prompts.trainer import PromptTrainer

#: Seed of the fixed keys and of the tokens that centroids start from.
SEED = 0


def assign(distances: Tensor, capacity: Tensor) -> Tensor:
    """Return each token's cluster (L,), -1 where its cheapest is full; tokens are taken in order of lowest cost (L, E)."""
    cost, cheapest = distances.min(dim=1)
    taken = torch.full_like(cheapest, -1)
    order = cost.argsort(stable=True)
    for cluster, room in enumerate(capacity.tolist()):
        taken[order[cheapest[order] == cluster][:room]] = cluster
    return taken


def cluster(tokens: Tensor, first: Tensor, factor: float, rounds: int = 100) -> tuple[Tensor, Tensor]:
    """Cluster tokens (L, W) into E clusters of limited size.

    Args:
        tokens: of one picture.
        first: (E,), the tokens that centroids start from.
        factor: share of L / E that a cluster may hold.
        rounds: at most.

    Returns:
        Each token's cluster (L,), -1 for none, and the centroids (E, W).
    """
    count, experts = len(tokens), len(first)
    capacity = torch.full((experts,), int(count // experts * factor), device=tokens.device)
    capacity[: count % experts] += 1
    centroids, price = tokens[first], tokens.new_zeros(experts)
    for _ in range(rounds):
        distances = torch.cdist(tokens[None], centroids[None], compute_mode="donot_use_mm_for_euclid_dist")[0]
        taken = assign(distances + price, capacity)
        member = F.one_hot(taken + 1, experts + 1)[:, 1:].to(tokens.dtype)
        sizes = member.sum(dim=0)
        price = torch.where(sizes > 0, price + 1e-4 * (sizes - capacity), torch.zeros_like(price))
        farthest = tokens[distances.min(dim=1).values.argmax()]
        new = torch.where(sizes[:, None] > 0, member.T @ tokens / sizes.clamp_min(1)[:, None], farthest)
        if (new - centroids).norm(dim=1).mean() < 1e-4:
            break
        centroids = new
    return taken, centroids


def match(centroids: Tensor, keys: Tensor) -> Tensor:
    """Return the expert of each cluster (E,), so that the cosines of centroids and keys (E, W) add up to the most."""
    cosines = F.normalize(centroids, dim=1) @ F.normalize(keys, dim=1).T
    return torch.tensor(pair((-cosines.double()).tolist()), device=keys.device)


def pair(costs: list[list[float]]) -> list[int]:
    """Return the column of each row of a square of ``costs`` that together cost the least (Hungarian method)."""
    count = len(costs)
    row_price, column_price = [0.0] * count, [0.0] * (count + 1)
    owner = [-1] * (count + 1)  # the row of each column; the last column stands in front of the row that looks for one
    for row in range(count):
        owner[count], column = row, count
        least, came_from, free = [inf] * count, [count] * count, list(range(count))
        seen = [count]
        while owner[column] >= 0:
            at = owner[column]
            for j in free:
                slack = costs[at][j] - row_price[at] - column_price[j]
                if slack < least[j]:
                    least[j], came_from[j] = slack, column
            column = min(free, key=least.__getitem__)
            step = least[column]
            for j in seen:
                row_price[owner[j]] += step
                column_price[j] -= step
            for j in free:
                least[j] -= step
            free.remove(column)
            seen.append(column)
        while column != count:
            owner[column] = owner[came_from[column]]
            column = came_from[column]
    found = {row: column for column, row in enumerate(owner[:count])}
    return [found[row] for row in range(count)]


class TokenMixture(PromptLearner):
    """E prompts, mixed for each picture by where its tokens fall.

    Args:
        experts: E.
        n_ctx: M.
        alpha: factor on the cross-entropy with the zero-shot classifier.
        capacity: factor on a cluster's room, in training and in evaluation.
        class_token_position: where the class name stands: ``end``, ``middle`` or ``front``.
    """

    text_per_picture = True
    keys: Tensor
    teacher: Tensor

    def __init__(
        self, task: Task, experts: int, n_ctx: int, alpha: float, capacity: tuple[float, float], class_token_position: str = "end"
    ) -> None:
        super().__init__(task)
        start = initial_context(task.clip.text, n_ctx, "", 1)[0]
        self.bank = nn.ParameterList(nn.Parameter(start.clone()) for _ in range(experts))
        self.alpha, self.capacity = alpha, capacity
        self.position = class_token_position
        generator = torch.Generator().manual_seed(SEED)
        keys = torch.linalg.qr(torch.randn(task.clip.image.width, experts, generator=generator))[0].T
        self.register_buffer("keys", keys.contiguous(), persistent=False)
        self.register_buffer("teacher", task.clip.raw_ensemble(IMAGENET_60, task.classnames), persistent=False)

    @property
    def feature_kind(self) -> str:
        """Features with the weights of this many experts behind."""
        return f"trip {len(self.bank)} {self.capacity}"

    def first_tokens(self, count: int) -> Tensor:
        """Return the tokens (E,) of ``count`` that centroids start from."""
        return torch.randperm(count, generator=torch.Generator().manual_seed(SEED))[: len(self.bank)]

    def weights(self, tokens: Tensor, factor: float) -> Tensor:
        """Return the experts' weights (E,) for the tokens (L, W) of one picture."""
        taken, centroids = cluster(tokens, self.first_tokens(len(tokens)).to(tokens.device), factor)
        sizes = torch.bincount(taken[taken >= 0], minlength=len(self.bank)).to(tokens.dtype)
        shares = torch.zeros_like(sizes)
        shares[match(centroids, self.keys.to(tokens.dtype))] = sizes / sizes.sum().clamp_min(1)
        return shares

    def encode_images(self, images: Tensor) -> Tensor:
        """Return (B, D + 2E): the normalised feature, and the experts' weights in training and in evaluation."""
        tower = self.clip.image
        states = tower.states(images)
        tokens = torch.cat([states.first[:, None], states.patches], dim=1).float()
        weights = torch.stack([torch.cat([self.weights(own, factor) for factor in self.capacity]) for own in tokens])
        image = F.normalize(tower.project(tower.norm(states.first)), dim=-1)
        return torch.cat([image, weights.to(image.dtype)], dim=1)

    def classifier(self) -> None:
        """Return nothing: prompts depend on the picture."""
        return

    def routing(self, image_features: Tensor, classifier: None) -> Routing:
        """Return the experts' weights in evaluation, by which their prompts are mixed."""
        weights, experts = image_features[:, -len(self.bank) :].sort(dim=1, descending=True)
        return Routing(experts, weights, image_features[:, -len(self.bank) :].clamp_min(1e-12).log())

    @property
    def expert_names(self) -> tuple[str, ...]:
        """Numbers of the prompts."""
        return tuple(map(str, range(1, len(self.bank) + 1)))

    def weighed(self, image_features: Tensor, classifier: None, weights: Tensor) -> Tensor:
        """Return class scores (B, C) with weights (B, E) in place of those of the tokens."""
        image = image_features[:, : self.clip.embed_dim]
        return self.logits(torch.cat([image, weights.to(image.dtype), weights.to(image.dtype)], dim=1), classifier)

    def logits(self, image_features: Tensor, classifier: None) -> Tensor:
        experts = len(self.bank)
        image, *weights = image_features.split([self.clip.embed_dim, experts, experts], dim=1)
        prompts = torch.stack(list(self.bank))
        context = torch.einsum("be,emw->bmw", weights[0 if self.training else 1].to(prompts.dtype), prompts)
        tower = self.clip.text
        stop = tower.embed(tower.tokenizer.encode("."))[None]
        text = tower(tower.compose_around(context, self.task.classnames, self.position, stop))
        return self.clip.scale * torch.einsum("bd,bcd->bc", image, F.normalize(text, dim=-1).to(image.dtype))

    def loss(self, step: Step) -> LossTerms:
        """Return CE + alpha * CE(zero-shot, student)."""
        logits = self.logits(step.features, None)
        image = step.features[:, : self.clip.embed_dim]
        taught = (self.clip.scale * image @ self.teacher.to(image.dtype).T).float().softmax(dim=-1)
        parts = {"ce": F.cross_entropy(logits, step.labels), "teacher": F.cross_entropy(logits, taught)}
        return LossTerms(parts["ce"] + self.alpha * parts["teacher"], parts, logits)


@register
class TRIP(PromptTrainer):
    """A mixture of prompts whose weights no router learns."""

    layout = Layout("prompt_learner", (Rule("VPTctxList.{i}", "bank.{i}"),))

    def compose(
        self,
        task: Task,
        experts: Annotated[int, Setting("E: experts", low=2)] = 8,
        n_ctx: Annotated[int, Setting("M: context vectors of each", low=1)] = 32,
        alpha: Annotated[float, Setting("alpha: factor on the teacher's cross-entropy", low=0)] = 1.0,
        capacity_train: Annotated[float, Setting("room of a cluster, in shares of tokens / E, in training", above=0)] = 1.0,
        capacity_infer: Annotated[float, Setting("the same in evaluation", above=0)] = 2.0,
        class_token_position: Annotated[str, Setting("where the class name stands", choices=POSITIONS)] = "end",
    ) -> TokenMixture:
        if not task.clip.image.takes_prompts:
            raise ConfigError(
                f"MODEL.BACKBONE.NAME is {task.clip.name}, which has no tokens to route; choose ViT-B/16 or tiny-vit"
            )
        if experts > (tokens := task.clip.image.patches + 1):
            raise SettingError("experts", experts, f"but a picture has {tokens} tokens to share out; set it to {tokens} or less")
        return TokenMixture(task, experts, n_ctx, alpha, (capacity_train, capacity_infer), class_token_position)
