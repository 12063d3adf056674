"""How the authors' code of a method names what it saves: a table of names beside each method, read both ways."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

_NUMBER = re.compile(r"\{([ij])([+-]1)?\}")


@dataclass(frozen=True)
class Rule:
    """One name, or a family of names, in both layouts.

    Attributes:
        theirs: the authors' name; ``{i}`` and ``{j}`` stand for numbers.
        ours: our name; ``{i-1}`` and ``{i+1}`` are allowed. ``<model>/<name>`` belongs to another registered model.
        expert_axis: ours has a leading axis of size 1 that theirs lacks.
    """

    theirs: str
    ours: str
    expert_axis: bool = False


@dataclass(frozen=True)
class Layout:
    """How the authors' code of one method saves it.

    Attributes:
        folder: name under which their trainer registers its model.
        rules: the learned tensors.
        whole: the whole model was registered, so that names start with ``prompt_learner.`` and the frozen CLIP is in the file.
        beside: names in the whole model that do not start with ``prompt_learner.`` (a regular expression).
        unused: names that their code saves and never uses, besides those for class names (regular expressions).
        ours_alone: our names of what theirs does not save and only training needs (a regular expression).
    """

    folder: str
    rules: tuple[Rule, ...]
    whole: bool = False
    unused: tuple[str, ...] = field(default=())
    beside: str = "(?!)"
    ours_alone: str = "(?!)"


def linear(theirs: str, ours: str) -> tuple[Rule, Rule]:
    """Return the rules of weight and bias."""
    return Rule(f"{theirs}.weight", f"{ours}.weight"), Rule(f"{theirs}.bias", f"{ours}.bias")


#: Names that several methods of one family share.
COUPLED_TEXT = (Rule("ctx", "bank.text.ctx"), Rule("compound_prompts_text.{i}", "bank.text.deeper.{i}"))
VISUAL = (
    Rule("image_encoder.VPT", "bank.vision.layers.0"),
    Rule("image_encoder.transformer.resblocks.{i}.VPT_shallow", "bank.vision.layers.{i}"),
)
INDEPENDENT = (
    Rule("ctx", "bank.text.ctx"),
    Rule("text_encoder.transformer.resblocks.{i}.VPT_shallow", "bank.text.deeper.{i-1}"),
    *VISUAL,
)


def rename(rules: Iterable[Rule], name: str, backwards: bool = False) -> tuple[str, bool] | None:
    """Return the other layout's name and whether the expert axis differs, or None where no rule fits."""
    for rule in rules:
        source, target = (rule.ours, rule.theirs) if backwards else (rule.theirs, rule.ours)
        numbers = _match(source, name)
        if numbers is not None:
            return _fill(target, numbers), rule.expert_axis
    return None


def _fill(pattern: str, numbers: Mapping[str, int]) -> str:
    return _NUMBER.sub(lambda found: str(numbers[found[1]] + int(found[2] or 0)), pattern)


def _match(pattern: str, name: str) -> dict[str, int] | None:
    """Return the numbers that make ``pattern`` equal ``name``; ``{i-1}`` at 0 means that i is 1."""
    parts = _NUMBER.split(pattern)  # text, letter, offset, text, letter, offset, ..., text
    regex = re.escape(parts[0])
    for letter, text in zip(parts[1::3], parts[3::3], strict=True):
        regex += rf"(?P<{letter}>\d+){re.escape(text)}"
    found = re.fullmatch(regex, name)
    if found is None:
        return None
    offsets = dict(zip(parts[1::3], parts[2::3], strict=True))
    return {letter: int(found[letter]) - int(offset or 0) for letter, offset in offsets.items()}


#: How learned tensors were named before all methods shared one learner: old prefix -> new one. Deep prompts had none.
_FORMER = {"supervision.": "losses.text.", "distiller.": "losses.distill."}
_PARTS = ("bank.", "router.", "head.", "losses.", "measures.")


def today(name: str) -> str:
    """Return today's name of a learned tensor that an earlier promptmix may have named otherwise."""
    for former, now in _FORMER.items():
        if name.startswith(former):
            return now + name.removeprefix(former)
    return name if name.startswith(_PARTS) else f"bank.{name}"
