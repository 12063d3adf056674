"""Prompts as the text tower holds them: a prefix that all classes share, and a packed tail where they differ.

Tokens of E prompts over C classes are kept as (E, P + N, W): P shared ones, then class after class what is its own, up to EOT,
without padding. Every layer runs on those rows; attention of the tail's tokens looks at the shared keys and its own class's.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor

from promptmix.clip.blocks import enter, finish, join_heads, project, project_some, recalled, split_heads, split_thirds
from promptmix.clip.memory import Recalled, recall
from promptmix.clip.places import LayerChanges, PromptStep
from promptmix.clip.tokens import kept


@dataclass(frozen=True)
class Prompts:
    """Token embeddings (without positions) of E prompts over C classes, cut where the classes begin to differ.

    Attributes:
        prefix: (E, P, W), from SOT to the last token that all classes share.
        tail: (E, N, W), the other tokens up to EOT, class after class without padding; N = sum of ``lengths``.
        lengths: tail tokens of each of the C classes.
        context: tokens of the tail that stand in front of each class name, where contexts are class-specific.
    """

    prefix: Tensor
    tail: Tensor
    lengths: tuple[int, ...]
    context: int = 0


class Packed(NamedTuple):
    """Tokens between two layers.

    Attributes:
        x: (E, P + N, W).
        start: P.
        lengths: tail tokens of each of the C classes.
    """

    x: Tensor
    start: int
    lengths: tuple[int, ...]


def take_step(tokens: Packed, step: PromptStep, begin: int = 1) -> Packed:
    """Remove and insert tokens behind SOT.

    What all classes share stays shared, unless a step's tokens differ by class or reach into what is the classes' own; then
    all tokens behind SOT become part of each class's tail from here on.

    Args:
        tokens: what the layer before gave.
        step: what is removed and inserted.
        begin: tokens in front of all prompts, 1 for SOT or 0.
    """
    x, start, lengths = tokens
    end, device = begin + step.remove, str(x.device)
    shared = end <= start
    new = step.tokens
    if new is not None and not isinstance(new, Tensor):
        new = new(x[:, begin:end] if shared else x[:, _rows_behind(begin, lengths, start, step.remove, device)])
    count = 0 if new is None else new.shape[-2]
    if new is not None:
        new = new.to(x.dtype)
        new = expand(new if new.dim() > 2 else new[None], x.shape[0])
        new = new if new.dim() == 3 else new.expand(-1, len(lengths), -1, -1)
    if shared and (new is None or new.dim() == 3):
        parts = [x[:, :begin], x[:, end:]] if new is None else [x[:, :begin], new, x[:, end:]]
        return Packed(torch.cat(parts, dim=1), start + count - step.remove, lengths)
    per_class = new is not None and new.dim() == 4
    index = _unshared(begin, lengths, start, step.remove, count, per_class, device)
    pool = x if new is None else torch.cat([x, new.flatten(1, -2)], dim=1)
    longer = start - begin + count - step.remove
    return Packed(pool.index_select(1, index), begin, tuple(length + longer for length in lengths))


def take_padded_step(x: Tensor, step: PromptStep, begin: int) -> Tensor:
    """Remove and insert tokens behind SOT at full length (E, C, L, W)."""
    new, end = step.tokens, begin + step.remove
    if new is not None and not isinstance(new, Tensor):
        new = new(x[:, :, begin:end])
    kept = [x[:, :, :begin], x[:, :, end:]]
    if new is not None:
        new = new if new.dim() > 2 else new[None]
        new = new if new.dim() == 4 else new[:, None]
        kept.insert(1, new.to(x.dtype).expand(*x.shape[:2], -1, -1))
    return torch.cat(kept, dim=2)


@kept
def _rows_behind(begin: int, lengths: tuple[int, ...], start: int, count: int, device: str) -> Tensor:
    """Return the packed rows (C, count) of each class's tokens from position ``begin`` on."""
    shared = list(range(begin, start))[:count]
    firsts = (start + before for before in accumulate(lengths, initial=0))
    rows = [shared + list(range(first, first + count - len(shared))) for first, _ in zip(firsts, lengths, strict=False)]
    return torch.tensor(rows, device=device)


