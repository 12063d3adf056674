"""Prompts as the text tower holds them: a prefix that all classes share, and a packed tail where they differ.

Tokens of E prompts over C classes are kept as (E, P + N, W): P shared ones, then class after class what is its own, up to EOT,
without padding. Every layer runs on those rows. For attention they lie in a grid (``PackedLayout``): the scores of a place are
those with the prefix and, behind them, those with its own block, and one softmax goes over both. Keys are copied for no class.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor
from torch.autograd.function import once_differentiable

from promptmix.clip.blocks import by_hand, enter, finish, join_heads, project, project_some, recalled, split_heads
from promptmix.clip.flex import attend, block_masks
from promptmix.clip.memory import Recalled, recall
from promptmix.clip.places import LayerChanges
from promptmix.clip.tokens import kept

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


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


@dataclass(frozen=True)
class PackedLayout:
    """Where the packed tokens of a prefix and the tails of C classes stand; all tensors on the tower's device.

    Attention looks at them as a grid of G places: blocks of T places, as many as the longest tail has, first for the prefix and
    then one for each class. So all places ask the prefix in one product, and each block itself in another.

    Attributes:
        start: P.
        masks: of FlexAttention, for all rows and for those that are read; None where it is not used.
        positions: (N,) position in the prompt of each tail token.
        places: (G,) packed row at each place; where nothing stands, row 0.
        packed: (P + N,) place of each packed row.
        hidden: (G, P + T) bool, where a place may not look: in the prefix, and in its own block.
        ends: (C,) packed row of the token that is read, each class's last one.
        tails: (C * T,) ``places`` of the classes' blocks.
        beyond: (C, P + T) bool, where the token that is read may not look: behind itself.
        filled: (N,) place of each tail token among ``tails``.
    """

    start: int
    masks: tuple[BlockMask, BlockMask] | None
    positions: Tensor
    places: Tensor
    packed: Tensor
    hidden: Tensor
    ends: Tensor
    tails: Tensor
    beyond: Tensor
    filled: Tensor


@kept
def packed_layout(
    lengths: tuple[int, ...], start: int, device: str, blind: tuple[bool, ...] = (), flex: bool = False
) -> PackedLayout:
    """Return where tails stand behind a prefix.

    Args:
        lengths: tokens of each tail.
        start: tokens of the prefix.
        device: where.
        blind: for each class, whether its last token does not see itself; () where all do.
        flex: whether FlexAttention is to be used (``MODEL.ATTENTION``).
    """
    count = torch.tensor(lengths)
    size = int(count.max())
    place, before = torch.arange(size), torch.arange(start)
    inside = place < count[:, None]  # (C, T)
    first = start + count.cumsum(0) - count
    tails = torch.where(inside, first[:, None] + place, 0).flatten()
    front = -(-start // size) * size  # places of the prefix's blocks
    causal, reach = place <= place[:, None], inside.clone()
    if any(blind):
        itself = (place == count[:, None] - 1) & torch.tensor(blind)[:, None]  # (C, T)
        causal = causal & ~(itself[:, :, None] & itself[:, None, :])
        reach &= ~itself
    own = causal.expand(len(lengths), size, size).reshape(-1, size)
    seen = torch.ones(front + len(own), start + size, dtype=torch.bool)
    seen[:start, :start] = before <= before[:, None]
    seen[:front, start:] = False
    seen[front:, start:] = own
    filled = inside.flatten().nonzero().flatten()
    parts = (
        (start + place).expand_as(inside)[inside],
        torch.cat([before, torch.zeros(front - start, dtype=torch.long), tails]),
        torch.cat([before, front + filled]),
        ~seen,
        first + count - 1,
        tails,
        torch.cat([torch.zeros(len(lengths), start, dtype=torch.bool), ~reach], dim=1),
        filled,
    )
    masks = block_masks(lengths, start, device, blind) if flex else None
    return PackedLayout(start, masks, *(part.to(device) for part in parts))


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
    block: ResidualAttentionBlock, x: Tensor, layout: PackedLayout, own: LayerChanges | None = None, *, last: bool
) -> Tensor:
    """One layer on packed tokens (E, P + N, W), or on their rows (E * (P + N), W); the last one gives EOT states (E, C, W)."""
    heads, memory, count = block.attn.num_heads, recalled(block, own), len(layout.packed)
    if not last:
        x, normed = enter(block, x, own)
        mixed = attend_packed(project(block, normed, own).flatten(0, -2), layout, heads, memory)
        return finish(block, x, mixed if x.dim() == 2 else mixed.view(x.shape), own)
    # Only EOT asks in the last layer, and nobody reads the other tokens' outputs.
    if own is None and by_hand(x) and layout.masks is None and not block.attn.in_proj_weight.requires_grad:
        # Taken first, so that its gradient, as large as x, is made last.
        entered = x.view(-1, count, x.shape[-1]).index_select(1, layout.ends)
        attn, normed = block.attn, block.ln_1(x.flatten(0, -2))
        mixed = _EndsAttention.apply(normed, attn.in_proj_weight, attn.in_proj_bias, layout, heads)
        return finish(block, entered, mixed)
    x, normed = enter(block, x if x.dim() == 3 else x.view(-1, count, x.shape[-1]), own)
    query, *pairs = project_some(block, normed.index_select(1, layout.ends), normed, own)
    mixed = attend_ends(query, (pairs[0], pairs[1]), layout, heads, memory)
    return finish(block, x.index_select(1, layout.ends), mixed, own)


class _Seen(NamedTuple):
    """Keys or values of A = E * H prompts and heads.

    Attributes:
        shared: (A, P, d), of the prefix.
        own: (A * B, T, d), of blocks.
    """

    shared: Tensor
    own: Tensor


def attend_packed(qkv: Tensor, layout: PackedLayout, heads: int, memory: Recalled | None = None) -> Tensor:
    """Attention of all tokens.

    Args:
        qkv: (E * (P + N), 3W), queries, keys and values of packed rows.
        layout: where they stand.
        heads: H.
        memory: keys and values that all tokens see.

    Returns:
        (E * (P + N), W), heads joined.
    """
    if layout.masks is not None and memory is None:
        parts = qkv.view(-1, len(layout.packed), 3, heads, qkv.shape[-1] // (3 * heads)).permute(2, 0, 3, 1, 4)
        return join_heads(attend(parts[0], parts[1], parts[2], layout.masks[0])).flatten(0, -2)
    if memory is None and by_hand(qkv):
        out: Tensor = _Attention.apply(qkv, layout, heads)
        return out
    parts = _in_grid(qkv, layout, heads)
    query, keys, values = _seen(parts, layout)
    query = query * query.shape[-1] ** -0.5
    return _from_grid(_mix(query, keys, values, layout.hidden, heads, memory), layout, heads)


def attend_ends(query: Tensor, pairs: tuple[Tensor, Tensor], layout: PackedLayout, heads: int, memory: Recalled | None) -> Tensor:
    """Attention of the tokens (E, C, W) that are read, over keys and values (E, P + N, W) of packed rows: (E, C, W)."""
    if layout.masks is not None and memory is None:
        asking, key, value = (split_heads(part, heads) for part in (query, *pairs))
        return join_heads(attend(asking, key, value, layout.masks[1]))
    size, width = query.shape[-1] // heads, layout.beyond.shape[1] - layout.start
    seen = []
    for part in pairs:
        # The prefix is copied, since what is kept of it for the backward pass would otherwise keep the tails' memory too.
        shared = split_heads(part[:, : layout.start].clone(), heads).flatten(0, 1)
        seen.append(_Seen(shared, split_heads(part, heads).index_select(2, layout.tails).view(-1, width, size)))
    query = split_heads(query, heads).flatten(0, 1) * size**-0.5
    mixed = _mix(query, seen[0], seen[1], layout.beyond, heads, memory)
    return join_heads(mixed.unflatten(0, (-1, heads)))


def _in_grid(qkv: Tensor, layout: PackedLayout, heads: int) -> Tensor:
    """Rows (E * (P + N), 3W) to queries, keys and values (3, E * H, G, d), laid out at once."""
    size = qkv.shape[-1] // (3 * heads)
    packed = qkv.view(-1, len(layout.packed), 3, heads, size).permute(2, 0, 3, 1, 4)
    return packed.index_select(3, layout.places).view(3, -1, len(layout.places), size)


def _from_grid(mixed: Tensor, layout: PackedLayout, heads: int) -> Tensor:
    """(E * H, G, d) to rows (E * (P + N), W)."""
    _, places, size = mixed.shape
    return mixed.view(-1, heads, places, size).transpose(1, 2).index_select(1, layout.packed).view(-1, heads * size)


def _seen(parts: Tensor, layout: PackedLayout) -> tuple[Tensor, _Seen, _Seen]:
    query, key, value = parts.unbind()
    width, size = layout.hidden.shape[1] - layout.start, query.shape[-1]
    keys, values = (_Seen(part[:, : layout.start], part.view(-1, width, size)) for part in (key, value))
    return query, keys, values


def _mix(query: Tensor, keys: _Seen, values: _Seen, hidden: Tensor, heads: int, memory: Recalled | None) -> Tensor:
    """Attention of scaled queries (A, n, d), of which n / B ask each block; ``hidden`` is (n, P + T)."""
    scores = _scores(query, keys, hidden)
    if memory is None:
        return _read(_parts(scores.softmax(dim=-1).to(query.dtype), values), values)

    def read(weights: Tensor) -> Tensor:
        return _read(_parts(weights.flatten(0, 1), values), values).unflatten(0, (-1, heads))

    asking, scores = (part.unflatten(0, (-1, heads)) for part in (query, scores))
    return recall(asking, scores, read, memory).flatten(0, 1)


def _scores(query: Tensor, keys: _Seen, hidden: Tensor) -> Tensor:
    """(A, n, P + T)."""
    with_shared = torch.bmm(query, keys.shared.transpose(1, 2))
    with_own = torch.bmm(query.reshape(len(keys.own), -1, query.shape[-1]), keys.own.transpose(1, 2))
    scores = torch.cat([with_shared, with_own.view(*query.shape[:2], -1)], dim=-1)
    return scores.masked_fill_(hidden, float("-inf"))


def _parts(weights: Tensor, values: _Seen) -> _Seen:
    """Split (A, n, P + T) into those of the prefix (A, n, P) and of blocks (A * B, n / B, T)."""
    blocks, width, _ = values.own.shape
    shared, own = weights.split([weights.shape[-1] - width, width], dim=-1)
    if blocks == weights.shape[0] * weights.shape[1]:
        own = own.contiguous()  # of a product of one row with a slice, PyTorch 2.14's compiler makes a wrong gradient
    return _Seen(shared, own.view(blocks, -1, width))


def _read(weights: _Seen, values: _Seen) -> Tensor:
    """Values that the weights choose (A, n, d)."""
    mixed = torch.bmm(weights.own, values.own).view(*weights.shared.shape[:2], -1)
    return torch.baddbmm(mixed, weights.shared, values.shared)


class _Attention(torch.autograd.Function):
    """``attend_packed`` with its gradient by hand, in half the operators that PyTorch's graph needs for its views."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, layout: PackedLayout, heads: int) -> Tensor:
        """See ``attend_packed``."""
        query, keys, values = _seen(_in_grid(qkv, layout, heads), layout)
        query.mul_(query.shape[-1] ** -0.5)
        whole = _scores(query, keys, layout.hidden).softmax(dim=-1)
        weights = _parts(whole, values)
        ctx.save_for_backward(query, *keys, *values, whole, *weights)
        ctx.layout, ctx.heads = layout, heads
        return _from_grid(_read(weights, values), layout, heads)

    @staticmethod
    @once_differentiable  # PyTorch's fused attention has no second derivative either
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Gradient of ``qkv``."""
        query, k_shared, k_own, v_shared, v_own, whole, *on = ctx.saved_tensors
        layout, heads, shape, blocks, prefix = ctx.layout, ctx.heads, query.shape, v_own.shape, ctx.layout.start
        places, size = shape[1:]
        rows = grads[0].view(-1, len(layout.packed), heads, size).transpose(1, 2)
        grid = rows.new_zeros(len(rows), heads, places, size).index_copy_(2, layout.packed, rows)
        grad, grad_own = grid.view(shape), grid.view(blocks)
        value = torch.bmm(on[1].transpose(1, 2), grad_own).view(shape)
        value[:, :prefix].baddbmm_(on[0].transpose(1, 2), grad)
        asked, to = _asked(grad, grad_own, _Seen(k_shared, k_own), _Seen(v_shared, v_own), whole)
        key = torch.bmm(to.own.transpose(1, 2), query.view(blocks)).view(shape)
        key[:, :prefix].baddbmm_(to.shared.transpose(1, 2), query)
        parts = torch.stack([asked, key, value]).view(3, -1, heads, places, size)
        return parts.permute(1, 3, 0, 2, 4).index_select(1, layout.packed).view(-1, 3 * heads * size), None, None


class _EndsAttention(torch.autograd.Function):
    """``attend_ends`` of normed rows through frozen projections, with its gradient by hand."""

    @staticmethod
    def forward(ctx: Any, normed: Tensor, weight: Tensor, bias: Tensor, layout: PackedLayout, heads: int) -> Tensor:
        """Rows (E * (P + N), W) to those that are read (E * C, W), heads joined."""
        count, width, start, classes = len(layout.packed), normed.shape[-1], layout.start, len(layout.ends)
        size, weights, biases = width // heads, weight.split([width, 2 * width]), bias.split([width, 2 * width])
        pairs = F.linear(normed, weights[1], biases[1]).view(-1, count, 2, heads, size).permute(2, 0, 3, 1, 4)
        shared = pairs[:, :, :, :start].contiguous().view(2, -1, start, size)  # a copy, so that ``pairs`` can go
        own = pairs.index_select(3, layout.tails).view(2, -1, layout.beyond.shape[1] - start, size)
        keys, values = (_Seen(*part) for part in zip(shared, own, strict=True))
        asking = normed.view(-1, count, width).index_select(1, layout.ends)
        query = F.linear(asking.view(-1, width), weights[0], biases[0])
        query = _by_heads(query, classes, heads) * size**-0.5
        whole = _scores(query, keys, layout.beyond).softmax(dim=-1)
        weighted = _parts(whole, values)
        ctx.save_for_backward(query, *keys, *values, whole, *weighted, weight)
        ctx.layout, ctx.heads = layout, heads
        return _as_rows(_read(weighted, values), heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of the rows; values before keys, so that not both are held."""
        query, k_shared, k_own, v_shared, v_own, whole, on_shared, on_own, weight = ctx.saved_tensors
        layout, heads, width = ctx.layout, ctx.heads, weight.shape[1]
        for_query, for_key, for_value = weight.split(width)

        def rows(shared: Tensor, own: Tensor) -> Tensor:
            places = own.view(-1, heads, len(layout.tails), own.shape[-1]).transpose(1, 2).index_select(1, layout.filled)
            del own  # what is in memory here is the most of a step
            shared = shared.view(-1, heads, layout.start, places.shape[-1]).transpose(1, 2)
            return torch.cat([shared, places], dim=1).view(-1, width)

        grad = _by_heads(grads[0], len(layout.ends), heads)
        grad_own = grad.view(len(v_own), 1, -1)
        out = rows(torch.bmm(on_shared.transpose(1, 2), grad), torch.bmm(on_own.transpose(1, 2), grad_own)) @ for_value
        asked, to = _asked(grad, grad_own, _Seen(k_shared, k_own), _Seen(v_shared, v_own), whole)
        own = query.view(grad_own.shape)
        out.addmm_(rows(torch.bmm(to.shared.transpose(1, 2), query), torch.bmm(to.own.transpose(1, 2), own)), for_key)
        asked = (_as_rows(asked, heads) @ for_query).view(-1, len(layout.ends), width)
        out.view(-1, len(layout.packed), width).index_add_(1, layout.ends, asked)
        return out, None, None, None, None


