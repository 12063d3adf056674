"""Averages of learned tensors over epochs, which any method can deploy (PromptSRC, arXiv 2307.06948)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from promptmix.engine.layout import today


class GaussianAverage(nn.Module):
    """Average of learned tensors over epochs, weighted by a Gaussian over the epochs; it has no parameters of its own.

    Args:
        learner: whose parameters are averaged.
        mean: mu, in epochs counted from 1.
        std: sigma, in epochs.
    """

    def __init__(self, learner: nn.Module, mean: float, std: float) -> None:
        super().__init__()
        self.mean, self.std = mean, std
        for name, parameter in learner.named_parameters():
            self.register_buffer(_flat(name), parameter.detach().clone())

    @torch.no_grad()
    def update(self, learner: nn.Module, epoch: int) -> None:
        """Take the parameters after ``epoch`` (counted from 1) into the average."""
        logs = -0.5 * ((torch.arange(1, epoch + 1, dtype=torch.float64) - self.mean) / self.std) ** 2
        share = float(logs.softmax(dim=0)[-1])  # of this epoch among those so far; 1 for the first
        for name, parameter in learner.named_parameters():
            average = self.get_buffer(_flat(name))
            average.copy_(torch.lerp(average, parameter, share))

    @torch.no_grad()
    def write_to(self, learner: nn.Module) -> None:
        """Give ``learner`` the averaged parameters."""
        for name, parameter in learner.named_parameters():
            parameter.copy_(self.get_buffer(_flat(name)))

    def fit_state(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return a checkpoint's tensors by today's names."""
        return {_flat(today(name.replace("/", "."))): tensor for name, tensor in state.items()}


def _flat(name: str) -> str:
    return name.replace(".", "/")  # names of buffers take no dots
