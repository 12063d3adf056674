"""Prompts put together from contexts and class names, as embeddings of a frozen text tower."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from promptmix.clip.packed import Prompts, expand, packing
from promptmix.clip.places import Changes, PromptStep
from promptmix.clip.tokens import ClassTokens, Tokenizer, kept
from promptmix.errors import ConfigError
from promptmix.parallel import group

#: Deep prompts: {layer: tokens (E or 1, n, W), or (E or 1, C, n, W) where they differ by class}; before that layer they replace
#: the n positions behind SOT. Layer 0 is the input itself. A ``PromptStep`` says otherwise what is removed and inserted there.
DeepPrompts = Mapping[int, Tensor | PromptStep]


class PromptReader(nn.Module):
    """What every text tower knows of prompts: its tokenizer, its embeddings, and how long a prompt may be.

    Args:
        tokenizer: the tokenizer that the tower was trained with.
        token_embedding: its embeddings.
        context_length: longest prompt in tokens, the tokenizer's own first and last ones included.
    """

    def __init__(self, tokenizer: Tokenizer, token_embedding: nn.Module, context_length: int) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.token_embedding = token_embedding
        self.context_length = context_length
        #: Classes encoded at a time; what lies between is computed again for the backward pass. 0 = all at once.
        self.class_chunk = 0

    @property
    def width(self) -> int:
        """Token width W."""
        return cast("Tensor", self.token_embedding.weight).shape[1]

    @property
    def start(self) -> int:
        """How many tokens stand in front of every prompt: 1 for SOT, 0 where the tokenizer has none."""
        return len(self.tokenizer.before)

    def embed(self, ids: Sequence[int]) -> Tensor:
        """Return the token embeddings (len(ids), W) of ``ids``."""
        device = str(cast("Tensor", self.token_embedding.weight).device)
        found: Tensor = self.token_embedding(index_of(tuple(ids), device))
        return found

    def compose(self, *pieces: Tensor | ClassTokens, ends: bool = True) -> Prompts:
        """Put E prompts over C classes together, adding SOT and EOT.

        Args:
            pieces: in reading order: contexts shared by all classes (E, m, W), class-specific contexts (E, C, m, W), and the
                class names. E is that of the tensors; a piece with E = 1 serves all prompts.
            ends: add EOT; without, the last vector of the last piece stands in its place.

        Raises:
            ConfigError: the longest prompt does not fit the tower's context length.
        """
        names = next(piece for piece in pieces if isinstance(piece, ClassTokens))
        # Here and elsewhere on the way of a step in words that PyTorch 2.11's compiler can trace, too.
        experts = max([1, *(piece.shape[0] for piece in pieces if isinstance(piece, Tensor))])
        edges = self.embed([*self.tokenizer.before, *(self.tokenizer.after if ends else ())])[None]
        everything: list[Tensor | ClassTokens] = [edges[:, : self.start], *pieces, edges[:, self.start :]]
        shared = next(i for i, piece in enumerate(everything) if isinstance(piece, ClassTokens) or piece.dim() == 4)
        front = cast("list[Tensor]", everything[:shared])  # class names come later
        prefix = torch.cat([expand(piece, experts) for piece in front], dim=1)
        sources, signature = [], []
        for piece in everything[shared:]:
            if isinstance(piece, ClassTokens):
                rows, kind = self.embed(piece.flat)[None], "names"
            else:
                rows, kind = piece.flatten(1, -2), ("shared" if piece.dim() == 3 else "class")
            sources.append(expand(rows, experts))
            signature.append((kind, piece.shape[-2] if isinstance(piece, Tensor) else 0))
        index, lengths = packing(tuple(signature), names.lengths, str(prefix.device))
        tail = torch.cat(sources, dim=1).index_select(1, index)
        longest = prefix.shape[1] + max(lengths)
        if longest > self.context_length:
            raise ConfigError(
                f"the longest prompt has {longest} tokens, but this backbone reads {self.context_length}; "
                f"shorten the context or the class name {names.names[lengths.index(max(lengths))]!r}"
            )
        names_at = next(i for i, piece in enumerate(everything) if isinstance(piece, ClassTokens))
        context = sum(cast("Tensor", piece).shape[-2] for piece in everything[shared:names_at])
        return Prompts(prefix, tail, lengths, context)

    def compose_around(self, context: Tensor, names: Sequence[str], position: str, stop: Tensor) -> Prompts:
        """Put soft contexts around class names.

        Args:
            context: (E, M, W), or class-specific (E, C, M, W).
            names: C class names.
            position: where they stand: ``end``, ``middle`` (of an odd M the vector more stands behind the name) or ``front``.
            stop: embedding of what ends the prompts (1, n, W).

        Raises:
            ConfigError: class-specific contexts are of another number of classes, or a prompt is too long.
        """
        if context.dim() == 4 and len(names) != context.shape[1]:
            raise ConfigError(f"class-specific contexts were learned for {context.shape[1]} classes and can't serve {len(names)}")
        length = context.shape[-2]
        split = {"end": length, "middle": length // 2, "front": 0}[position]
        return self.compose(context[..., :split, :], self.tokenizer.class_tokens(names), context[..., split:, :], stop)

    def compose_text(self, template: str, names: Sequence[str], verbatim: bool = False) -> Prompts:
        """Put the hard prompts ``template.format(name)`` of all ``names`` together (E = 1), sharing their common first tokens.

        Underscores in names become spaces, unless they are taken ``verbatim``.
        """
        texts = [template.format(name if verbatim else name.replace("_", " ")) for name in names]
        return self.compose_texts(texts, names)

    def compose_texts(self, texts: Sequence[str], names: Sequence[str], *, cut: bool = False) -> Prompts:
        """Put hard prompts together (E = 1), one for each of C classes, sharing their common first tokens.

        Args:
            texts: C texts.
            names: C class names, for messages.
            cut: leave out the last words of texts that are longer than the tower reads, as CLIP's ``truncate`` does.

        Raises:
            ConfigError: a text does not fit the tower's context length.
        """
        room = self.context_length - self.start - len(self.tokenizer.after)
        ids = [self.tokenizer.encode(text)[: room if cut else None] for text in texts]
        shared = _common_prefix(ids)
        rest = ClassTokens(tuple(names), tuple(tuple(row[shared:]) for row in ids))
        return self.compose(self.embed(ids[0][:shared])[None], rest)

    def pad(self, prompts: Prompts, *, trim: bool = False, room: int = 0) -> tuple[Tensor, Tensor]:
        """Lay prompts out at one length.

        Args:
            prompts: E prompts over C classes.
            trim: as long as the longest; otherwise as long as the tower reads.
            room: padding that is left behind the longest.

        Returns:
            Embeddings (E, C, L, W), padded as the tokenizer does, and the position of EOT in each class (C,).
        """
        experts, start, _ = prompts.prefix.shape
        length = min(start + max(prompts.lengths) + room, self.context_length) if trim else self.context_length
        padding = self.embed([self.tokenizer.pad]).expand(experts, length, -1)
        rows = []
        for tail in prompts.tail.split(prompts.lengths, dim=1):
            used = start + tail.shape[1]
            rows.append(torch.cat([prompts.prefix, tail, padding[:, used:]], dim=1))
        ends = torch.tensor(prompts.lengths, device=prompts.tail.device) + start - 1
        return torch.stack(rows, dim=1), ends

    def encode_parts(self, prompts: Prompts, changes: Changes, encode: Callable[[Prompts, Changes], Tensor]) -> Tensor:
        """Encode this process's part of the classes, and gather the others' (``promptmix.parallel``)."""
        if not group.divides():
            return encode(prompts, changes)

        def of(part: slice) -> Tensor:
            before, own = sum(prompts.lengths[: part.start]), prompts.lengths[part]
            some = replace(prompts, tail=prompts.tail.narrow(1, before, sum(own)), lengths=own)
            return encode(some, cut(changes, partial(rows_of, part=part, dims=(4,), dim=1)))

        return group.shared(len(prompts.lengths), of, dim=1, what="classes")

    def encode_chunks(
        self, prompts: Prompts, changes: Changes, chunk: int, encode: Callable[[Prompts, Changes], Tensor]
    ) -> Tensor:
        """Encode ``chunk`` classes at a time, 0 for all at once; with a graph, what lies between is computed again for it."""
        if not 0 < chunk < len(prompts.lengths):
            return encode(prompts, changes)
        again = partial(checkpoint, use_reentrant=False, preserve_rng_state=changes.has_functions)
        features = []
        sizes = [prompts.lengths[i : i + chunk] for i in range(0, len(prompts.lengths), chunk)]
        for i, (tail, lengths) in enumerate(zip(prompts.tail.split([sum(size) for size in sizes], dim=1), sizes, strict=True)):
            some = replace(prompts, tail=tail, lengths=lengths)
            own = cut(changes, partial(portion_of, size=chunk, index=i, dims=(4,), dim=1))
            features.append(again(encode, some, own) if torch.is_grad_enabled() else encode(some, own))
        return torch.cat(features, dim=1)


@kept
def index_of(ids: tuple[int, ...], device: str) -> Tensor:
    """Return ids as an index (len(ids),) on a device."""
    return torch.tensor(ids, dtype=torch.long, device=device)


def steps_of(deep: DeepPrompts | None) -> dict[int, PromptStep]:
    """Return deep prompts as steps; tokens at layer 0 are the input itself, which holds them already."""
    return {
        layer: new if isinstance(new, PromptStep) else PromptStep(new, new.shape[-2])
        for layer, new in (deep or {}).items()
        if layer > 0 or isinstance(new, PromptStep)
    }


def check_room(prompts: Prompts, steps: Mapping[int, PromptStep], begin: int) -> None:
    """Refuse steps that would replace SOT's neighbours beyond what stands before the class name."""
    room, sizes = prompts.prefix.shape[1] + prompts.context - begin, (len(prompts.prefix), len(prompts.lengths))
    for layer in sorted(steps):
        step = steps[layer]
        if step.remove > room:
            raise ConfigError(
                f"deep text prompts replace {step.remove} positions behind SOT, but only {room} context "
                "tokens stand before the class name; use as many context tokens in front of the class name"
            )
        if isinstance(step.tokens, Tensor):
            given = step.tokens.shape[:-2]
            if any(number not in (1, size) for number, size in zip(given, sizes, strict=False)):
                raise ConfigError(
                    f"deep text prompts are for {tuple(given)} prompts and classes, not for {sizes}; give 1 or as many of each"
                )
        room -= step.remove
        if step.tokens is not None:
            room += step.tokens.shape[-2] if isinstance(step.tokens, Tensor) else step.remove


