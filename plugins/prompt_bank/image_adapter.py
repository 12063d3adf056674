"""A small network behind the frozen image tower (CLIP-Adapter, arXiv 2110.04544, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch.nn.functional as F
from promptmix.plugins.prompt_bank.hard import Hard
from torch import Tensor, nn

from promptmix import hookimpl
from promptmix.config.declare import Setting
from promptmix.prompts.roles import Task
from promptmix.registry import Registry


class ImageAdapter(Hard):
    """Hand-written prompts, and image features ``ratio A(f) + (1 - ratio) f``, A(f) = ReLU(W2 ReLU(W1 f)), f not normalised.

    Args:
        task: the frozen model and the class names.
        templates: hard templates that are averaged.
        ratio: share of the adapter.
        reduction: D divided by the adapter's inner width.
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
        inner = max(width // reduction, 1)
        self.ratio = ratio
        self.adapter = nn.Sequential(
            nn.Linear(width, inner, bias=False), nn.ReLU(), nn.Linear(inner, width, bias=False), nn.ReLU()
        )

    def adapt(self, image: Tensor) -> Tensor:
        """Return normalised features (B, D) of features (B, D) as they come from the tower."""
        return F.normalize(self.ratio * self.adapter(image) + (1 - self.ratio) * image, dim=-1)


@hookimpl
def register_prompt_banks(registry: Registry) -> None:
    """Add the bank."""
    registry.register(ImageAdapter)
