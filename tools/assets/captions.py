"""Captions of the concepts, each with the set of concepts that it fits."""

from __future__ import annotations

import random

import torch

from assets.concepts import FAMILIES, Concept

TEMPLATES = (
    "a photo of a {}.",
    "a photo of the {}.",
    "a picture of a {}.",
    "an image of a {}.",
    "an emoji of a {}.",
    "a drawing of a {}.",
    "an icon of a {}.",
    "a cartoon of a {}.",
    "a sticker of a {}.",
    "a sketch of a {}.",
    "a bright photo of a {}.",
    "a blurry photo of a {}.",
    "a close-up photo of a {}.",
    "a black and white drawing of a {}.",
    "a colorful drawing of a {}.",
    "a flat icon of a {}.",
    "a 3d rendering of a {}.",
    "an outline of a {}.",
    "a symbol of a {}.",
    "art of the {}.",
    "this is a {}.",
    "the {}.",
    "{}",
    "{} emoji",
)
# What a caption names: the concept itself, one of its tags, the kind of its subgroup, or the kind of its group.
KINDS = ("label", "tag", "subgroup", "group", "label of a kind")
KIND_WEIGHTS = (0.45, 0.2, 0.15, 0.05, 0.15)


def bare(phrase: str) -> str:
    """Drop a phrase's article: ``"an arrow"`` becomes ``"arrow"``; templates bring their own."""
    first, _, rest = phrase.partition(" ")
    return rest if first in ("a", "an", "the") and rest else phrase


class Captions:
    """Draws batches of captions with soft targets over the seen concepts."""

    def __init__(self, concepts: list[Concept], seed: int) -> None:
        """Index which concepts each phrase fits.

        Args:
            concepts: The seen concepts, in the prototypes' order.
            seed: Seed of the draws.
        """
        self.concepts = concepts
        self._rng = random.Random(seed)
        self._fits: dict[str, set[int]] = {}
        for row, concept in enumerate(concepts):
            for phrase in (concept.label, *concept.tags, self._kind(concept), self._group(concept)):
                self._fits.setdefault(phrase.lower(), set()).add(row)

    @staticmethod
    def _kind(concept: Concept) -> str:
        return bare(FAMILIES["phrase_of_subgroup"][concept.subgroup])

    @staticmethod
    def _group(concept: Concept) -> str:
        return bare(FAMILIES["phrase_of_group"][concept.group])

    def _draw(self) -> tuple[str, set[int]]:
        row = self._rng.randrange(len(self.concepts))
        concept = self.concepts[row]
        (kind,) = self._rng.choices(KINDS, KIND_WEIGHTS)
        if kind == "label of a kind":
            return f"{concept.label}, a {self._kind(concept)}", {row}
        phrase = {
            "label": concept.label,
            "tag": self._rng.choice(concept.tags or (concept.label,)),
            "subgroup": self._kind(concept),
            "group": self._group(concept),
        }[kind]
        return phrase, self._fits[phrase.lower()]

    def batch(self, size: int) -> tuple[list[str], torch.Tensor]:
        """Draw captions.

        Args:
            size: Number of captions.

        Returns:
            The captions, and their targets (size, concepts): equal shares of the concepts that the phrase fits.
        """
        texts, targets = [], torch.zeros(size, len(self.concepts))
        for i in range(size):
            phrase, fits = self._draw()
            texts.append(self._rng.choice(TEMPLATES).format(phrase))
            targets[i, list(fits)] = 1 / len(fits)
        return texts, targets
