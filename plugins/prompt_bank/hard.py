"""Hand-written prompts: nothing is learned at the text side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from torch import Tensor

from promptmix import hookimpl
from promptmix.config.declare import Setting
from promptmix.prompts.roles import PromptBank, Task
from promptmix.registry import Registry


class Hard(PromptBank):
    """The ensemble of hard templates as one frozen prompt (CLIP, arXiv 2103.00020, section 3.1.4).

    Args:
        task: what the prompts are for.
        templates: hard templates that are averaged.
    """

    def __init__(
        self,
        task: Task,
        templates: Annotated[Sequence[str], Setting("hard templates that are averaged; () = the data set's first")] = (),
    ) -> None:
        super().__init__()
        self.task, self.templates = task, tuple(templates) or task.templates[:1]
        self._encoded: dict[tuple[str, ...], Tensor] = {}

    @property
    def num_experts(self) -> int:
        """Always 1."""
        return 1

    def forward(self, names: Sequence[str], image_features: Tensor | None = None, *, full_stop: bool | None = None) -> Tensor:
        """Return normalised text features (1, C, D), encoded once for a set of names; the templates say where they end."""
        key = (*names, str(self.task.clip.scale.device))
        if key not in self._encoded:
            self._encoded[key] = self.encode(names)
        return self._encoded[key]

    def encode(self, names: Sequence[str]) -> Tensor:
        """Return normalised text features (1, C, D)."""
        return self.task.clip.ensemble(self.templates, names)[None]

    def references(self, names: Sequence[str]) -> Tensor:
        """Return the prompts themselves (1, C, D)."""
        return self(names)


@hookimpl
def register_prompt_banks(registry: Registry) -> None:
    """Add the bank."""
    registry.register(Hard)
