"""Banks that change weights inside the towers, in front of a hand-written prompt."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from promptmix.clip import Weights
from promptmix.prompts.roles import PromptBank, Task

#: Setting -> the towers that it changes, by their attribute of the frozen model.
ENCODERS = {"text": ("text",), "vision": ("image",), "both": ("text", "image")}


class ChangedTowers(PromptBank):
    """What such banks share; ``weights`` says what is changed.

    Args:
        encoder: which tower is changed, a key of ``ENCODERS``.
        templates: the hand-written prompt, the first of them; () = the data set's first. It is encoded anew in each step where
            the text tower is changed.
    """

    def __init__(self, task: Task, encoder: str, templates: Sequence[str]) -> None:
        super().__init__(task)
        self.template = (tuple(templates) or task.templates[:1])[0]
        self.towers = ENCODERS[encoder]

    @abstractmethod
    def weights(self, tower: str) -> Weights:
        """Return what is added to the weights of ``text`` or ``image``, by their names in that tower."""

    @property
    def image_is_frozen(self) -> bool:
        """Whether only the text tower is changed."""
        return "image" not in self.towers

    def image_changes(self) -> dict[str, Any]:
        """Return the changed weights of the image tower."""
        return {} if self.image_is_frozen else {"weights": self.weights("image")}

    def forward(self, names: Sequence[str], image_features: Tensor | None = None, *, full_stop: bool | None = None) -> Tensor:
        """Return normalised text features (1, C, D)."""
        if "text" not in self.towers:
            return self.references(names)
        tower = self.task.clip.text
        return F.normalize(tower(tower.compose_text(self.template, names), weights=self.weights("text")), dim=-1)

    def references(self, names: Sequence[str]) -> Tensor:
        """Return the hand-written prompt's features (1, C, D) through the unchanged tower, encoded once for a set of names."""
        return self.once("hard", names, lambda: self.task.clip.hard_features([self.template], names))
