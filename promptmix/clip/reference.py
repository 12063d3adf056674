"""The plain way: every prompt at the tower's full length, through open_clip's own layers.

It is the oracle that tests and benchmarks measure the prefix-shared tower against, and the fallback for towers that can't share
a prefix (no causal mask, other attention blocks).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from promptmix.errors import ConfigError

if TYPE_CHECKING:
    from promptmix.clip.text import DeepPrompts, Prompts, TextTower


def pad_prompts(tower: TextTower, prompts: Prompts) -> tuple[Tensor, Tensor]:
    """Lay prompts out at full length.

    Returns:
        Embeddings (E, C, L, W) padded with token 0 as CLIP's tokenizer does, and the position of EOT in each class (C,).
    """
    experts, start, _ = prompts.prefix.shape
    padding = tower.embed([0]).expand(experts, tower.context_length, -1)
    rows = []
    for tail in prompts.tail.split(prompts.lengths, dim=1):
        used = start + tail.shape[1]
        rows.append(torch.cat([prompts.prefix, tail, padding[:, used:]], dim=1))
    ends = torch.tensor(prompts.lengths, device=prompts.tail.device) + start - 1
    return torch.stack(rows, dim=1), ends


def encode_plain(tower: TextTower, prompts: Prompts, deep: DeepPrompts | None = None) -> Tensor:
    """Encode prompts at full length; same arguments and result as ``TextTower.forward``.

    Raises:
        ConfigError: the tower's layers are not a plain stack, so that deep prompts have no place.
    """
    x, ends = pad_prompts(tower, prompts)
    experts, classes = x.shape[:2]
    x = (x + tower.positional_embedding).flatten(0, 1)
    if not deep:
        x = tower.transformer(x, attn_mask=tower.attn_mask)
    else:
        if not getattr(tower.transformer, "batch_first", True):
            raise ConfigError(
                "MODEL.BACKBONE.NAME: this text tower can't take deep prompts; choose a CLIP ViT with its own text tower"
            )
        for i, block in enumerate(tower.blocks):
            if i in deep and i > 0:
                new = deep[i].expand(experts, -1, -1).repeat_interleave(classes, dim=0)
                x = torch.cat([x[:, :1], new, x[:, 1 + new.shape[1] :]], dim=1)
            x = block(x, attn_mask=tower.attn_mask)
    x = tower.ln_final(x).unflatten(0, (experts, classes))
    index = ends.view(1, classes, 1, 1).expand(experts, classes, 1, x.shape[-1])
    return tower.project(x.gather(2, index).squeeze(2))


def make_plain(model: nn.Module) -> Callable[[], None]:
    """Have every token computed in every layer from now on (``MODEL.PLAIN_TOWERS``).

    Args:
        model: a CLIP, or one of its towers.

    Returns:
        A function that takes it back.
    """
    names = ("shares_prefix", "skips_unread", "infers_frozen")
    switches = [(part, name) for part in model.modules() for name in names if hasattr(part, name)]
    before = [getattr(part, name) for part, name in switches]

    def put(values: Sequence[bool]) -> None:
        for (part, name), value in zip(switches, values, strict=True):
            setattr(part, name, value)

    put([False] * len(switches))
    return lambda: put(before)


@contextmanager
def plain(model: nn.Module) -> Iterator[None]:
    """``make_plain`` inside the context: the baseline of benchmarks."""
    restore = make_plain(model)
    try:
        yield
    finally:
        restore()
