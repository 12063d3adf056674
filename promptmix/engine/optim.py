"""Optimizers and learning-rate schedules by Dassl's config keys, with the same learning rate at every epoch."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from yacs.config import CfgNode

from promptmix.config.core import OPTIMIZERS, SCHEDULES, WARMUPS
from promptmix.errors import CheckpointError, ConfigError

__all__ = ["EpochSchedule", "build_lr_scheduler", "build_optimizer", "load_optimizer"]

#: Optimizers whose state has the shape of its parameter, or is one number.
_ALIKE = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.RAdam)


def build_optimizer(
    model: nn.Module | Iterable[Any],
    optim_cfg: CfgNode,
    param_groups: Iterable[Any] | None = None,
) -> torch.optim.Optimizer:
    """Build the optimizer that an ``OPTIM`` node describes.

    Args:
        model: a module, or parameters, or parameter groups.
        optim_cfg: the ``OPTIM`` node.
        param_groups: learn these instead of ``model``'s parameters.

    Raises:
        ConfigError: ``OPTIM.NAME`` is unknown.
        TypeError: ``OPTIM.STAGED_LR`` is set but ``model`` is not a module.
    """
    name, lr = optim_cfg.NAME, optim_cfg.LR
    if name not in OPTIMIZERS:
        raise ConfigError(f"OPTIM.NAME is {name!r}, but must be one of: {', '.join(OPTIMIZERS)}")
    if param_groups is None:
        if optim_cfg.STAGED_LR:
            param_groups = _staged_groups(model, optim_cfg)
        else:
            param_groups = model.parameters() if isinstance(model, nn.Module) else model
    elif optim_cfg.STAGED_LR:
        warnings.warn("OPTIM.STAGED_LR is ignored: this trainer makes its own parameter groups", stacklevel=2)

    common: dict[str, Any] = {"lr": lr, "weight_decay": optim_cfg.WEIGHT_DECAY}
    adam: dict[str, Any] = {"betas": (optim_cfg.ADAM_BETA1, optim_cfg.ADAM_BETA2), "eps": getattr(optim_cfg, "ADAM_EPS", 1e-8)}
    if name == "sgd":
        return torch.optim.SGD(
            param_groups,
            momentum=optim_cfg.MOMENTUM,
            dampening=optim_cfg.SGD_DAMPNING,
            nesterov=optim_cfg.SGD_NESTEROV,
            **common,
        )
    if name == "rmsprop":
        return torch.optim.RMSprop(param_groups, momentum=optim_cfg.MOMENTUM, alpha=optim_cfg.RMSPROP_ALPHA, **common)
    if name == "radam":
        # The RAdam that Dassl carries decays weights directly, as AdamW does.
        return torch.optim.RAdam(param_groups, **adam, decoupled_weight_decay=True, **common)
    if name == "adamw":
        return torch.optim.AdamW(param_groups, **adam, **common)
    return torch.optim.Adam(param_groups, **adam, amsgrad=name == "amsgrad", **common)


def _staged_groups(model: nn.Module | Iterable[Any], optim_cfg: CfgNode) -> list[dict[str, Any]]:
    """Split a module's children into old ones at ``LR * BASE_LR_MULT`` and ``NEW_LAYERS`` at ``LR``."""
    if not isinstance(model, nn.Module):
        raise TypeError("OPTIM.STAGED_LR needs a module with named children, not a list of parameters")
    module: nn.Module = model.module if isinstance(model, nn.DataParallel) else model
    new_layers = [optim_cfg.NEW_LAYERS] if isinstance(optim_cfg.NEW_LAYERS, str) else list(optim_cfg.NEW_LAYERS)
    children = dict(module.named_children())
    unknown = sorted(set(new_layers) - set(children))
    if unknown:
        known = ", ".join(children)
        raise ConfigError(f"OPTIM.NEW_LAYERS names {', '.join(unknown)}, but the model's layers are: {known}")
    old = [p for name, child in children.items() if name not in new_layers for p in child.parameters()]
    new = [p for name, child in children.items() if name in new_layers for p in child.parameters()]
    return [{"params": old, "lr": optim_cfg.LR * optim_cfg.BASE_LR_MULT}, {"params": new}]


