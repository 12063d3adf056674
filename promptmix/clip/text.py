"""CLIP's text tower, computed once for what the classes share.

The tower is causal and its feature is read at EOT. Hence, exactly: tokens after EOT don't matter, and the tokens in front of the
class name have the same keys and values for every class. A set of prompts is therefore kept as one shared *prefix* (SOT and
what stands before the class name) and a packed *tail* (class name to EOT, no padding), and every linear layer runs on
``P + N`` tokens per prompt instead of ``C * 77``. Deep prompts replace prefix positions, so they keep the sharing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import cast

import open_clip
import torch
from open_clip.transformer import Transformer
from torch import Tensor, nn

from promptmix.clip.blocks import fits_caches, is_standard, layer
from promptmix.clip.compose import (
    DeepPrompts,
    Packed,
    PromptReader,
    check_room,
    cut,
    portion_of,
    steps_of,
    take_padded_step,
    take_step,
)
from promptmix.clip.packed import Prompts, packed_layout, shared_block
from promptmix.clip.places import Changes, LayerAction, Weights, merged, run_changed
from promptmix.clip.tokens import Tokenizer
from promptmix.errors import ConfigError

#: Tokens per CPU thread whose states between two layers of a ViT-B/16 stay in the caches; more at once are slower, not faster.
_TOKENS_PER_THREAD = 1024

#: Where prompts are padded: parts of classes of similar length, and the least classes of one, since small ones cost more.
_PARTS, _PART = 4, 16

#: open_clip's names for the token that is read.
_READ_AT = {"argmax": "eot", "eos": "eot", "last": "last", "first": "first"}


class TextTower(PromptReader):
    """The frozen text tower of an open_clip model, taking prompts as embeddings.

    Args:
        model: an ``open_clip`` CLIP model, or one whose text tower is ``model.text``.
        tokenizer: the tokenizer that the tower was trained with.

    Raises:
        ConfigError: the tower is not a text transformer of open_clip's, or is read in a way that prompts don't know.
    """

    token_embedding: nn.Embedding
    positional_embedding: Tensor  # (L, W)
    transformer: Transformer
    ln_final: nn.LayerNorm
    text_projection: Tensor | nn.Linear | None  # (W, D)
    attn_mask: Tensor | None  # (L, L); None where every token sees all others
    cls_emb: Tensor | None  # (W,), a token behind the padding that is read (CoCa)

    def __init__(self, model: open_clip.CLIP | open_clip.CustomTextCLIP, tokenizer: Tokenizer) -> None:
        source = getattr(model, "text", model)
        pool = getattr(source, "pool_type", getattr(source, "text_pool_type", "argmax"))
        if not hasattr(source, "token_embedding") or pool not in _READ_AT:
            raise ConfigError(
                f"MODEL.BACKBONE.NAME: the text tower {type(source).__name__} is not one of open_clip's transformers, or is read "
                f"by {pool!r}; choose a model with CLIP's own text tower, such as ViT-B-16"
            )
        super().__init__(tokenizer, source.token_embedding, source.context_length)
        self.positional_embedding = source.positional_embedding
        self.transformer = source.transformer
        self.ln_final = source.ln_final
        self.text_projection = source.text_projection
        self.register_buffer("attn_mask", source.attn_mask, persistent=False)
        self.cls_emb = getattr(source, "cls_emb", None)
        self._own_cls = bool(getattr(source, "correct_cls_mask", False))
        #: Which token is read: EOT, the last position whatever stands there, the first one, or one of its own behind the text.
        self.reads = "class" if self.cls_emb is not None else _READ_AT[pool]
        self._masks_padding = bool(getattr(source, "use_pad_mask", False))
        #: Whether prompts take the way of this module; otherwise they go at full length through open_clip's own layers.
        self.shares_prefix = self._can_share
        #: Whether packed prompts attend through FlexAttention; see ``flex.choose_attention``.
        self.flex = False
        self._layer = shared_block

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer's layers, first to last."""
        return self.transformer.resblocks

    @property
    def embed_dim(self) -> int:
        """Width D of the joint space."""
        projection = self.text_projection
        if isinstance(projection, nn.Linear):
            return projection.out_features
        return self.width if projection is None else projection.shape[1]

    @property
    def _can_share(self) -> bool:
        return self.attn_mask is not None and self.reads in ("eot", "class")

    def first_norm(self, layer: int) -> nn.Module:
        """Return the norm in front of the attention of ``layer``, counted from 0."""
        norm: nn.Module = self.blocks[layer].ln_1  # type: ignore[assignment]
        return norm

    @property
    def sees_padding(self) -> bool:
        """Whether what stands behind a prompt changes its feature, so that it must be computed."""
        return self.reads == "last" or self.attn_mask is None and not self._masks_padding

    @property
    def way(self) -> str:
        """How prompts go through: "prefix shared", "trimmed" to the longest of them, or at "full length"."""
        if self.shares_prefix and all(map(is_standard, self.blocks)):
            return "prefix shared"
        return "full length" if self.sees_padding or self.attn_mask is not None else "trimmed"

    def forward(
        self,
        prompts: Prompts,
        deep: DeepPrompts | None = None,
        *,
        weights: Weights | None = None,
        actions: Mapping[int, LayerAction] | None = None,
    ) -> Tensor:
        """Encode prompts.

        The prefix-shared way serves deep prompts, weights and actions that change each token on its own. It is left, for
        layers at full length, where an action looks across tokens, and where the tower has no causal mask or layers that are
        not CLIP's; padding that can't reach EOT through the actions (``LayerAction.ahead``) is left out there. A branch that
        draws random numbers draws them once for what classes share (and, under ``class_chunk``, once for each chunk).

        Args:
            prompts: E prompts over C classes.
            deep: prompts for deeper layers.
            weights: deltas by their names in this tower's state dict (``transformer.resblocks.0.attn.q_proj.weight``).
            actions: functions at the joints of layers.

        Returns:
            Text features (E, C, D), not normalised.

        Raises:
            ConfigError: deep prompts are longer than what stands before the class name, a name or a layer is unknown, or the
                tower can't take them.
        """
        changes = Changes(steps_of(deep), weights or {}, actions or {})
        if changes:
            changes.check(self, len(self.blocks), "text")
            check_room(prompts, changes.steps, self.start)
        return self.encode_parts(prompts, changes, self._encode)

    def _encode(self, prompts: Prompts, changes: Changes) -> Tensor:
        standard = all(map(is_standard, self.blocks))  # adapters may come at any time
        if standard and changes.is_shared and self._can_share and not self.shares_prefix:
            return self._encode_full(prompts, changes)  # the plain way was asked for
        if self._room(changes) is not None and not changes.steps:
            return self._encode_by_length(prompts, changes)
        if not (self.shares_prefix and standard and changes.is_shared):
            return self.encode_chunks(prompts, changes, self.class_chunk, self._encode_full)
        if fits_caches(prompts.prefix) and not changes.has_functions:
            return self._encode_portions(prompts, changes)
        return self.encode_chunks(prompts, changes, self.class_chunk, self._encode_shared)

    def _encode_portions(self, prompts: Prompts, changes: Changes) -> Tensor:
        """Encode without a graph, some experts and some classes at a time, so that what lies between stays in a CPU's caches."""
        each, limit = prompts.prefix.shape[1] + prompts.tail.shape[1], _TOKENS_PER_THREAD * torch.get_num_threads()
        experts, chunk = max(limit // each, 1), max(len(prompts.lengths) * limit // each, 1)
        chunk = min(chunk, self.class_chunk or chunk)
        features = []
        for i, (prefix, tail) in enumerate(zip(prompts.prefix.split(experts), prompts.tail.split(experts), strict=True)):
            own = cut(changes, partial(portion_of, size=experts, index=i, dims=(3, 4), dim=0))
            features.append(self.encode_chunks(replace(prompts, prefix=prefix, tail=tail), own, chunk, self._encode_shared))
        return torch.cat(features)

    def _encode_by_length(self, prompts: Prompts, changes: Changes) -> Tensor:
        """Encode with as much padding as is reached, classes of similar length together, in a few parts."""
        order = sorted(range(len(prompts.lengths)), key=prompts.lengths.__getitem__)
        size, tails = max(len(order) // _PARTS, _PART), prompts.tail.split(prompts.lengths, dim=1)
        features = []
        for start in range(0, len(order), size):
            part = order[start : start + size]
            tail, lengths = torch.cat([tails[i] for i in part], dim=1), tuple(prompts.lengths[i] for i in part)
            some = replace(prompts, tail=tail, lengths=lengths)
            features.append(self.encode_chunks(some, changes, self.class_chunk, self._encode_full))
        back = torch.tensor(order, device=prompts.tail.device).argsort()
        return torch.cat(features, dim=1)[:, back]

    def _encode_shared(self, prompts: Prompts, changes: Changes) -> Tensor:
        start, lengths, device = prompts.prefix.shape[1], prompts.lengths, str(prompts.prefix.device)
        whole = merged(self, changes.outside)
        tail: Tensor = prompts.tail
        blind: tuple[bool, ...] = ()
        if self.cls_emb is not None:
            tail, lengths, blind = self._closed(prompts, whole.get("cls_emb", self.cls_emb))
        layout = packed_layout(lengths, start, device, blind, self.flex)
        position = whole.get("positional_embedding", self.positional_embedding)
        places = layout.positions
        if self.cls_emb is not None:
            places = places.index_fill(0, layout.ends - start, len(position) - 1)
        x = torch.cat([prompts.prefix + position[:start], tail + position[places]], dim=1)
        experts, last = len(x), len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            own = changes.at(i)
            if i in changes.steps:
                x, start, lengths = take_step(Packed(x, start, lengths), changes.steps[i], self.start)
                layout = packed_layout(lengths, start, device, blind, self.flex)
            if own is not None and x.dim() == 2:
                x = x.unflatten(0, (experts, -1))
            # What nothing is changed in takes tokens as rows; functions are not compiled.
            x = (
                self._layer(block, x.flatten(0, -2), layout, last=i == last)
                if own is None
                else shared_block(block, x, layout, own, last=i == last)
            )
        return self._read(x, whole)

    def _closed(self, prompts: Prompts, token: Tensor) -> tuple[Tensor, tuple[int, ...], tuple[bool, ...]]:
        """Put the token that is read behind each class's tail, as CoCa sees it.

        CoCa's mask is shifted by one, in its released weights: the token sees the text and one token of padding, but not itself.

        Returns:
            The tail (E, N', W), its lengths, and whether each class's token does not see itself.
        """
        filled = [prompts.prefix.shape[1] + length == self.context_length for length in prompts.lengths]
        blind = tuple(not full and not self._own_cls for full in filled)
        ends = torch.cat([self.embed([self.tokenizer.pad]), token[None]])
        rows, first, count = [], 0, prompts.tail.shape[1]
        for length, padded in zip(prompts.lengths, blind, strict=True):
            rows += [*range(first, first + length), *([count] if padded else []), count + 1]
            first += length
        tail = torch.cat([prompts.tail, ends.expand(len(prompts.tail), -1, -1)], dim=1)
        index = torch.tensor(rows, device=tail.device)
        return tail[:, index], tuple(n + 1 + padded for n, padded in zip(prompts.lengths, blind, strict=True)), blind

    def _encode_full(self, prompts: Prompts, changes: Changes) -> Tensor:
        """Encode with padding, through open_clip's own layers where nothing is changed in them.

        Raises:
            ConfigError: the tower's layers are not a plain stack, so that changes have no place.
        """
        whole = merged(self, changes.outside)
        x, ends = self._padded(prompts, whole, self._room(changes))
        experts, classes = x.shape[:2]
        filled = ends + 1 == self.context_length
        if not (changes.steps or changes.actions or len(whole) < len(changes.weights)):
            mask = self._mask(x.shape[2], ends, filled)
            mask = _for_blocks(mask, experts, self.blocks[0])
            x = self.transformer(x.flatten(0, 1), attn_mask=mask).unflatten(0, (experts, classes))
            return self._read(self._pick(x, ends), whole)
        if not getattr(self.transformer, "batch_first", True):
            raise ConfigError(
                "MODEL.BACKBONE.NAME: this text tower can't take deep prompts; choose a CLIP ViT with its own text tower"
            )
        for i, block in enumerate(self.blocks):
            if i in changes.steps:
                before = x.shape[2]
                x = take_padded_step(x, changes.steps[i], self.start)
                ends = ends + x.shape[2] - before
            own, mask = changes.at(i), self._mask(x.shape[2], ends, filled)
            if own is None:
                x = block(x.flatten(0, 1), attn_mask=_for_blocks(mask, experts, block)).unflatten(0, (experts, classes))
            else:
                x = layer(block, x, own, mask)
        return self._read(self._pick(x, ends), whole)

    def _room(self, changes: Changes) -> int | None:
        """Return how much padding can reach the token that is read, through functions across tokens; None for all of it."""
        causal = self.shares_prefix and self.cls_emb is None and all(map(is_standard, self.blocks))
        return changes.ahead if causal and not changes.is_shared else None

    def _padded(self, prompts: Prompts, whole: Mapping[str, Tensor], room: int | None) -> tuple[Tensor, Tensor]:
        """Return prompts with padding and positions (E, C, L, W), and where EOT stands in each class (C,)."""
        trim = room is not None or not self.sees_padding and self.attn_mask is None
        x, ends = self.pad(prompts, trim=trim, room=room or 0)
        if self.cls_emb is not None:
            token = whole.get("cls_emb", self.cls_emb).expand(*x.shape[:2], 1, -1)
            x = torch.cat([x, token], dim=2)
        return x + whole.get("positional_embedding", self.positional_embedding)[: x.shape[2]], ends

    def _mask(self, length: int, ends: Tensor, filled: Tensor) -> Tensor | None:
        """Return the attention mask, which grows with tokens that steps insert.

        Args:
            length: L, tokens at this layer.
            ends: (C,), where EOT stands at this layer.
            filled: (C,), whether a prompt is as long as the tower reads.

        Returns:
            (L, L) or (C, 1, L, L), added to the attention's logits; None where every token sees all others.
        """
        mask = self.attn_mask
        if mask is not None and length != mask.shape[0]:
            mask = torch.full((length, length), float("-inf"), device=mask.device, dtype=mask.dtype).triu_(1)
        place = torch.arange(length, device=ends.device)
        if self.cls_emb is not None:
            itself = place == length - 1
            seen = place <= ends[:, None] + (0 if self._own_cls else 1)
            seen = torch.where(itself, torch.ones_like(filled)[:, None] if self._own_cls else filled[:, None], seen)
        elif self._masks_padding and self.attn_mask is None:
            seen = place <= ends[:, None]
        else:
            return mask
        hidden = torch.zeros(len(ends), 1, 1, length, device=ends.device).masked_fill_(~seen[:, None, None], float("-inf"))
        return hidden.expand(-1, -1, length, -1) if mask is None else hidden + mask

    def _pick(self, x: Tensor, ends: Tensor) -> Tensor:
        """Return the states (E, C, W) that are read of tokens (E, C, L, W)."""
        if self.reads == "first":
            return x[:, :, 0]
        if self.reads in ("last", "class"):
            return x[:, :, -1]
        index = ends.view(1, -1, 1, 1).expand(x.shape[0], -1, 1, x.shape[-1])
        return x.gather(2, index).squeeze(2)

    def _read(self, x: Tensor, whole: Mapping[str, Tensor]) -> Tensor:
        """Map EOT states (..., W) as the last layer leaves them to features (..., D), with the changed weights ``whole``."""
        return run_changed(self, whole, lambda tower, states: tower.project(tower.ln_final(states)), x)

    def compile_layers(self) -> None:
        """Run the layers through ``torch.compile`` from now on."""
        self._layer = torch.compile(shared_block)

    def project(self, x: Tensor) -> Tensor:
        """Map EOT states (..., W) into the joint space (..., D)."""
        if isinstance(self.text_projection, nn.Linear):
            return self.text_projection(x)
        return x if self.text_projection is None else x @ self.text_projection


def _for_blocks(mask: Tensor | None, experts: int, block: nn.Module) -> Tensor | None:
    """Give a mask (C, 1, L, L) the shape (E * C * H, L, L) that open_clip's blocks take."""
    if mask is None or mask.dim() == 2:
        return mask
    return mask.repeat(experts, 1, 1, 1).repeat_interleave(cast("nn.MultiheadAttention", block.attn).num_heads, dim=0).squeeze(1)
