"""Another run as a teacher: its prompts' class vectors and image features (PromptKD, arXiv 2403.02781)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from promptmix.errors import ConfigError
from promptmix.predict import Predictor
from promptmix.prompts.heads import Cosine, WeightedScores
from promptmix.prompts.learner import Learner
from promptmix.prompts.teachers import Teacher


class Run(Teacher):
    """What a run of any method learned that scores by one vector for each class.

    Args:
        folder: output folder of the run.
        weights: file of its backbone, where it had one of its own.
        device: where it computes.
        seen: how the student's pictures are made: ``SIZE``, ``PIXEL_MEAN`` and ``PIXEL_STD`` of its ``INPUT``.

    Raises:
        UserError: the folder holds no run; the method has several vectors for a class, or one for each picture; it reads
            pictures of another size or range.
    """

    def __init__(self, folder: str, weights: str, device: str, seen: dict[str, Any]) -> None:
        self.folder = folder
        self.predictor = Predictor(folder, device=device, weights=weights)
        result = self.predictor.result
        self.name = f"{result.trainer} on {result.config['MODEL']['BACKBONE']['NAME']}"
        for key, ours in seen.items():
            theirs = result.config["INPUT"][key]
            if any(abs(a - b) > 1e-6 for a, b in zip(ours, theirs, strict=True)):
                raise ConfigError(
                    f"INPUT.{key} is {list(ours)}, but the teacher in {folder} reads pictures with {list(theirs)}; both see the "
                    "same pictures, so take that value or another teacher"
                )
        learner = self.predictor.learner(self.predictor.classnames)
        head = getattr(learner, "head", None)
        if not isinstance(learner, Learner) or not isinstance(head, (Cosine, WeightedScores)) or learner.bank.per_image:
            raise ConfigError(
                f"the teacher in {folder} is {self.name}, which does not score by one vector for each class; take a run of "
                "another method, such as PromptSRC"
            )
        self.learner = learner
        self.scale = float(head.scale or learner.clip.scale)
        self.width = self.vectors(self.predictor.classnames[:1]).shape[1]

    def vectors(self, names: Sequence[str]) -> Tensor:
        """Return the text features (C, D) of its prompt."""
        with torch.no_grad():
            text = self.predictor.learner(names).step(torch.empty(0)).text
        if text.shape[0] != 1:
            raise ConfigError(
                f"the teacher in {self.folder} is {self.name} with {text.shape[0]} prompts, but a student learns one vector for "
                "each class; take a run with one prompt"
            )
        return text[0].detach()

    def image(self, images: Tensor) -> Tensor:
        self.learner.to(images.device)
        self.learner.clip.to(images.device)  # where a step is only counted, neither has numbers
        with torch.no_grad():
            return self.learner.step(images).image.detach()
