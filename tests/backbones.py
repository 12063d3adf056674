"""Backbones for the tests: building one takes thirty times as long as copying it."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from promptmix.registry import BACKBONE_REGISTRY

#: How many are kept, and the most numbers that one may have.
KEPT, MOST = 6, 20_000_000


class Kept:
    """``load_clip``, with copies of what it loaded before: the same weights, and the same random numbers afterwards.

    A backbone follows from its settings, its file, who builds it, and the random state, since random weights are drawn first.
    """

    def __init__(self, load: Callable[[Any], Any]) -> None:
        self._load = load
        self._kept: OrderedDict[tuple[Any, ...], tuple[Any, torch.Tensor]] = OrderedDict()

    def __call__(self, cfg: Any) -> Any:
        key = self._key(cfg)
        if key in self._kept:
            self._kept.move_to_end(key)
            clip, state = self._kept[key]
            torch.set_rng_state(state)
            return _copy(clip)
        clip = self._load(cfg)
        if sum(p.numel() for p in clip.parameters()) <= MOST:
            self._kept[key] = _copy(clip), torch.get_rng_state()
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return clip

    @staticmethod
    def _key(cfg: Any) -> tuple[Any, ...]:
        node = cfg.MODEL.BACKBONE
        file = Path(node.WEIGHTS) if node.WEIGHTS else None
        known = (file.stat().st_mtime_ns, file.stat().st_size) if file is not None and file.is_file() else None
        builder = BACKBONE_REGISTRY._entries.get(node.NAME)
        return str(node), known, builder, torch.get_rng_state().numpy().tobytes()


def _copy(clip: nn.Module) -> Any:
    """Copy a backbone but its tokenizer, whose tables nothing changes."""
    tokenizer: Any = clip.tokenizer
    return _copied(clip, {id(tokenizer): tokenizer})


def _copied(module: nn.Module, memo: dict[int, Any]) -> Any:
    """Copy a module as ``copy.deepcopy`` does, in half the time: most of what its hundreds of parts hold is empty or fixed."""
    if id(module) in memo:
        return memo[id(module)]
    new = memo[id(module)] = type(module).__new__(type(module))
    for name, value in vars(module).items():
        if name == "_modules":
            vars(new)[name] = {key: None if each is None else _copied(each, memo) for key, each in value.items()}
        elif value is None or isinstance(value, (bool, int, float, str)):
            vars(new)[name] = value
        elif isinstance(value, (dict, set)) and not value:
            vars(new)[name] = type(value)()
        else:
            vars(new)[name] = copy.deepcopy(value, memo)
    return new
