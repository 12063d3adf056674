"""``dassl.utils``: files, seeds, logs, meters, registries and checkpoints."""

from __future__ import annotations

import difflib
import urllib.request
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from promptmix.dassl.importing import lacking
from promptmix.data.reading.images import read_image
from promptmix.engine.checkpoint import load_checkpoint, load_pretrained_weights, resume_from_checkpoint, save_checkpoint
from promptmix.engine.log import Logger, setup_logger
from promptmix.engine.meters import AverageMeter, MetricMeter
from promptmix.registry import Registry
from promptmix.utils import (
    atomic_write,
    check_isfile,
    collect_env_info,
    count_num_param,
    get_logger,
    listdir_nohidden,
    mkdir_if_missing,
    read_json,
    set_random_seed,
    tolist_if_not,
    write_json,
)

__all__ = [
    "AverageMeter",
    "Logger",
    "MetricMeter",
    "Registry",
    "adjust_learning_rate",
    "check_availability",
    "check_isfile",
    "collect_env_info",
    "count_num_param",
    "download_url",
    "get_most_similar_str_to_a_from_b",
    "init_network_weights",
    "listdir_nohidden",
    "load_checkpoint",
    "load_pretrained_weights",
    "mkdir_if_missing",
    "open_all_layers",
    "open_specified_layers",
    "read_image",
    "read_json",
    "resume_from_checkpoint",
    "save_checkpoint",
    "set_bn_to_eval",
    "set_random_seed",
    "setup_logger",
    "tolist_if_not",
    "write_json",
]


def download_url(url: str, dst: str) -> None:
    """Download ``url`` to the file ``dst``, whole or not at all."""
    get_logger().info("* url=%r\n* destination=%r", url, dst)
    atomic_write(dst, lambda path: urllib.request.urlretrieve(url, path))


def get_most_similar_str_to_a_from_b(a: str, b: Iterable[str]) -> str:
    """Return the string in ``b`` that is nearest to ``a``."""
    return max(b, key=lambda candidate: difflib.SequenceMatcher(None, a, candidate).ratio())


def check_availability(requested: str, available: Sequence[str]) -> None:
    """Check that a name is among those there are.

    Raises:
        ValueError: it is not; the message suggests the nearest.
    """
    if requested not in available:
        nearest = f", did you mean [{get_most_similar_str_to_a_from_b(requested, available)}]?" if available else ""
        raise ValueError(f"The requested one is expected to belong to {list(available)}, but got [{requested}]{nearest}")


def open_all_layers(model: nn.Module) -> None:
    """Let every layer of ``model`` train."""
    model.train()
    model.requires_grad_(True)


def open_specified_layers(model: nn.Module, open_layers: str | Sequence[str]) -> None:
    """Let the named children of ``model`` train and freeze the others.

    Raises:
        ValueError: there is no such child.
    """
    inner = model.module if isinstance(model, nn.DataParallel) else model
    names = [open_layers] if isinstance(open_layers, str) else list(open_layers)
    children = dict(inner.named_children())
    unknown = [name for name in names if name not in children]
    if unknown:
        raise ValueError(f"no layer {unknown[0]!r} in {type(inner).__name__} (layers: {', '.join(children)})")
    for name, child in children.items():
        child.train(name in names)
        child.requires_grad_(name in names)


def init_network_weights(model: nn.Module, init_type: str = "normal", gain: float = 0.02) -> None:
    """Start every layer anew: weights as ``init_type`` says, biases at 0, batch norms near 1.

    Args:
        model: changed in place.
        init_type: ``normal``, ``xavier``, ``kaiming`` or ``orthogonal``.
        gain: standard deviation, or gain, of the start.

    Raises:
        ValueError: another ``init_type``.
    """
    starts = {
        "normal": lambda weight: nn.init.normal_(weight, 0.0, gain),
        "xavier": lambda weight: nn.init.xavier_normal_(weight, gain),
        "kaiming": lambda weight: nn.init.kaiming_normal_(weight, a=0, mode="fan_in"),
        "orthogonal": lambda weight: nn.init.orthogonal_(weight, gain),
    }
    if init_type not in starts:
        raise ValueError(f"init_type is {init_type!r}, but must be one of: {', '.join(starts)}")
    for module in model.modules():
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.affine:
                nn.init.normal_(module.weight, 1.0, gain)
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear | nn.modules.conv._ConvNd) and weight is not None:
            starts[init_type](weight)
            if bias is not None:
                nn.init.zeros_(bias)


def set_bn_to_eval(m: nn.Module) -> None:
    """Let a batch norm use its running statistics while training; ``Module.apply`` takes this."""
    if isinstance(m, nn.modules.batchnorm._BatchNorm):
        m.eval()


def adjust_learning_rate(
    optimizer: torch.optim.Optimizer,
    base_lr: float,
    epoch: int,
    stepsize: int | Sequence[int] = 20,
    gamma: float = 0.1,
    linear_decay: bool = False,
    final_lr: float = 0,
    max_epoch: int = 100,
) -> None:
    """Set the learning rate of every group for an epoch, without a schedule.

    Args:
        optimizer: changed in place.
        base_lr: learning rate at epoch 0.
        epoch: the current epoch, from 0.
        stepsize: every how many epochs, or at which, the rate is multiplied by ``gamma``.
        gamma: factor of each step.
        linear_decay: go from ``base_lr`` to ``final_lr`` in a line instead.
        final_lr: end of that line.
        max_epoch: where it ends.
    """
    if linear_decay:
        share = epoch / max_epoch
        rate = share * final_lr + (1 - share) * base_lr
    else:
        steps = epoch // stepsize if isinstance(stepsize, int) else sum(epoch >= step for step in stepsize)
        rate = base_lr * gamma**steps
    for group in optimizer.param_groups:
        group["lr"] = rate


__getattr__ = lacking("dassl.utils")
