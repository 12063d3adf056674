"""Suite ``text``: forward and backward through the text tower alone."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from promptmix.bench.measure import Row, measure
from promptmix.bench.world import World, class_names
from promptmix.clip import ClassTokens
from promptmix.clip.reference import encode_plain


def run(world: World, args: Namespace) -> list[Row]:
    """Return a row for each context length."""
    return [row(world, args.classes, m, args.prompts, args.repeats, args.class_chunk) for m in args.context]


def row(world: World, classes: int, context: int, experts: int, repeats: int, class_chunk: int = 0) -> Row:
    """Compare both ways for ``experts`` prompts of ``context`` vectors over ``classes`` classes.

    The plain way takes expert after expert, as the authors' code of mixtures does, 100 classes at a time, and frees each graph
    before the next: 5 x 100 full-length graphs at once would fill 16 GB, 1000 of them 31 GB.
    """
    tower = world.clip.text
    words = class_names(classes)
    names = tower.tokenizer.class_tokens(words)
    portions = [tower.tokenizer.class_tokens(words[i : i + 100]) for i in range(0, classes, 100)]
    stop = tower.embed(tower.tokenizer.encode("."))[None]
    start = torch.randn(experts, context, tower.width, device=stop.device) * 0.02
    direction = torch.randn(world.clip.embed_dim, device=stop.device)

    def step(encode: Callable[..., Tensor], start: Tensor, names: ClassTokens) -> None:
        features = encode(tower.compose(start.clone().requires_grad_(), names, stop))
        (F.normalize(features, dim=-1) @ direction).sum().backward()

    def plain() -> None:
        for one, portion in product(start.split(1), portions):
            step(lambda prompts: encode_plain(tower, prompts), one, portion)

    prompts = tower.compose(start, names, stop)
    tokens = experts * (prompts.prefix.shape[1] + prompts.tail.shape[1])
    per_token = 2 * sum(p.numel() for p in tower.blocks.parameters() if p.dim() == 2) / 1e9

    def chunked() -> None:
        tower.class_chunk = class_chunk
        try:
            step(tower, start, names)
        finally:
            tower.class_chunk = 0

    ways: dict[str, Callable[[], None]] = {"plain": plain, "ours": lambda: step(tower, start, names)}
    if class_chunk:
        ways[f"ours, {class_chunk} classes at a time"] = chunked
    work = f"text, {classes} classes, {context} context, {experts} prompt(s), forward and backward"
    return Row(work, measure(ways, repeats), 2 * tokens * per_token)
