"""Attention over tokens and over a memory of keys and values beside them, of which several groups may be a weighted choice.

With groups g of memory tokens, the output is sum_g share_g attention([tokens, group g]). The tokens' own part is the same for all
of them: with Z its sum of exponentials and Z_g that of a group, attention([tokens, group g]) is Z / (Z + Z_g) times the tokens'
attention plus the group's weighted values over Z + Z_g. So G attentions cost little more than one, exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Recalled(NamedTuple):
    """A memory as a layer's attention reads it.

    Attributes:
        key: (H, J, d), by head, or with an axis for what lies between heads and queries.
        value: the same.
        sizes: tokens of each of the G groups.
        shares: (G,), or None for a single group.
    """

    key: Tensor
    value: Tensor
    sizes: tuple[int, ...]
    shares: Tensor | None


def recall(query: Tensor, logits: Tensor, read: Callable[[Tensor], Tensor], memory: Recalled) -> Tensor:
    """Return the heads' outputs (..., Q, d).

    Args:
        query: (..., H, Q, d), scaled.
        logits: (..., H, Q, L), the query's with the tokens, masked.
        read: attention weights (..., H, Q, L) over the tokens to the weighted values (..., H, Q, d).
        memory: what is seen beside the tokens.
    """
    own = read(logits.softmax(dim=-1).to(query.dtype))
    total = logits.float().logsumexp(dim=-1, keepdim=True)
    groups = (query @ memory.key.transpose(-1, -2)).float().split(memory.sizes, dim=-1)
    shares: Sequence[Tensor | float] = (1.0,) if memory.shares is None else memory.shares.unbind()
    kept: Any = 0.0
    weights = []
    for share, group in zip(shares, groups, strict=True):
        if group.shape[-1]:
            both = torch.logaddexp(total, group.logsumexp(dim=-1, keepdim=True))
            kept = kept + share * (total - both).exp()
            weights.append(share * (group - both).exp())
        else:
            kept = kept + share
    kept = kept.to(own.dtype) if isinstance(kept, Tensor) else kept
    return kept * own + torch.cat([*weights, groups[0][..., :0]], dim=-1).to(own.dtype) @ memory.value