@kept
def _unshared(begin: int, lengths: tuple[int, ...], start: int, remove: int, count: int, per_class: bool, device: str) -> Tensor:
    """Return the rows that pick SOT and then, class after class, new tokens, old prefix and tail from [packed, new]."""
    rows, new, first = list(range(begin)), start + sum(lengths), start
    skip = max(remove - (start - begin), 0)
    for length in lengths:
        rows.extend(range(new, new + count))
        rows.extend(range(begin + remove, start))
        rows.extend(range(first + skip, first + length))
        first += length
        new += count if per_class else 0
    return torch.tensor(rows, device=device)


@dataclass(frozen=True)
class Layout:
    """Where the packed tail tokens of C classes stand; all tensors on the tower's device.

    Attributes:
        positions: (N,) position in the prompt of each tail token.
        places: (C * T,) row of the packed tail for each class and place; places behind EOT repeat row 0.
        packed: (N,) place in the flattened (C * T) grid of each packed row.
        ends: (C,) packed row of the token that is read, each class's last one.
        later: (T, T) or (C, T, T) bool, True where a query may not look.
        beyond: (C, 1, T) bool, where the token that is read may not look: behind itself.
    """

    positions: Tensor
    places: Tensor
    packed: Tensor
    ends: Tensor
    later: Tensor
    beyond: Tensor


@kept
def layout_of(lengths: tuple[int, ...], start: int, device: str, blind: tuple[bool, ...] = ()) -> Layout:
    """Return where tails stand behind a prefix.

    Args:
        lengths: tokens of each tail.
        start: tokens of the prefix.
        device: where.
        blind: for each class, whether its last token does not see itself; () where all do.
    """
    count = torch.tensor(lengths)
    place = torch.arange(int(count.max()))
    inside = place[None, :] < count[:, None]
    first = count.cumsum(0) - count
    padded = torch.where(inside, first[:, None] + place[None, :], 0)
    causal, reach = place[None, :] <= place[:, None], inside[:, None, :]
    if any(blind):
        itself = (place[None, :] == count[:, None] - 1) & torch.tensor(blind)[:, None]  # (C, T)
        causal = causal & ~(itself[:, :, None] & itself[:, None, :])
        reach = reach & ~itself[:, None, :]
    parts = (
        (start + place).expand_as(inside)[inside],
        padded.flatten(),
        inside.flatten().nonzero().flatten(),
        first + count - 1,
        ~causal,
        ~reach,
    )
    return Layout(*(part.to(device) for part in parts))


@kept
def packing(signature: tuple[tuple[str, int], ...], name_lengths: tuple[int, ...], device: str) -> tuple[Tensor, tuple[int, ...]]:
    """Return the rows (N,) that pick the tail, class after class, from the concatenated pieces, and the tail lengths."""
    rows: list[int] = []
    lengths = []
    starts = (0, *accumulate(name_lengths))
    tokens = starts[-1]
    for c, name_length in enumerate(name_lengths):
        offset, begin = 0, len(rows)
        for kind, m in signature:
            if kind == "names":
                rows.extend(range(offset + starts[c], offset + starts[c] + name_length))
                offset += tokens
            elif kind == "class":
                rows.extend(range(offset + c * m, offset + (c + 1) * m))
                offset += len(name_lengths) * m
            else:
                rows.extend(range(offset, offset + m))
                offset += m
        lengths.append(len(rows) - begin)
    return torch.tensor(rows, device=device), tuple(lengths)


