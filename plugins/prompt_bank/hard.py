"""Hand-written prompts: nothing is learned at the text side; one bank has a small network behind the image tower."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch.nn.functional as F
from torch import Tensor, nn

from promptmix import register
from promptmix.config.declare import Setting
from promptmix.prompts.roles import PromptBank, Task


@register
class Hard(PromptBank):
    """The ensemble of hard templates as one frozen prompt (CLIP, arXiv 2103.00020, section 3.1.4)."""

    def __init__(
        self,
        task: Task,
        templates: Annotated[Sequence[str], Setting("hard templates that are averaged; () = the data set's first")] = (),
    ) -> None:
        super().__init__(task)
        self.templates = tuple(templates) or task.templates[:1]

    def forward(self, names: Sequence[str], image_features: Tensor | None = None, *, full_stop: bool | None = None) -> Tensor:
        """Return normalised text features (1, C, D), encoded once for a set of names; the templates say where they end."""
        return self.once("text", names, lambda: self.encode(names))

    def encode(self, names: Sequence[str], *, full_stop: bool | None = None) -> Tensor:
        """Return normalised text features (1, C, D)."""
        return self.task.clip.ensemble(self.templates, names)[None]

    def references(self, names: Sequence[str]) -> Tensor:
        """Return the prompts themselves (1, C, D)."""
        return self(names)


def bottleneck(width: int, reduction: int) -> nn.Sequential:
    """Return ``ReLU(W2 ReLU(W1 f))`` of ``width`` numbers, with a ``reduction``-th of them inside."""
    inner = max(width // reduction, 1)
    return nn.Sequential(nn.Linear(width, inner, bias=False), nn.ReLU(), nn.Linear(inner, width, bias=False), nn.ReLU())


@register
class ImageAdapter(Hard):
    """Hand-written prompts, and image features ``ratio A(f) + (1 - ratio) f``, A(f) = ReLU(W2 ReLU(W1 f)), f not normalised.

    (CLIP-Adapter, arXiv 2110.04544, section 3.2.)
    """

    image_level = "raw"

    def __init__(
        self,
        task: Task,
        templates: Annotated[Sequence[str], Setting("hard templates that are averaged; () = the data set's first")] = (),
        ratio: Annotated[float, Setting("share of the adapter in the image features", low=0, high=1)] = 0.2,
        reduction: Annotated[int, Setting("width of the features divided by the adapter's inner width", low=1)] = 4,
    ) -> None:
        super().__init__(task, templates)
        width = task.clip.embed_dim
        self.ratio, self.adapter = ratio, bottleneck(width, reduction)

    def adapt(self, image: Tensor) -> Tensor:
        """Return normalised features (B, D) of features (B, D) as they come from the tower."""
        return F.normalize(self.ratio * self.adapter(image) + (1 - self.ratio) * image, dim=-1)
