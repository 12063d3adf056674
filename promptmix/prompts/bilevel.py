"""Bilevel training: some parameters learn on validation batches, one step before each step of the others on training batches."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from promptmix.data.reading.loaders import streams_kept
from promptmix.errors import ConfigError
from promptmix.parallel import group
from promptmix.prompts.learner import PromptLearner
from promptmix.prompts.trainer import PromptTrainer


class BilevelTrainer(PromptTrainer):
    """A trainer with outer parameters, which learn on validation batches, and inner ones; first order, the same loss for both.

    Validation batches are those of an evaluation (``DATALOADER.TEST.BATCH_SIZE``, no augmentation), one after another and round
    and round.
    """

    @abstractmethod
    def outer_parameters(self, model: PromptLearner) -> list[nn.Parameter]:
        """Return what learns on validation batches."""

    @abstractmethod
    def build_outer_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the optimizer of the outer parameters; its rate stays as it is."""

    def build_optimizer(self, model: PromptLearner) -> torch.optim.Optimizer:
        """Return the optimizer of the inner parameters."""
        outer = {id(parameter) for parameter in self.outer_parameters(model)}
        inner: Any = [parameter for parameter in model.parameters() if id(parameter) not in outer]
        return super().build_optimizer(inner)

    def build_model(self) -> None:
        """Build the learner with both optimizers."""
        super().build_model()
        self.outer_optimizer = self.build_outer_optimizer(self.outer_parameters(self.model))
        self._batches: Iterator[dict[str, Any]] | None = None

    @property
    def outer_batch(self) -> int:
        """Pictures of an outer step, for ``promptmix estimate``."""
        return min(self.cfg.DATALOADER.TEST.BATCH_SIZE, len(self.dm.dataset.val or ()))

    def before_train(self) -> None:
        """Resume if there is something to resume.

        Raises:
            ConfigError: there are no validation pictures.
        """
        if self.val_loader is None:
            raise ConfigError(
                f"TRAINER.NAME {self.cfg.TRAINER.NAME} learns on val pictures too, and {self.cfg.DATASET.NAME} has no val part "
                "here; add val pictures"
            )
        super().before_train()

    def forward_backward(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Take the outer step on the next validation batch, then the inner one on ``batch``."""
        if self._batches is None:
            self._batches = self._round_and_round(self.epoch * self.num_batches + self.batch_idx)
        images, labels = self.parse_batch_test(next(self._batches))
        with self.precision.autocast():
            terms = self.model.loss(self.model.step(images, labels))
        outer = self.outer_parameters(self.model)

        def backward(loss: torch.Tensor) -> None:
            self.detect_anomaly(loss)
            loss.backward(inputs=outer)
            group.average_gradients(outer)

        self.precision.backward_and_update(terms.total, [self.outer_optimizer], backward=backward)
        return {**super().forward_backward(batch), "loss_val": terms.total.detach()}

    def _round_and_round(self, step: int) -> Iterator[dict[str, Any]]:
        """Yield validation batches without end, beginning with that of ``step``; the training's random streams stand still."""
        loader: Any = self.val_loader
        skip = step % len(loader)
        while True:
            with streams_kept():
                batches = iter(loader)
            for batch in batches:
                if skip:
                    skip -= 1
                else:
                    yield batch

    def progress_state(self) -> dict[str, Any]:
        """Return the state of the outer optimizer too."""
        return {**super().progress_state(), "outer_optimizer": self.outer_optimizer.state_dict()}

    def load_progress_state(self, state: dict[str, Any]) -> None:
        """Take back what ``progress_state`` returned."""
        super().load_progress_state(state)
        self.outer_optimizer.load_state_dict(state["outer_optimizer"])
