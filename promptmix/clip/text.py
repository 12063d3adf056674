"""CLIP's text tower, computed once for what the classes share.

The tower is causal and its feature is read at EOT. Hence, exactly: tokens after EOT don't matter, and the tokens in front of the
class name have the same keys and values for every class. A set of prompts is therefore kept as one shared *prefix* (SOT and
what stands before the class name) and a packed *tail* (class name to EOT, no padding), and every linear layer runs on
``P + N`` tokens per prompt instead of ``C * 77``. Deep prompts replace prefix positions, so they keep the sharing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import cast

import open_clip
import torch
from open_clip.transformer import Transformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from promptmix.clip.blocks import is_standard, layer
from promptmix.clip.packed import Packed, Prompts, expand, layout_of, packing, shared_block, take_step
from promptmix.clip.places import Changes, LayerAction, PromptStep
from promptmix.clip.tokens import ClassTokens, Tokenizer
from promptmix.clip.weights import Weights, merged, run_changed
from promptmix.errors import ConfigError

#: Tokens per CPU thread whose states between two layers of a ViT-B/16 stay in the caches; more at once are slower, not faster.
_TOKENS_PER_THREAD = 1024

#: Deep prompts: {layer: tokens (E or 1, n, W), or (E or 1, C, n, W) where they differ by class}; before that layer they replace
#: the n positions behind SOT. Layer 0 is the input itself. A ``PromptStep`` says otherwise what is removed and inserted there.
DeepPrompts = Mapping[int, Tensor | PromptStep]


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
        self._layer = shared_block

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

    def compose_text(self, template: str, names: Sequence[str]) -> Prompts:
        """Put the hard prompts ``template.format(name)`` of all ``names`` together (E = 1), sharing their common first tokens."""
        ids = [self.tokenizer.encode(template.format(name.replace("_", " "))) for name in names]
        shared = _common_prefix(ids)
        rest = ClassTokens(tuple(names), tuple(tuple(row[shared:]) for row in ids))
        return self.compose(self.embed(ids[0][:shared])[None], rest)

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
        not CLIP's. A branch that draws random numbers draws them once for what classes share (and, under ``class_chunk``, once
        for each chunk).

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
        steps = {i: new if isinstance(new, PromptStep) else PromptStep(new, new.shape[-2]) for i, new in (deep or {}).items()}
        if deep and isinstance(deep.get(0), Tensor):
            del steps[0]  # the input, which holds it already
        changes = Changes(steps, weights or {}, actions or {})
        if weights or actions or steps:
            changes.check(self, len(self.blocks), "text")
            _check_room(prompts, steps)
        if (
            not self.shares_prefix or not changes.is_shared or not all(map(is_standard, self.blocks))
        ):  # adapters may come any time
            return self.encode_full(prompts, changes)
        if not torch.is_grad_enabled() and prompts.prefix.device.type == "cpu" and not changes.has_functions:
            return self._encode_portions(prompts, changes)
        return self._encode_chunks(prompts, changes, self.class_chunk)

    def _encode_portions(self, prompts: Prompts, changes: Changes) -> Tensor:
        """Encode without a graph, some experts and some classes at a time, so that what lies between stays in a CPU's caches."""
        each, limit = prompts.prefix.shape[1] + prompts.tail.shape[1], _TOKENS_PER_THREAD * torch.get_num_threads()
        experts, chunk = max(limit // each, 1), max(len(prompts.lengths) * limit // each, 1)
        chunk = min(chunk, self.class_chunk or chunk)
        features = []
        for i, (prefix, tail) in enumerate(zip(prompts.prefix.split(experts), prompts.tail.split(experts), strict=True)):
            own = _cut(changes, partial(_portion, size=experts, index=i, dims=(3, 4), dim=0))
            features.append(self._encode_chunks(replace(prompts, prefix=prefix, tail=tail), own, chunk))
        return torch.cat(features)

    def _encode_chunks(self, prompts: Prompts, changes: Changes, chunk: int) -> Tensor:
        """Encode ``chunk`` classes at a time, 0 for all at once; with a graph, what lies between is computed again for it."""
        if not 0 < chunk < len(prompts.lengths):
            return self._encode_shared(prompts, changes)
        again = partial(checkpoint, use_reentrant=False, preserve_rng_state=changes.has_functions)
        features = []
        sizes = [prompts.lengths[i : i + chunk] for i in range(0, len(prompts.lengths), chunk)]
        for i, (tail, lengths) in enumerate(zip(prompts.tail.split([sum(size) for size in sizes], dim=1), sizes, strict=True)):
            some = replace(prompts, tail=tail, lengths=lengths)
            own = _cut(changes, partial(_portion, size=chunk, index=i, dims=(4,), dim=1))
            if torch.is_grad_enabled():
                features.append(again(self._encode_shared, some, own))
            else:
                features.append(self._encode_shared(some, own))
        return torch.cat(features, dim=1)

    def _encode_shared(self, prompts: Prompts, changes: Changes) -> Tensor:
        start, device = prompts.prefix.shape[1], str(prompts.prefix.device)
        layout = layout_of(prompts.lengths, start, device)
        whole = merged(self, changes.outside)
        position = whole.get("positional_embedding", self.positional_embedding)
        x = torch.cat([prompts.prefix + position[:start], prompts.tail + position[layout.positions]], dim=1)
        lengths, last = prompts.lengths, len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            if i in changes.steps:
                x, start, lengths = take_step(Packed(x, start, lengths), changes.steps[i])
                layout = layout_of(lengths, start, device)
            own = changes.at(i)
            run = self._layer if own is None else shared_block  # functions are not compiled
            x = run(block, x, start, layout, *([] if own is None else [own]), last=i == last)
        return self._read(x, whole)

    def encode_full(self, prompts: Prompts, changes: Changes) -> Tensor:
        """Encode at full length with padding, through open_clip's own layers where nothing is changed in them.

        Raises:
            ConfigError: the tower's layers are not a plain stack, so that changes have no place.
        """
        x, ends = self.pad(prompts)
        whole = merged(self, changes.outside)
        experts, classes = x.shape[:2]
        x = x + whole.get("positional_embedding", self.positional_embedding)
        inside = changes.steps or changes.actions or any(name.startswith(changes.blocks) for name in changes.weights)
        if not inside:
            x = self.transformer(x.flatten(0, 1), attn_mask=self.attn_mask).unflatten(0, (experts, classes))
        elif not getattr(self.transformer, "batch_first", True):
            raise ConfigError(
                "MODEL.BACKBONE.NAME: this text tower can't take deep prompts; choose a CLIP ViT with its own text tower"
            )
        for i, block in enumerate(self.blocks if inside else []):
            if i in changes.steps:
                before = x.shape[2]
                x = _replace_padded(x, changes.steps[i])
                ends = ends + x.shape[2] - before
            own = changes.at(i)
            mask = self._mask(x.shape[2])
            if own is None:
                x = block(x.flatten(0, 1), attn_mask=mask).unflatten(0, (experts, classes))
            else:
                x = layer(block, x, own, mask)
        index = ends.view(1, classes, 1, 1).expand(experts, classes, 1, x.shape[-1])
        return self._read(x.gather(2, index).squeeze(2), whole)

    def pad(self, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """Lay prompts out at full length.

        Returns:
            Embeddings (E, C, L, W) padded with token 0 as CLIP's tokenizer does, and the position of EOT in each class (C,).
        """
        experts, start, _ = prompts.prefix.shape
        padding = self.embed([0]).expand(experts, self.context_length, -1)
        rows = []
        for tail in prompts.tail.split(prompts.lengths, dim=1):
            used = start + tail.shape[1]
            rows.append(torch.cat([prompts.prefix, tail, padding[:, used:]], dim=1))
        ends = torch.tensor(prompts.lengths, device=prompts.tail.device) + start - 1
        return torch.stack(rows, dim=1), ends

    def _mask(self, length: int) -> Tensor | None:
        """Return the attention mask (length, length), which grows with tokens that steps insert."""
        mask = self.attn_mask
        if mask is None or length == mask.shape[0]:
            return mask
        return torch.full((length, length), float("-inf"), device=mask.device, dtype=mask.dtype).triu_(1)

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


def _check_room(prompts: Prompts, steps: Mapping[int, PromptStep]) -> None:
    """Refuse steps that would replace SOT's neighbours beyond what stands before the class name."""
    room, sizes = prompts.room, (len(prompts.prefix), len(prompts.lengths))
    for _, step in sorted(steps.items()):
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


def _portion(tokens: Tensor, *, size: int, index: int, dims: tuple[int, ...], dim: int) -> Tensor:
    """Return a part of ``tokens`` along ``dim``, where they have that axis and are not the same for all."""
    return tokens.split(size, dim)[index] if tokens.dim() in dims and tokens.shape[dim] > 1 else tokens


def _cut(changes: Changes, cut: Callable[[Tensor], Tensor]) -> Changes:
    """Return the changes for a part of the experts or classes."""
    if not changes.steps:
        return changes
    steps = {
        i: replace(step, tokens=cut(step.tokens)) if isinstance(step.tokens, Tensor) else step
        for i, step in changes.steps.items()
    }
    return replace(changes, steps=steps)


def _replace_padded(x: Tensor, step: PromptStep) -> Tensor:
    """Remove and insert tokens behind SOT at full length (E, C, L, W)."""
    new = step.tokens
    if new is not None and not isinstance(new, Tensor):
        new = new(x[:, :, 1 : 1 + step.remove])
    kept = [x[:, :, :1], x[:, :, 1 + step.remove :]]
    if new is not None:
        new = new if new.dim() > 2 else new[None]
        new = new if new.dim() == 4 else new[:, None]
        kept.insert(1, new.to(x.dtype).expand(*x.shape[:2], -1, -1))
    return torch.cat(kept, dim=2)


def _common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """Return how many first tokens all rows share, leaving each row at least one of its own."""
    shortest = min(len(row) for row in rows) - 1
    return next((i for i in range(shortest) if any(row[i] != rows[0][i] for row in rows)), max(shortest, 0))
