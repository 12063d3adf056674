"""``dassl.optim``: optimizers and learning-rate schedules from the ``OPTIM`` node, and Dassl's own classes for both."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import LRScheduler

from promptmix.dassl.importing import lacking
from promptmix.engine.optim import OPTIMIZERS as AVAI_OPTIMS
from promptmix.engine.optim import SCHEDULES as AVAI_SCHEDS
from promptmix.engine.optim import build_lr_scheduler, build_optimizer

__all__ = [
    "AVAI_OPTIMS",
    "AVAI_SCHEDS",
    "AdamW",
    "ConstantWarmupScheduler",
    "LinearWarmupScheduler",
    "PlainRAdam",
    "RAdam",
    "build_lr_scheduler",
    "build_optimizer",
]


class RAdam(torch.optim.RAdam):
    """Rectified Adam (https://arxiv.org/abs/1908.03265), PyTorch's own, under Dassl's name and with its arguments.

    Args:
        params: what to optimise.
        lr: learning rate.
        betas: decay of the two running means.
        eps: added to the denominator.
        weight_decay: decoupled from the gradient, as in Dassl.
        degenerated_to_sgd: accepted for Dassl's sake; PyTorch always takes the step without a denominator.
    """

    def __init__(
        self,
        params: Any,  # whatever torch's optimizers take
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        degenerated_to_sgd: bool = True,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, decoupled_weight_decay=True)


PlainRAdam = RAdam


class _BaseWarmupScheduler(LRScheduler):
    """Runs a warm-up, then hands over to another schedule.

    Args:
        optimizer: whose learning rates are set.
        successor: the schedule after the warm-up.
        warmup_epoch: length of the warm-up in epochs.
        last_epoch: epoch to go on from; -1 = the start.
        verbose: accepted for Dassl's sake.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        successor: LRScheduler,
        warmup_epoch: int,
        last_epoch: int = -1,
        verbose: bool = False,
    ) -> None:
        self.successor, self.warmup_epoch = successor, warmup_epoch
        super().__init__(optimizer, last_epoch)

    def _warm(self) -> list[float]:
        raise NotImplementedError

    def get_lr(self) -> list[float | torch.Tensor]:
        """Return the learning rate of each group for the current epoch."""
        return list(self.successor.get_last_lr() if self.last_epoch >= self.warmup_epoch else self._warm())

    def step(self, epoch: int | None = None) -> None:
        """Go on by an epoch, of the warm-up or of the successor."""
        if self.last_epoch < self.warmup_epoch:
            super().step(epoch)
            return
        self.successor.step(epoch)
        self._last_lr = self.successor.get_last_lr()


class ConstantWarmupScheduler(_BaseWarmupScheduler):
    """Trains at ``cons_lr`` during the warm-up."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        successor: LRScheduler,
        warmup_epoch: int,
        cons_lr: float,
        last_epoch: int = -1,
        verbose: bool = False,
    ) -> None:
        self.cons_lr = cons_lr
        super().__init__(optimizer, successor, warmup_epoch, last_epoch, verbose)

    def _warm(self) -> list[float]:
        return [self.cons_lr for _ in self.base_lrs]


class LinearWarmupScheduler(_BaseWarmupScheduler):
    """Begins at ``min_lr``, then rises in proportion to the epoch."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        successor: LRScheduler,
        warmup_epoch: int,
        min_lr: float,
        last_epoch: int = -1,
        verbose: bool = False,
    ) -> None:
        self.min_lr = min_lr
        super().__init__(optimizer, successor, warmup_epoch, last_epoch, verbose)

    def _warm(self) -> list[float]:
        if self.last_epoch == 0:
            return [self.min_lr for _ in self.base_lrs]
        return [float(rate) * self.last_epoch / self.warmup_epoch for rate in self.base_lrs]


__getattr__ = lacking("dassl.optim")