def load_optimizer(optimizer: torch.optim.Optimizer, state: Any, source: str) -> None:  # state: whatever a file holds
    """Give an optimizer its saved state, looked through first: PyTorch takes any, and fails or trains on otherwise later.

    Args:
        optimizer: takes the state.
        state: what its ``state_dict`` returned.
        source: where it comes from, for the message.

    Raises:
        CheckpointError: it is of other parameters or settings, or damaged.
    """
    try:
        for theirs, ours in zip(state["param_groups"], optimizer.param_groups, strict=False):
            odd = [key for key, value in ours.items() if key != "params" and key in theirs and not _alike(theirs[key], value)]
            if odd:
                raise TypeError(f"{odd[0]} is {theirs[odd[0]]!r} there")
        optimizer.load_state_dict(state)
        if isinstance(optimizer, _ALIKE):
            _check_moments(optimizer)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise CheckpointError(
            f"the optimizer state in {source} doesn't fit this run ({error}); use the config that wrote it"
        ) from error


def _alike(theirs: object, ours: object) -> bool:
    """Tell whether a saved option of an optimizer is of the kind that it has here."""
    numbers = (bool, int, float, torch.Tensor)
    return isinstance(theirs, numbers) if isinstance(ours, numbers) else ours is None or isinstance(theirs, type(ours) | list)


def _check_moments(optimizer: torch.optim.Optimizer) -> None:
    """Refuse a state whose tensors are not of their parameters' shapes, or no numbers.

    Raises:
        ValueError: there is one.
    """
    for parameter, moments in optimizer.state.items():
        for name, value in moments.items():
            if isinstance(value, torch.Tensor) and value.ndim and value.shape != parameter.shape:
                raise ValueError(f"{name} is {tuple(value.shape)} there for a parameter of {tuple(parameter.shape)}")
            if isinstance(value, torch.Tensor) and not bool(torch.isfinite(value.float()).all()):
                raise ValueError(f"{name} holds numbers that are NaN or infinite")


