"""Learning at test time: a few steps on the views of each picture, whose outcome is used for it once and then forgotten."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from promptmix.errors import ConfigError
from promptmix.parallel import group
from promptmix.prompts.learner import Learner
from promptmix.prompts.roles import Head, Loss, LossSum, PromptBank, Task
from promptmix.prompts.step import Step

#: Losses are scaled for the backward pass, since gradients through fp16 may vanish; a power of two changes no digit.
_SCALE = 1024.0


class TestTimeLearner(Learner):
    """A bank whose parameters start anew for every test picture and are tuned on its views.

    Nothing is learned before: the parameters are where tuning starts, and a checkpoint holds them.

    Args:
        task: the frozen model and the data set's words.
        bank: of text prompts; its parameters are tuned.
        loss: what is minimised, without labels.
        optimizer: makes the optimizer of the tuned parameters, fresh for each picture.
        steps: steps on a picture.
        select: the step of all views to the indices of those that count; chosen once, before the first step.
        head: how features become scores.

    Raises:
        ConfigError: the bank changes the image tower, or the head reads patches.
    """

    text_per_picture = True
    __test__ = False  # for pytest, which takes the name for a test's

    def __init__(
        self,
        task: Task,
        bank: PromptBank,
        loss: Loss | LossSum,
        optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
        steps: int = 1,
        select: Callable[[Step], Tensor] | None = None,
        head: Head | None = None,
    ) -> None:
        super().__init__(task, bank, head=head, loss=loss)
        if not bank.image_is_frozen or bank.per_image or self.head.needs_tokens:
            raise ConfigError(f"{type(bank).__name__} can't be tuned at test time: only text prompts on whole pictures can")
        self.bank.requires_grad_(False)
        self.optimizer, self.steps, self.select = optimizer, steps, select

    def encode_images(self, images: Tensor) -> Tensor:
        """Return normalised features (B, D) of pictures (B, 3, S, S), or (B, V, D) of the views (B, V, 3, S, S) of each."""
        encode = super().encode_images
        return torch.stack([encode(views) for views in images]) if images.dim() == 5 else encode(images)

    def classifier(self) -> Tensor | None:
        """Return None: every picture has text features of its own."""
        return None

    def logits(self, image_features: Tensor, classifier: Tensor | None) -> Tensor:
        """Return scores (B, C) of features (B, V, D), each picture's with the prompt that its views tuned; (B, D) has none."""
        if image_features.dim() == 2:
            return self._scores(image_features, dict(self.bank.named_parameters())).logits
        return torch.cat([self._scores(views[:1], self.tune(views)).logits for views in image_features])

    @torch.no_grad()
    def tune(self, views: Tensor) -> dict[str, Tensor]:
        """Return the bank's parameters after the steps on the views (V, D) of one picture."""
        tuned = {name: value.detach().clone() for name, value in self.bank.named_parameters()}
        if not self.steps:
            return tuned
        optimizer, chosen = self.optimizer([value.requires_grad_() for value in tuned.values()]), None
        for _ in range(self.steps):
            optimizer.zero_grad()
            with torch.enable_grad():
                step = self._scores(views, tuned) if chosen is None else self._scores(views[chosen], tuned)
                if chosen is None and self.select is not None:
                    chosen = self.select(step)
                    step = Step(self, None, features=views[chosen], text=step.text)
                (_SCALE * self.loss(step).total).backward()
                group.average_gradients(tuned.values())
            for value in tuned.values():
                if value.grad is not None:
                    value.grad /= _SCALE
            optimizer.step()
        return tuned

    def _scores(self, features: Tensor, parameters: dict[str, Any]) -> Step:
        """Return the step of features (B, D) with the text features of a bank with these parameters."""
        text = functional_call(self.bank, parameters, (self.task.classnames,))
        return Step(self, None, features=features, text=text)
