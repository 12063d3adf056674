"""Gradients that differ from the derivative, as some methods train with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _ScaledGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.factor * gradient, None


def scaled(function: Callable[[Tensor], Tensor], x: Tensor, scale: float) -> Tensor:
    """Return ``scale * function(x)``, with weights inside that learn as if scale were 1 (MMA, LwEIB).

    Their gradients are divided by ``scale``; that of ``x`` is true.
    """
    out: Tensor = scale * _ScaledGradient.apply(function(_ScaledGradient.apply(x, scale)), 1 / scale)
    return out
