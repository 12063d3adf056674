"""Which words stand nearest to what the text tower reads, position by position and layer by layer.

As CoOp's ``interpret_prompt``: Euclidean distance to the token embeddings. What deep prompts put between two layers is compared
with what the words themselves look like there: the state of each word of the vocabulary, read alone behind SOT, as it enters that
layer. Which tensors are prompts need not be told by a bank: what it gives to the tower is looked at.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from promptmix.clip.compose import DeepPrompts
from promptmix.clip.packed import Prompts
from promptmix.clip.places import PromptStep
from promptmix.clip.text import TextTower
from promptmix.prompts.roles import PromptBank, Task

__all__ = ["Position", "nearest_words"]

_FIXED = 1e-6  # a vector this near to a word is that word, not learned
_CHUNK = 2048


@dataclass
class Position:
    """A token that the text tower reads.

    Attributes:
        expert: of which prompt, from 0.
        layer: before which layer it enters; 0 is the input.
        place: where it stands, from 1 behind SOT; negative behind the beginning of the class name, counted from the end.
        words: the nearest words with their distances, nearest first.
        usual: median distance from a word to its nearest other word, in the same layer.
        classname: whose, where the tokens differ by class; "" = of all.
    """

    expert: int
    layer: int
    place: int
    words: list[tuple[str, float]]
    usual: float = 0.0
    classname: str = ""


@dataclass
class _Seen:
    """Vectors (n, W) that enter one layer, with where they stand: (expert, place, class name)."""

    rows: list[Tensor] = field(default_factory=list)
    places: list[tuple[int, int, str]] = field(default_factory=list)

    def add(self, vectors: Tensor, expert: int, first: int, classname: str = "") -> None:
        """Add vectors that stand side by side from place ``first`` on."""
        for offset, vector in enumerate(vectors.detach().float()):
            self.rows.append(vector)
            self.places.append((expert, first + offset, classname))


def nearest_words(bank: PromptBank, task: Task, count: int = 3) -> list[Position]:
    """Return what is learned in a bank's text prompts, by expert, layer and place; words that stand as they are come with 0.

    Args:
        bank: the prompts.
        task: the frozen model and the class names.
        count: words for each position.
    """
    layers: dict[int, _Seen] = {}
    experts: list[int | None] = list(range(bank.num_experts)) if bank.takes_experts else [None]
    for expert in experts:
        row = expert or 0
        for prompts, deep in _read_by_tower(bank, task, expert):
            _take(layers, prompts, deep, row, task)
            row += len(prompts.prefix)
    if not layers:
        return []
    found: list[Position] = []
    vocabulary = _Vocabulary(task, max(layers))
    for layer in sorted(layers):
        seen = layers[layer]
        nearest, usual = vocabulary.nearest(torch.stack(seen.rows), layer, count)
        for (expert, place, name), words in zip(seen.places, nearest, strict=True):
            found.append(Position(expert, layer, place, words, usual, name))
    learned = {(one.expert, one.layer, one.classname) for one in found if one.words[0][1] > _FIXED}
    kept = [
        one for one in found if (one.expert, one.layer, one.classname) in learned and (one.place > 0 or one.words[0][1] > _FIXED)
    ]
    return sorted(kept, key=lambda one: (one.classname, one.expert, one.layer, one.place < 0, one.place))


def _read_by_tower(bank: PromptBank, task: Task, expert: int | None) -> list[tuple[Prompts, DeepPrompts]]:
    """Return what a bank gives to the text tower with anything learned in it."""
    seen: list[tuple[Prompts, DeepPrompts]] = []

    def look(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        prompts, deep = args[0], (args[1] if len(args) > 1 else kwargs.get("deep")) or {}
        tensors = [
            prompts.prefix,
            prompts.tail,
            *(step.tokens if isinstance(step, PromptStep) else step for step in deep.values()),
        ]
        if any(callable(one) and not isinstance(one, Tensor) or getattr(one, "requires_grad", False) for one in tensors):
            seen.append((prompts, deep))

    states = {parameter: parameter.requires_grad for parameter in bank.parameters()}
    handle = task.clip.text.register_forward_pre_hook(look, with_kwargs=True)
    try:
        for parameter in states:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            options = {} if expert is None else {"experts": torch.tensor([expert])}
            if bank.per_image:  # the context itself: what an image adds is that of a feature of zeros
                image = task.clip.scale.new_zeros(1, task.clip.embed_dim)
                bank(task.classnames, image)
            elif "experts" in options and "experts" not in inspect.signature(bank.forward).parameters:
                bank(task.classnames)
            else:
                bank(task.classnames, **options)
    finally:
        handle.remove()
        for parameter, learned in states.items():
            parameter.requires_grad_(learned)
    return seen


def _take(layers: dict[int, _Seen], prompts: Prompts, deep: DeepPrompts, row: int, task: Task) -> None:
    """Add the positions of one call of the tower."""
    tower = task.clip.text
    start, end = tower.start, len(tower.tokenizer.after)
    input_ = layers.setdefault(0, _Seen())
    for expert in range(len(prompts.prefix)):
        input_.add(prompts.prefix[expert, start:], row + expert, 1)
        first = 0
        for name, length in zip(task.classnames, prompts.lengths, strict=False):
            tail = prompts.tail[expert, first : first + length - end]
            if prompts.context:
                input_.add(tail[: prompts.context], row + expert, prompts.prefix.shape[1] - start + 1, name)
            else:
                input_.add(tail, row + expert, -len(tail))
                break  # the others have the same behind their names
            first += length
    for layer, step in deep.items():
        if layer == 0:
            continue
        tokens = _tokens_of(step, task)
        if tokens is None:
            continue
        tokens = tokens if tokens.dim() > 2 else tokens[None]
        seen = layers.setdefault(layer, _Seen())
        for expert in range(len(prompts.prefix)):
            own = tokens[min(expert, len(tokens) - 1)]
            if own.dim() == 2:
                seen.add(own, row + expert, 1)
            else:
                for name, vectors in zip(task.classnames, own, strict=False):
                    seen.add(vectors, row + expert, 1, name if len(own) > 1 else "")


def _tokens_of(step: Tensor | PromptStep, task: Task) -> Tensor | None:
    """Return what a step inserts; a function of the removed tokens is asked with zeros, of which no zero is shown."""
    if isinstance(step, Tensor):
        return step
    if step.tokens is None or isinstance(step.tokens, Tensor):
        return step.tokens
    made = step.tokens(task.clip.scale.new_zeros(1, step.remove, task.clip.text.width))
    return made[..., made.abs().sum(dim=-1).flatten(0, -2).any(dim=0) if made.dim() > 2 else made.abs().sum(dim=-1) > 0, :]


class _Vocabulary:
    """The words of the tower, as they look when they enter each layer.

    Args:
        task: the frozen model.
        deepest: last layer that is asked for.
    """

    def __init__(self, task: Task, deepest: int) -> None:
        self._tower = tower = task.clip.text
        self._table: Tensor = tower.token_embedding.weight.detach().float()
        special = {*tower.tokenizer.before, *tower.tokenizer.after, tower.tokenizer.pad}
        self._ids = [i for i in range(len(self._table)) if i not in special and tower.tokenizer.word(i).strip()]
        self._states = {0: self._table[self._ids]}
        if deepest and isinstance(tower, TextTower):
            self._go_through(deepest)

    @torch.no_grad()
    def _go_through(self, deepest: int) -> None:
        """Read every word alone behind SOT."""
        tower: Any = self._tower
        begin = self._table[list(tower.tokenizer.before)]
        length = len(begin) + 1
        mask = None if tower.attn_mask is None else tower.attn_mask[:length, :length]
        parts: dict[int, list[Tensor]] = {}
        for ids in torch.tensor(self._ids).split(_CHUNK):
            x = (
                torch.cat([begin.expand(len(ids), -1, -1), self._table[ids][:, None]], dim=1)
                + tower.positional_embedding[:length]
            )
            for layer, block in enumerate(tower.blocks[:deepest], start=1):
                x = block(x, attn_mask=mask)
                parts.setdefault(layer, []).append(x[:, -1].float())
        self._states |= {layer: torch.cat(states) for layer, states in parts.items()}

    @torch.no_grad()
    def nearest(self, vectors: Tensor, layer: int, count: int) -> tuple[list[list[tuple[str, float]]], float]:
        """Return the nearest words of vectors (n, W), and the usual distance between neighbours among the words."""
        states = self._states.get(layer, self._states[0])
        best = torch.cdist(vectors, states, compute_mode="donot_use_mm_for_euclid_dist").topk(
            min(count, len(states)), largest=False
        )
        some = states[:: max(1, len(states) // 256)]
        usual = torch.cdist(some, states).topk(2, largest=False).values[:, 1].median().item()
        word = self._tower.tokenizer.word
        return [
            [(word(self._ids[i]), value) for i, value in zip(ids, values, strict=True)]
            for ids, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ], usual