def shared_block(
    block: ResidualAttentionBlock, x: Tensor, start: int, layout: Layout, own: LayerChanges | None = None, *, last: bool
) -> Tensor:
    """One transformer layer on packed tokens (E, P + N, W); the last layer gives EOT states (E, C, W) only."""
    heads, memory = block.attn.num_heads, recalled(block, own)
    x, normed = enter(block, x, own)
    # Prefix and tail are split, not sliced: the gradient of a split is put together in one go. The prefix is copied, since what
    # is kept of it for the backward pass would otherwise keep the tail's memory too.
    sizes = (start, x.shape[1] - start)
    if last:
        # Only EOT asks in the last layer, and nobody reads the other tokens' outputs.
        ends = start + layout.ends
        query, *pairs = project_some(block, normed.index_select(1, ends), normed, own)
        (k_front, k_tail), (v_front, v_tail) = (part.split(sizes, dim=1) for part in pairs)
        k_front, v_front = (split_heads(part.clone(), heads) for part in (k_front, v_front))
        k_tail, v_tail = (split_heads(part, heads).index_select(2, layout.places) for part in (k_tail, v_tail))
        mixed = _attend_tail(split_heads(query, heads), (k_front, v_front), (k_tail, v_tail), layout.beyond, memory)
        return finish(block, x.index_select(1, ends), join_heads(mixed), own)
    front, tail = project(block, normed, own).split(sizes, dim=1)
    q_front, k_front, v_front = split_thirds(front.clone(), heads).unbind()
    # (1 or 2, E, H, C * T, d): keys and values are laid out at once. Queries are not kept for the backward pass, since they are
    # scaled first, so they stand in memory of their own.
    asking, given = (part.index_select(3, layout.places) for part in split_thirds(tail, heads).contiguous().split((1, 2)))
    q_tail, (k_tail, v_tail) = asking[0], given.unbind()
    mixed = _attend_tail(q_tail, (k_front, v_front), (k_tail, v_tail), layout.later, memory)
    tail = join_heads(mixed.index_select(2, layout.packed))
    if memory is None:
        seen = F.scaled_dot_product_attention(q_front, k_front, v_front, is_causal=True)
    else:
        query = q_front * q_front.shape[-1] ** -0.5
        logits = query @ k_front.transpose(-1, -2)
        ahead = torch.ones(start, start, dtype=torch.bool, device=x.device).triu_(1)
        seen = recall(query, logits.masked_fill(ahead, float("-inf")), lambda weights: weights @ v_front, memory)
    return finish(block, x, torch.cat([join_heads(seen), tail], dim=1), own)


def _attend_tail(
    query: Tensor, shared: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor], hidden: Tensor, memory: Recalled | None
) -> Tensor:
    """Attention of tail tokens over the shared prefix, their own class's tail, and a memory.

    Args:
        query: (E, H, C * Q, d), already projected; Q is T, or 1 for EOT alone.
        shared: keys and values (E, H, P, d) of the prefix.
        own: keys and values (E, H, C * T, d) of the tail, padded.
        hidden: bool (Q, T) or (C, Q, T): which places of its own tail a query may not see.
        memory: keys and values that all of them see.

    Returns:
        (E, H, C * Q, d), not yet projected.
    """
    experts, heads, rows, size = query.shape
    queries, places = hidden.shape[-2:]
    k_shared, v_shared = (part.flatten(0, 1) for part in shared)
    k_own, v_own = (part.reshape(-1, places, size) for part in own)  # (E * H * C, T, d)
    q = query.reshape(experts * heads, rows, size) * size**-0.5
    to_shared = torch.bmm(q, k_shared.transpose(1, 2))  # (E * H, C * Q, P)
    to_own = torch.bmm(q.reshape(-1, queries, size), k_own.transpose(1, 2))  # (E * H * C, Q, T)
    if hidden.dim() == 3:
        to_own = to_own.view(-1, *hidden.shape).masked_fill(hidden, float("-inf"))
    else:
        to_own = to_own.masked_fill(hidden, float("-inf"))
    scores = torch.cat([to_shared, to_own.view(experts * heads, rows, places)], dim=-1)

    def read(weights: Tensor) -> Tensor:
        on_shared, on_own = weights.flatten(0, -3).split([to_shared.shape[-1], places], dim=-1)
        if queries == 1:
            on_own = on_own.contiguous()  # of a product of one row with a slice, PyTorch 2.14's compiler makes a wrong gradient
        mixed = torch.bmm(on_own.view(-1, queries, places), v_own).view(experts * heads, rows, size)
        return (torch.bmm(on_shared, v_shared) + mixed).view(experts, heads, rows, size)

    if memory is None:
        return read(scores.softmax(dim=-1).to(query.dtype))
    return recall(q.view(query.shape), scores.view(experts, heads, rows, -1), read, memory)


def expand(piece: Tensor, experts: int) -> Tensor:
    """Give a piece for all prompts (1, ...) the axis of E prompts."""
    return piece if piece.shape[0] == experts else piece.expand(experts, *piece.shape[1:])