def _by_heads(rows: Tensor, count: int, heads: int) -> Tensor:
    """(E * n, W) to (E * H, n, d)."""
    split = rows.view(-1, count, heads, rows.shape[-1] // heads).transpose(1, 2)
    return split.contiguous().view(-1, *split.shape[2:])


def _as_rows(mixed: Tensor, heads: int) -> Tensor:
    """(E * H, n, d) to (E * n, W)."""
    return mixed.view(-1, heads, *mixed.shape[1:]).transpose(1, 2).reshape(-1, heads * mixed.shape[-1])


def _asked(grad: Tensor, grad_own: Tensor, keys: _Seen, values: _Seen, whole: Tensor) -> tuple[Tensor, _Seen]:
    """Go back from the gradient of what was read (A, n, d), by blocks (A * B, n / B, d), to those of queries and of scores."""
    with_shared = torch.bmm(grad, values.shared.transpose(1, 2))
    with_own = torch.bmm(grad_own, values.own.transpose(1, 2)).view(*grad.shape[:2], -1)
    scores = torch._softmax_backward_data(torch.cat([with_shared, with_own], dim=-1), whole, -1, whole.dtype)
    to, scale = _parts(scores, values), grad.shape[-1] ** -0.5
    asked = torch.bmm(to.own, keys.own).view(grad.shape)
    return torch.baddbmm(asked, to.shared, keys.shared, beta=scale, alpha=scale), to


def expand(piece: Tensor, experts: int) -> Tensor:
    """Give a piece for all prompts (1, ...) the axis of E prompts."""
    return piece if piece.shape[0] == experts else piece.expand(experts, *piece.shape[1:])
