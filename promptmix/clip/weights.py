"""Weights inside a frozen module that a method changes for one pass, without touching the module."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from promptmix.errors import ConfigError

#: A low-rank branch or the like beside a linear layer: its input (..., in) to what is added to its output (..., out).
Branch = Callable[[Tensor], Tensor]

#: What a weight is changed by: a tensor added to it, or a branch beside it.
Delta = Tensor | Branch

#: {name in the tower's state dict: delta}
Weights = Mapping[str, Delta]

Result = TypeVar("Result")

_THIRDS = ("q", "k", "v")


def held_as(name: str, held: Container[str]) -> tuple[str, int | None]:
    """Return the name of the tensor that ``name`` means, and which third of it.

    Args:
        name: as a method gives it.
        held: the names of a module's tensors. Where queries, keys and values are one of them (``in_proj``, timm's ``qkv``),
            ``q_proj``, ``k_proj`` and ``v_proj`` are its thirds.
    """
    for i, part in enumerate(_THIRDS):
        for kind in ("weight", "bias"):
            end = f"attn.{part}_proj.{kind}"
            if name.endswith(end) and name not in held:
                stem = name.removesuffix(end)
                timms = f"{stem}attn.qkv.{kind}"
                return timms if timms in held else f"{stem}attn.in_proj_{kind}", i
    return name, None


def merged(module: nn.Module, weights: Weights) -> dict[str, Tensor]:
    """Return the tensors of ``module`` that ``weights`` changes, with the deltas added."""
    if not weights:
        return {}
    held = dict(module.named_parameters()) | dict(module.named_buffers())
    found: dict[str, Tensor] = {}
    for name, delta in weights.items():
        if isinstance(delta, Tensor):
            key, part = held_as(name, held)
            value = found.get(key, held[key])
            if part is None:
                found[key] = value + delta
            else:
                found[key] = torch.cat([piece + delta if i == part else piece for i, piece in enumerate(value.chunk(3))])
    return found


class _Holder(nn.Module):
    """A module and a function of it, since ``functional_call`` changes the weights of what it calls."""

    def __init__(self, module: nn.Module, function: Callable[..., object]) -> None:
        super().__init__()
        self.module, self.function = module, function

    def forward(self, *args: Tensor) -> object:
        return self.function(self.module, *args)


def run_changed(module: nn.Module, changed: Mapping[str, Tensor], function: Callable[..., Result], *args: Tensor) -> Result:
    """Return ``function(module, *args)`` as it is with the tensors ``changed`` in place of the module's own."""
    if not changed:
        return function(module, *args)
    held = {f"module.{name}": value for name, value in changed.items()}
    result: Result = functional_call(_Holder(module, function), held, args)
    return result


@contextmanager
def beside(root: nn.Module, weights: Weights) -> Iterator[None]:
    """Have branches run beside the linear layers of ``root`` inside the context.

    Raises:
        ConfigError: a branch names something other than a linear layer, or one that is not run as a layer of its own.
    """
    ran: set[str] = set()
    handles = []
    branches = {name: delta for name, delta in weights.items() if not isinstance(delta, Tensor)}

    held = dict(root.named_parameters()) if branches else {}

    def watch(name: str, branch: Branch, third: int | None) -> Callable[[nn.Module, tuple[Tensor], Tensor], Tensor]:
        def add(module: nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor:
            ran.add(name)
            if third is None:
                return out + branch(args[0])
            parts = enumerate(out.chunk(3, dim=-1))
            return torch.cat([part + branch(args[0]) if i == third else part for i, part in parts], dim=-1)

        return add

    try:
        for name, branch in branches.items():
            key, third = held_as(name, held)
            module = root.get_submodule(key.removesuffix(".weight")) if key in held and key.endswith(".weight") else root
            if isinstance(module, nn.Linear):  # what else there is is reported below
                handles.append(module.register_forward_hook(watch(name, branch, third)))
        yield
    finally:
        for handle in handles:
            handle.remove()
    if ignored := sorted(branches.keys() - ran):
        raise ConfigError(
            f"weights give {ignored[0]!r} a function, but it is no linear layer that this tower runs on its own; "
            "give a tensor that is added to the weight"
        )
