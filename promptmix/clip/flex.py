"""Attention of packed prompts through PyTorch's FlexAttention: one kernel with a mask of blocks in place of several products.

The kernel skips blocks of 128 x 128 tokens in which nobody sees anybody, and puts no score into memory. PyTorch has its
gradient on a GPU alone; on a CPU prompts can be encoded, but not learned.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from promptmix.errors import ConfigError

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

_REMEDY = "set MODEL.ATTENTION to 'packed'"


def choose_attention(tower: nn.Module, name: str, *, plain: bool) -> None:
    """Have a text tower's packed prompts attend in the way ``name`` (``MODEL.ATTENTION``) from now on.

    Args:
        tower: of a frozen model.
        name: "packed" or "flex".
        plain: whether ``MODEL.PLAIN_TOWERS`` is on.

    Raises:
        ConfigError: this PyTorch has no FlexAttention, or the tower packs no prompts; the message says what to set.
    """
    if name == "flex":
        way = "full length" if plain else str(getattr(tower, "way", "full length"))
        if way != "prefix shared":
            raise ConfigError(f"MODEL.ATTENTION is 'flex', but this text tower's prompts go {way}, not packed; {_REMEDY}")
        _torch_flex()
    tower.flex = name == "flex"  # type: ignore[assignment]


def block_masks(lengths: tuple[int, ...], start: int, device: str, blind: tuple[bool, ...] = ()) -> tuple[BlockMask, BlockMask]:
    """Return who sees whom among packed rows, and among them and the rows that are read: see ``packed_layout``.

    A token sees the prefix (of ``start`` tokens) and its own class's tail, up to itself.
    """
    count, classes = torch.tensor(lengths, device=device), len(lengths)
    rows, ends = start + int(count.sum()), start + count.cumsum(0) - 1
    owner = torch.full((rows,), -1, device=device)
    owner[start:] = torch.arange(classes, device=device).repeat_interleave(count)
    itself = torch.ones(rows, dtype=torch.bool, device=device)
    if any(blind):
        itself[ends[torch.tensor(blind, device=device)]] = False

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        reached = (key < start) | (owner[key] == owner[query])
        return (key <= query) & reached & ((key != query) | itself[query])

    def is_read(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return sees(batch, head, ends[query], key)

    create = _torch_flex().create_block_mask
    return create(sees, None, None, rows, rows, device=device), create(is_read, None, None, classes, rows, device=device)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask) -> Tensor:
    """Attention of (E, H, Q, d) over (E, H, L, d).

    Raises:
        ConfigError: a gradient is wanted on a CPU.
    """
    if torch.is_grad_enabled() and query.requires_grad:
        _check_learns(query.device.type)
    out: Tensor = _kernel(query.device.type)(query, key, value, block_mask=mask)
    return out


def _check_learns(device: str) -> None:
    if device == "cpu":
        raise ConfigError(f"MODEL.ATTENTION is 'flex', whose gradient PyTorch has on a GPU only; {_REMEDY} to train on a CPU")


def _kernel(device: str) -> Callable[..., Any]:
    """Return FlexAttention: compiled on a GPU, where it would compute all scores otherwise; who compiles a step does so there."""
    if device != "cuda" or torch.compiler.is_compiling():
        kernel: Callable[..., Any] = _torch_flex().flex_attention
        return kernel
    return _compiled()


@cache
def _compiled() -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(_torch_flex().flex_attention, dynamic=False)
    return compiled


def _torch_flex() -> Any:
    try:
        from torch.nn.attention import flex_attention
    except ImportError as error:
        raise ConfigError(
            f"MODEL.ATTENTION is 'flex', which PyTorch {torch.__version__} lacks (2.5 has it); {_REMEDY}"
        ) from error
    return flex_attention
