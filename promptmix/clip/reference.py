"""The plain way: every prompt at the tower's full length, through open_clip's own layers.

It is the oracle that tests and benchmarks measure the prefix-shared tower against, and the fallback for towers that can't share
a prefix (no causal mask, other attention blocks).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from promptmix.clip.compose import DeepPrompts
from promptmix.clip.flex import choose_attention
from promptmix.clip.packed import Prompts
from promptmix.clip.text import TextTower

if TYPE_CHECKING:
    from yacs.config import CfgNode

    from promptmix.clip.model import CLIP


def encode_plain(tower: TextTower, prompts: Prompts, deep: DeepPrompts | None = None, **changes: Any) -> Tensor:
    """Encode prompts at full length; same arguments and result as ``TextTower.forward``.

    Raises:
        ConfigError: the tower's layers are not a plain stack, so that deep prompts have no place.
    """
    with plain_towers(tower):
        features: Tensor = tower(prompts, deep, **changes)
    return features


def choose_ways(clip: CLIP, node: CfgNode) -> None:
    """Have the towers run from now on as the config node ``MODEL`` says.

    Raises:
        ConfigError: ``MODEL.ATTENTION`` can't be what it is; see ``choose_attention``.
    """
    clip.text.class_chunk = node.CLASS_CHUNK
    choose_attention(clip.text, node.ATTENTION, plain=node.PLAIN_TOWERS)
    if node.COMPILE:
        clip.text.compile_layers()
        clip.image.compile_layers()
    if node.PLAIN_TOWERS:
        make_plain(clip)


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
def plain_towers(model: nn.Module) -> Iterator[None]:
    """``make_plain`` inside the context: the baseline of benchmarks."""
    restore = make_plain(model)
    try:
        yield
    finally:
        restore()