def portion_of(tokens: Tensor, *, size: int, index: int, dims: tuple[int, ...], dim: int) -> Tensor:
    """Return a part of ``tokens`` along ``dim``, where they have that axis and are not the same for all."""
    return tokens.split(size, dim)[index] if tokens.dim() in dims and tokens.shape[dim] > 1 else tokens


def rows_of(tokens: Tensor, *, part: slice, dims: tuple[int, ...], dim: int) -> Tensor:
    """Return the rows ``part`` of ``tokens`` along ``dim``, where they have that axis and are not the same for all."""
    given = tokens.dim() in dims and tokens.shape[dim] > 1
    return tokens.narrow(dim, part.start, part.stop - part.start) if given else tokens


def cut(changes: Changes, cut: Callable[[Tensor], Tensor]) -> Changes:
    """Return the changes for a part of the experts or classes."""
    if not changes.steps:
        return changes
    steps = {
        i: replace(step, tokens=cut(step.tokens)) if isinstance(step.tokens, Tensor) else step
        for i, step in changes.steps.items()
    }
    return replace(changes, steps=steps)


def _common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """Return how many first tokens all rows share, leaving each row at least one of its own."""
    shortest = min(len(row) for row in rows) - 1
    return next((i for i in range(shortest) if any(row[i] != rows[0][i] for row in rows)), max(shortest, 0))


class Packed(NamedTuple):
    """Tokens between two layers.

    Attributes:
        x: (E, P + N, W), or their rows (E * (P + N), W).
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
    if x.dim() == 2:
        if shared and isinstance(new, Tensor) and new.shape == (step.remove, x.shape[1]) and len(x) == start + sum(lengths):
            return Packed(x.slice_scatter(new.to(x.dtype), 0, begin, end), start, lengths)
        x = x.unflatten(0, (-1, start + sum(lengths)))
    if new is not None and not isinstance(new, Tensor):
        new = new(x[:, begin:end] if shared else x[:, _rows_behind(begin, lengths, start, step.remove, device)])
    count = 0 if new is None else new.shape[-2]
    if new is not None:
        new = new.to(x.dtype)
        new = expand(new if new.dim() > 2 else new[None], x.shape[0])
        new = new if new.dim() == 3 else new.expand(-1, len(lengths), -1, -1)
    if shared and (new is None or new.dim() == 3):
        if count == step.remove and new is not None:  # in place, so that the backward pass puts no slices together again
            return Packed(x.slice_scatter(new, 1, begin, end), start, lengths)
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