class EpochSchedule(LRScheduler):
    """A learning rate that is a plain function of the epoch, so that it can be continued anywhere.

    Its state is the epoch alone. After a resume the learning rate is what the present config gives at that epoch.

    Args:
        optimizer: each of its groups keeps its own base rate; a group with ``constant`` True has it in every epoch.
        factor: epoch -> multiple of the base rate, used once the warm-up is over.
        warmup_epoch: epochs of warm-up; 0 for none.
        warmup_lr: (epoch, base rate) -> rate during the warm-up.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        factor: Callable[[int], float],
        warmup_epoch: int = 0,
        warmup_lr: Callable[[int, float], float] | None = None,
    ) -> None:
        self.factor = factor
        self.warmup_epoch = warmup_epoch
        self.warmup_lr = warmup_lr
        super().__init__(optimizer)

    def get_lr(self) -> list[float | torch.Tensor]:
        """Return the rate of each parameter group at the present epoch."""
        bases = [float(base) for base in self.base_lrs]
        if self.warmup_lr is not None and self.last_epoch < self.warmup_epoch:
            rates = [self.warmup_lr(self.last_epoch, base) for base in bases]
        else:
            factor = self.factor(self.last_epoch)
            rates = [base * factor for base in bases]
        groups = zip(self.optimizer.param_groups, bases, rates, strict=True)
        return [base if group.get("constant") else rate for group, base, rate in groups]

    # torch takes the rate from here where it is given an epoch: step(epoch).
    _get_closed_form_lr = get_lr

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch and, for the reader, the rates it gives: plain numbers only."""
        return {"last_epoch": self.last_epoch, "last_lr": [float(lr) for lr in self.get_last_lr()]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to the epoch of ``state_dict`` and set the optimizer's rates accordingly.

        Raises:
            CheckpointError: the state is not one of this schedule, or is of another number of parameter groups.
        """
        state_dict = state_dict if isinstance(state_dict, dict) else {}
        epoch, rates = state_dict.get("last_epoch"), state_dict.get("last_lr", [])
        rates = rates if isinstance(rates, list | tuple) else []
        if type(epoch) is not int or epoch < 0 or len(rates) != len(self.base_lrs):
            raise CheckpointError(
                f"the scheduler state in the checkpoint (keys {', '.join(map(str, state_dict)) or 'none'}; {len(rates)} "
                f"parameter groups) doesn't fit this run ({len(self.base_lrs)} groups); "
                "resume with the config that wrote it, or train anew"
            )
        self.last_epoch = epoch
        self._step_count = epoch + 1
        for group, lr in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = lr
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]


def build_lr_scheduler(optimizer: torch.optim.Optimizer, optim_cfg: CfgNode) -> EpochSchedule:
    """Build the schedule that an ``OPTIM`` node describes; ``step()`` it once per epoch, after the epoch's last batch.

    Args:
        optimizer: its groups' present rates are the base rates.
        optim_cfg: the ``OPTIM`` node.

    Raises:
        ConfigError: an unknown schedule or warm-up, or a ``STEPSIZE`` that doesn't fit the schedule.
    """
    warmup = max(int(optim_cfg.WARMUP_EPOCH), 0)
    # With WARMUP_RECOUNT the schedule after the warm-up begins at its own epoch 0. Without, it has counted all along,
    # but its first rate is still the base rate: everything it would have done by then is left out.
    origin = warmup if optim_cfg.WARMUP_RECOUNT else 0
    skipped = warmup - origin
    factor = _factor(optim_cfg, skipped)
    return EpochSchedule(optimizer, lambda epoch: factor(epoch - origin), warmup, _warmup(optim_cfg, warmup))


def _factor(optim_cfg: CfgNode, skipped: int) -> Callable[[int], float]:
    """Return epoch -> multiple of the base rate, where what happens up to epoch ``skipped`` doesn't count.

    A schedule over no epoch, which programs of others build for a training that they then leave out, stays at the base rate.
    """
    name, gamma, max_epoch = optim_cfg.LR_SCHEDULER, optim_cfg.GAMMA, int(optim_cfg.MAX_EPOCH)
    stepsize = optim_cfg.STEPSIZE
    if name == "single_step":
        last = stepsize[-1] if isinstance(stepsize, Sequence) and stepsize else stepsize
        if isinstance(last, bool) or not isinstance(last, int):
            raise ConfigError(f"OPTIM.STEPSIZE is {stepsize!r}, but single_step needs a whole number of epochs")
        size = last if last > 0 else max_epoch or math.inf
        return lambda epoch: gamma ** (epoch // size - skipped // size)
    if name == "multi_step":
        if not isinstance(stepsize, list | tuple):
            raise ConfigError(f"OPTIM.STEPSIZE is {stepsize!r}, but multi_step needs a list of epochs, like (30, 60)")
        return lambda epoch: gamma ** sum(skipped < milestone <= epoch for milestone in stepsize)
    if name == "cosine":
        first = _cosine(skipped, max_epoch) or 2.0  # where the warm-up takes all epochs, this rate is never used
        return lambda epoch: _cosine(epoch, max_epoch) / first
    raise ConfigError(f"OPTIM.LR_SCHEDULER is {name!r}, but must be one of: {', '.join(SCHEDULES)}")


def _cosine(epoch: int, epochs: int) -> float:
    return 1 + math.cos(math.pi * epoch / epochs) if epochs else 2.0


def _warmup(optim_cfg: CfgNode, warmup: int) -> Callable[[int, float], float] | None:
    """Return (epoch, base rate) -> rate for the warm-up, or None where there is none."""
    if not warmup:
        return None
    if optim_cfg.WARMUP_TYPE == "constant":
        return lambda epoch, base: optim_cfg.WARMUP_CONS_LR
    if optim_cfg.WARMUP_TYPE == "linear":
        return lambda epoch, base: base * epoch / warmup if epoch else optim_cfg.WARMUP_MIN_LR
    raise ConfigError(f"OPTIM.WARMUP_TYPE is {optim_cfg.WARMUP_TYPE!r}, but must be one of: {', '.join(WARMUPS)}")
