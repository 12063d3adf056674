"""CLIP's text tower, computed once for what the classes share.

The tower is causal and its feature is read at EOT. Hence, exactly: tokens after EOT don't matter, and the tokens in front of the
class name have the same keys and values for every class. A set of prompts is therefore kept as one shared *prefix* (SOT and
what stands before the class name) and a packed *tail* (class name to EOT, no padding), and every linear layer runs on
``P + N`` tokens per prompt instead of ``C * 77``. Deep prompts replace prefix positions, so they keep the sharing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import cast

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock, Transformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from promptmix.clip.blocks import finish, is_standard, join_heads, project_some, split_heads
from promptmix.clip.tokens import ClassTokens, Tokenizer
from promptmix.errors import ConfigError

#: Tokens per CPU thread whose states between two layers of a ViT-B/16 stay in the caches; more at once are slower, not faster.
_TOKENS_PER_THREAD = 1024

#: Deep prompts: {layer: (E, n, W)}; before that layer they replace the n positions behind SOT. Layer 0 is the input itself.
DeepPrompts = Mapping[int, Tensor]


@dataclass(frozen=True)
class Prompts:
    """Token embeddings (without positions) of E prompts over C classes, cut where the classes begin to differ.

    Attributes:
        prefix: (E, P, W), from SOT to the last token that all classes share.
        tail: (E, N, W), the other tokens up to EOT, class after class without padding; N = sum of ``lengths``.
        lengths: tail tokens of each of the C classes.
    """

    prefix: Tensor
    tail: Tensor
    lengths: tuple[int, ...]


class TextTower(nn.Module):
    """The frozen text tower of an open_clip model, taking prompts as embeddings.

    Args:
        model: an ``open_clip`` CLIP model, or one whose text tower is ``model.text``.
        tokenizer: the tokenizer that the tower was trained with.

    Raises:
        ConfigError: the tower is not a CLIP text transformer (for instance a Hugging Face encoder).
    """

    token_embedding: nn.Embedding
    positional_embedding: Tensor  # (L, W)
    transformer: Transformer
    ln_final: nn.LayerNorm
    text_projection: Tensor | nn.Linear | None  # (W, D)
    attn_mask: Tensor | None  # (L, L); None where every token sees all others

    def __init__(self, model: open_clip.CLIP | open_clip.CustomTextCLIP, tokenizer: Tokenizer) -> None:
        super().__init__()
        source = getattr(model, "text", model)
        if not hasattr(source, "token_embedding") or getattr(source, "cls_emb", None) is not None:
            raise ConfigError(
                f"MODEL.BACKBONE.NAME: the text tower {type(source).__name__} is not a CLIP text transformer read at EOT; "
                "choose a model with CLIP's own text tower, such as ViT-B-16"
            )
        self.tokenizer = tokenizer
        self.token_embedding = source.token_embedding
        self.positional_embedding = source.positional_embedding
        self.transformer = source.transformer
        self.ln_final = source.ln_final
        self.text_projection = source.text_projection
        self.register_buffer("attn_mask", source.attn_mask, persistent=False)
        pool = getattr(source, "pool_type", getattr(source, "text_pool_type", "argmax"))
        if pool not in ("argmax", "eos"):
            raise ConfigError(f"MODEL.BACKBONE.NAME: the text feature is read by {pool!r}, but prompts need a tower read at EOT")
        #: Classes encoded at a time; what lies between is computed again for the backward pass. 0 = all at once.
        self.class_chunk = 0
        #: Whether prompts take the way of this module; otherwise they go at full length through open_clip's own layers.
        self.shares_prefix = self.attn_mask is not None
        self._layer = _shared_block

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer's layers, first to last."""
        return self.transformer.resblocks

    @property
    def width(self) -> int:
        """Token width W."""
        return self.token_embedding.weight.shape[1]

    @property
    def context_length(self) -> int:
        """Longest prompt in tokens, SOT and EOT included."""
        return self.positional_embedding.shape[0]

    def embed(self, ids: Sequence[int]) -> Tensor:
        """Return the token embeddings (len(ids), W) of ``ids``."""
        weight = self.token_embedding.weight
        return weight[torch.tensor(ids, dtype=torch.long, device=weight.device)]

    def compose(self, *pieces: Tensor | ClassTokens) -> Prompts:
        """Put E prompts over C classes together, adding SOT and EOT.

        Args:
            pieces: in reading order: contexts shared by all classes (E, m, W), class-specific contexts (E, C, m, W), and the
                class names. E is that of the tensors; a piece with E = 1 serves all prompts.

        Raises:
            ConfigError: the longest prompt does not fit the tower's context length.
        """
        names = next(piece for piece in pieces if isinstance(piece, ClassTokens))
        experts = max((piece.shape[0] for piece in pieces if isinstance(piece, Tensor)), default=1)
        edges = self.embed([self.tokenizer.sot, self.tokenizer.eot])
        everything: list[Tensor | ClassTokens] = [edges[None, :1], *pieces, edges[None, 1:]]
        shared = next(i for i, piece in enumerate(everything) if isinstance(piece, ClassTokens) or piece.dim() == 4)
        front = cast("list[Tensor]", everything[:shared])  # class names come later
        prefix = torch.cat([_expand(piece, experts) for piece in front], dim=1)
        sources, signature = [], []
        for piece in everything[shared:]:
            if isinstance(piece, ClassTokens):
                rows, kind = self.embed(piece.flat)[None], "names"
            else:
                rows, kind = piece.flatten(1, -2), ("shared" if piece.dim() == 3 else "class")
            sources.append(_expand(rows, experts))
            signature.append((kind, piece.shape[-2] if isinstance(piece, Tensor) else 0))
        index, lengths = _packing(tuple(signature), names.lengths, str(prefix.device))
        tail = torch.cat(sources, dim=1).index_select(1, index)
        longest = prefix.shape[1] + max(lengths)
        if longest > self.context_length:
            raise ConfigError(
                f"the longest prompt has {longest} tokens, but this backbone reads {self.context_length}; "
                f"shorten the context or the class name {names.names[lengths.index(max(lengths))]!r}"
            )
        return Prompts(prefix, tail, lengths)

    def compose_text(self, template: str, names: Sequence[str]) -> Prompts:
        """Put the hard prompts ``template.format(name)`` of all ``names`` together (E = 1), sharing their common first tokens."""
        ids = [self.tokenizer.encode(template.format(name.replace("_", " "))) for name in names]
        shared = _common_prefix(ids)
        rest = ClassTokens(tuple(names), tuple(tuple(row[shared:]) for row in ids))
        return self.compose(self.embed(ids[0][:shared])[None], rest)

    def forward(self, prompts: Prompts, deep: DeepPrompts | None = None) -> Tensor:
        """Encode prompts.

        Args:
            prompts: E prompts over C classes.
            deep: prompts for deeper layers, ``{layer: (E or 1, n, W)}``.

        Returns:
            Text features (E, C, D), not normalised.

        Raises:
            ConfigError: deep prompts are longer than the shared prefix, or the tower can't take them.
        """
        if deep:
            widest = max(prompt.shape[-2] for prompt in deep.values())
            if widest >= prompts.prefix.shape[1]:
                raise ConfigError(
                    f"deep text prompts replace {widest} positions behind SOT, but only {prompts.prefix.shape[1] - 1} context "
                    "tokens stand before the class name; use as many context tokens in front of the class name"
                )
        if not self.shares_prefix or not all(map(is_standard, self.blocks)):  # adapters may come at any time
            from promptmix.clip.reference import encode_plain

            return encode_plain(self, prompts, deep)
        deep = deep or {}
        if not torch.is_grad_enabled() and prompts.prefix.device.type == "cpu":
            return self._encode_portions(prompts, deep)
        return self._encode_chunks(prompts, deep, self.class_chunk)

    def _encode_portions(self, prompts: Prompts, deep: DeepPrompts) -> Tensor:
        """Encode without a graph, some experts and some classes at a time, so that what lies between stays in a CPU's caches."""
        each, limit = prompts.prefix.shape[1] + prompts.tail.shape[1], _TOKENS_PER_THREAD * torch.get_num_threads()
        experts, chunk = max(limit // each, 1), max(len(prompts.lengths) * limit // each, 1)
        chunk = min(chunk, self.class_chunk or chunk)
        features = []
        for i, (prefix, tail) in enumerate(zip(prompts.prefix.split(experts), prompts.tail.split(experts), strict=True)):
            own = {layer: new.split(experts)[i] if len(new) > 1 else new for layer, new in deep.items()}
            features.append(self._encode_chunks(Prompts(prefix, tail, prompts.lengths), own, chunk))
        return torch.cat(features)

    def _encode_chunks(self, prompts: Prompts, deep: DeepPrompts, chunk: int) -> Tensor:
        """Encode ``chunk`` classes at a time, 0 for all at once; with a graph, what lies between is computed again for it."""
        if not 0 < chunk < len(prompts.lengths):
            return self._encode_shared(prompts, deep)
        features = []
        sizes = [prompts.lengths[i : i + chunk] for i in range(0, len(prompts.lengths), chunk)]
        for tail, lengths in zip(prompts.tail.split([sum(size) for size in sizes], dim=1), sizes, strict=True):
            some = Prompts(prompts.prefix, tail, lengths)
            if torch.is_grad_enabled():
                features.append(checkpoint(self._encode_shared, some, deep, use_reentrant=False, preserve_rng_state=False))
            else:
                features.append(self._encode_shared(some, deep))
        return torch.cat(features, dim=1)

    def _encode_shared(self, prompts: Prompts, deep: DeepPrompts) -> Tensor:
        start = prompts.prefix.shape[1]
        layout = _layout(prompts.lengths, start, str(prompts.prefix.device))
        position = self.positional_embedding
        x = torch.cat([prompts.prefix + position[:start], prompts.tail + position[layout.positions]], dim=1)
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            if i in deep and i > 0:
                new = _expand(deep[i], x.shape[0])
                x = torch.cat([x[:, :1], new.to(x.dtype), x[:, 1 + new.shape[1] :]], dim=1)
            x = self._layer(block, x, start, layout, last=i == last)
        return self.project(self.ln_final(x))

    def compile_layers(self) -> None:
        """Run the layers through ``torch.compile`` from now on."""
        self._layer = torch.compile(_shared_block)

    def project(self, x: Tensor) -> Tensor:
        """Map EOT states (..., W) into the joint space (..., D)."""
        if isinstance(self.text_projection, nn.Linear):
            return self.text_projection(x)
        return x if self.text_projection is None else x @ self.text_projection


@dataclass(frozen=True)
class _Layout:
    """Where the packed tail tokens of C classes stand; all tensors on the tower's device.

    Attributes:
        positions: (N,) position in the prompt of each tail token.
        padded: (C, T) row of the packed tail for each class and place; places behind EOT repeat row 0.
        packed: (N,) place in the flattened (C * T) grid of each packed row.
        ends: (C,) packed row of each class's EOT.
        causal: (T, T) bool, True where a query may look.
        reach: (C, 1, T) bool, True up to the class's EOT.
    """

    positions: Tensor
    padded: Tensor
    packed: Tensor
    ends: Tensor
    causal: Tensor
    reach: Tensor


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # kept for steps that learn
def _layout(lengths: tuple[int, ...], start: int, device: str) -> _Layout:
    count = torch.tensor(lengths)
    place = torch.arange(int(count.max()))
    inside = place[None, :] < count[:, None]
    first = count.cumsum(0) - count
    padded = torch.where(inside, first[:, None] + place[None, :], 0)
    causal = place[None, :] <= place[:, None]
    parts = (
        (start + place).expand_as(inside)[inside],
        padded,
        inside.flatten().nonzero().flatten(),
        first + count - 1,
        causal,
        inside[:, None, :],
    )
    return _Layout(*(part.to(device) for part in parts))


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # kept for steps that learn
def _packing(
    signature: tuple[tuple[str, int], ...], name_lengths: tuple[int, ...], device: str
) -> tuple[Tensor, tuple[int, ...]]:
    """Return the rows (N,) that pick the tail, class after class, from the concatenated pieces, and the tail lengths."""
    rows: list[int] = []
    lengths = []
    starts = (0, *accumulate(name_lengths))
    for c, name_length in enumerate(name_lengths):
        offset, begin = 0, len(rows)
        for kind, m in signature:
            if kind == "names":
                rows.extend(range(offset + starts[c], offset + starts[c] + name_length))
                offset += sum(name_lengths)
            elif kind == "class":
                rows.extend(range(offset + c * m, offset + (c + 1) * m))
                offset += len(name_lengths) * m
            else:
                rows.extend(range(offset, offset + m))
                offset += m
        lengths.append(len(rows) - begin)
    return torch.tensor(rows, device=device), tuple(lengths)


def _shared_block(block: ResidualAttentionBlock, x: Tensor, start: int, layout: _Layout, *, last: bool) -> Tensor:
    """One transformer layer on packed tokens (E, P + N, W); the last layer gives EOT states (E, C, W) only."""
    heads = block.attn.num_heads
    normed = block.ln_1(x)
    # Prefix and tail are split, not sliced: the gradient of a split is put together in one go. The prefix is copied, since what
    # is kept of it for the backward pass would otherwise keep the tail's memory too.
    sizes = (start, x.shape[1] - start)
    if last:
        # Only EOT asks in the last layer, and nobody reads the other tokens' outputs.
        ends = start + layout.ends
        query, *pairs = project_some(block, normed[:, ends], normed)
        (k_front, k_tail), (v_front, v_tail) = (part.split(sizes, dim=1) for part in pairs)
        k_front, v_front = k_front.clone(), v_front.clone()
        mixed = _attend_tail(query.unsqueeze(2), (k_front, v_front), (k_tail, v_tail), layout, layout.reach, heads)
        return finish(block, x[:, ends], mixed.squeeze(2))
    front, tail = F.linear(normed, block.attn.in_proj_weight, block.attn.in_proj_bias).split(sizes, dim=1)
    q_front, k_front, v_front = front.clone().chunk(3, dim=-1)
    q_tail, k_tail, v_tail = tail.chunk(3, dim=-1)
    grid = q_tail[:, layout.padded]  # (E, C, T, W)
    tail = _attend_tail(grid, (k_front, v_front), (k_tail, v_tail), layout, layout.causal, heads).flatten(1, 2)
    query, key, value = (split_heads(part, heads) for part in (q_front, k_front, v_front))
    front = join_heads(F.scaled_dot_product_attention(query, key, value, is_causal=True))
    return finish(block, x, torch.cat([front, tail[:, layout.packed]], dim=1))


def _attend_tail(
    query: Tensor, shared: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor], layout: _Layout, allowed: Tensor, heads: int
) -> Tensor:
    """Attention of tail tokens over the shared prefix and their own class's tail.

    Args:
        query: (E, C, Q, W), already projected; Q is T, or 1 for EOT alone.
        shared: keys and values (E, P, W) of the prefix.
        own: keys and values (E, N, W) of the tail, packed.
        layout: where the tail's tokens stand.
        allowed: bool, broadcast to (C, Q, T): which places of its own tail a query may see.
        heads: number of heads H.

    Returns:
        (E, C, Q, W), heads joined, not yet projected.
    """
    experts, classes, queries, width = query.shape
    size = width // heads
    k_shared, v_shared = (split_heads(part, heads) for part in shared)  # (E, H, P, d)
    k_own, v_own = (
        part[:, layout.padded].view(experts, classes, -1, heads, size).permute(0, 3, 1, 2, 4) for part in own
    )  # (E, H, C, T, d)
    q = query.view(experts, classes, queries, heads, size).permute(0, 3, 1, 2, 4).contiguous() * size**-0.5  # (E, H, C, Q, d)
    flat = q.view(experts, heads, classes * queries, size)
    to_shared = (flat @ k_shared.transpose(-1, -2)).view(experts, heads, classes, queries, -1)
    to_own = (q @ k_own.transpose(-1, -2)).masked_fill(~allowed, float("-inf"))
    weights = torch.cat([to_shared, to_own], dim=-1).softmax(dim=-1).to(query.dtype)
    on_shared, on_own = weights.split([to_shared.shape[-1], to_own.shape[-1]], dim=-1)
    front = on_shared.reshape(experts, heads, classes * queries, -1) @ v_shared
    mixed = front.view(experts, heads, classes, queries, size) + on_own @ v_own
    return mixed.permute(0, 2, 3, 1, 4).reshape(experts, classes, queries, width)


def _expand(piece: Tensor, experts: int) -> Tensor:
    return piece if piece.shape[0] == experts else piece.expand(experts, *piece.shape[1:])


def _common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """Return how many first tokens all rows share, leaving each row at least one of its own."""
    shortest = min(len(row) for row in rows) - 1
    return next((i for i in range(shortest) if any(row[i] != rows[0][i] for row in rows)), max(shortest, 0))
