"""Soft contexts: how they start, and where a class name may stand among them."""

from __future__ import annotations

import torch
from torch import Tensor
from yacs.config import CfgNode

from promptmix.clip.text import TextTower
from promptmix.config import get_key, source_of
from promptmix.errors import ConfigError, SettingError
from promptmix.files.text import harmless, is_name

POSITIONS = ("end", "middle", "front")


def refuse_words_per_class(csc: bool, words: str) -> None:
    """Raise ``ConfigError`` where class-specific contexts, which start at random, are given words."""
    if csc and words:
        raise ConfigError(f"class-specific contexts (CSC) start at random, so CTX_INIT {words!r} would be ignored; drop one")


def initial_context(tower: TextTower, n_ctx: int, words: str, *leading: int) -> Tensor:
    """Return the start of ``leading[0]`` contexts.

    Args:
        tower: whose token embeddings the words have.
        n_ctx: context vectors M; the number of tokens of ``words`` where those are given.
        words: what the first context starts from ("a photo of a"); the others, or all where it is "", are drawn from
            N(0, 0.02), so that they can differ.
        leading: sizes in front of the (M, W) of one context, the number of prompts first.

    Returns:
        A tensor (*leading, M, W) on the CPU.

    Raises:
        ConfigError: no context vector, no prompt, or words that are none.
    """
    if "{}" in words or words and not (is_name(words) and harmless(words) == words):
        raise SettingError("ctx_init", words, "but must be the words before the class name alone, such as 'a photo of a'")
    start = tower.embed(tower.tokenizer.encode(words.replace("_", " ")))
    length = len(start) if words else n_ctx
    if length < 1 or leading[0] < 1:
        raise ConfigError(f"a soft prompt needs at least 1 context vector and 1 prompt, not {length} and {leading[0]}")
    context = torch.empty(*leading, length, tower.width).normal_(std=0.02)
    if words:
        context[0] = start.cpu()
    return context


def refuse_idle_length(cfg: CfgNode, node: str) -> None:
    """Refuse a context length that the initial words would override.

    Args:
        cfg: the whole tree.
        node: dotted key of the node that holds ``N_CTX`` and ``CTX_INIT``.

    Raises:
        ConfigError: it was given on the command line, and the words are more or fewer.
    """
    settings = get_key(cfg, node)
    differs = len(settings.CTX_INIT.replace("_", " ").split()) != settings.N_CTX  # CoOp's scripts give both
    if settings.CTX_INIT and differs and source_of(cfg, f"{node}.N_CTX") == "command line":
        raise ConfigError(
            f"{node}.N_CTX {settings.N_CTX} would be ignored, since CTX_INIT {settings.CTX_INIT!r} sets the length; drop one"
        )
