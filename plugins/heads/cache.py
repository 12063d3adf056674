"""A cache of the training pictures beside the text classifier (Tip-Adapter, arXiv 2111.03930, section 3)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from promptmix import register
from promptmix.config.declare import Setting
from promptmix.prompts.roles import Head, PromptBank, Task
from promptmix.prompts.step import Step


@register
class Cache(Head):
    """``s <f, t_c> + alpha sum_n exp(-beta (1 - <f, k_n>)) [y_n = c]``: each of N training pictures votes for its class.

    Args:
        bank: of one expert; its image features are the queries.
    """

    needs_preparing = True
    sized_by_data = ("keys", "values")
    class_specific = True
    per_class = "a cache of pictures"
    image_level = "raw"

    def __init__(
        self,
        task: Task,
        bank: PromptBank,
        alpha: Annotated[float, Setting("weight of the cache", low=0)] = 1.17,
        beta: Annotated[float, Setting("sharpness: how fast a picture's vote falls with its distance", low=0)] = 1.0,
        augment_epoch: Annotated[int, Setting("augmented views of a picture whose mean is its key", low=1)] = 10,
        learned: Annotated[bool, Setting("keys are learned on from the pictures' features (Tip-Adapter-F)")] = False,
        scale: Annotated[float, Setting("s; 0 = the model's temperature", low=0)] = 100.0,
    ) -> None:
        super().__init__()
        self.scale, self.rounds = scale, augment_epoch
        labels = torch.tensor(task.train_labels, dtype=torch.long)
        self.keys: Tensor
        self.values: Tensor
        self.alpha: Tensor
        self.beta: Tensor
        keys = torch.zeros(len(labels), task.clip.embed_dim)
        if learned:
            self.keys = nn.Parameter(keys)
        else:
            self.register_buffer("keys", keys)
        self.register_buffer("values", F.one_hot(labels, len(task.classnames)).float())
        self.register_buffer("alpha", torch.tensor(alpha))
        self.register_buffer("beta", torch.tensor(beta))

    def prepare(self, look: Callable[[], Iterable[Step]]) -> None:
        """Take the mean of each picture's unnormalised features over the views, normalised, as its key."""
        views = []
        for _ in range(self.rounds):
            steps = [(step.raw_image.float(), step.labels) for step in look()]
            views.append(torch.cat([image for image, _ in steps]))
        labels = torch.cat([labels for _, labels in steps])
        self.keys.data = F.normalize(torch.stack(views).mean(dim=0), dim=-1).to(self.keys.device)
        self.values.data = F.one_hot(labels, self.values.shape[1]).float().to(self.values.device)

    def forward(self, step: Step) -> Tensor:
        text, votes = self.parts(step)
        return text + self.alpha * votes

    def parts(self, step: Step) -> tuple[Tensor, Tensor]:
        """Return the scores of the text and the votes of the cache, each (B, C)."""
        cosines = step.image @ self.keys.to(step.image.dtype).T
        return step.scores(scale=self.scale), votes_of(cosines, self.values, self.beta)


def votes_of(cosines: Tensor, values: Tensor, beta: Tensor | float) -> Tensor:
    """Return the votes (B, C) of N pictures with one-hot labels ``values`` (N, C), at cosines (B, N)."""
    return torch.exp(-beta * (1 - cosines)) @ values.to(cosines.dtype)


def search(
    cosines: Tensor, text: Tensor, values: Tensor, labels: Tensor, scale: Sequence[float], steps: Sequence[int]
) -> tuple[float, float]:
    """Return the beta and alpha with the highest accuracy, the first of those that are equal.

    The grid is ``i (scale - 0.1) / steps + 0.1`` for each, beta outside.

    Args:
        cosines: (B, N) of validation pictures and keys.
        text: (B, C) their scores by the text.
        values: (N, C).
        labels: (B,).
        scale: where the grids of beta and alpha end.
        steps: their numbers of points.
    """
    betas, alphas = ([i * (end - 0.1) / n + 0.1 for i in range(n)] for end, n in zip(scale, steps, strict=True))
    best, found = -1, (betas[0], alphas[0])
    for beta in betas:
        votes = votes_of(cosines, values, beta)
        for alpha in alphas:
            right = int(((text + alpha * votes).argmax(dim=-1) == labels).sum())
            if right > best:
                best, found = right, (beta, alpha)
    return found
