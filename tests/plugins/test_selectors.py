"""Selectors and the balance of classes against the picks of their authors' code, and their bounds."""

from __future__ import annotations

import random
import zlib

import numpy as np
import pytest

from promptmix.errors import ConfigError
from promptmix.plugin_manager import get_plugin_manager
from promptmix.registry import SELECTOR_REGISTRY
from promptmix.runs.selection import Draws, Pool, balanced
from tests.trainers.golden import numbers, seeded

get_plugin_manager()
N, C, D = 64, 6, 512
LABELS = np.random.RandomState(zlib.crc32(b"pcb/labels")).randint(0, C, N)
FIRST = random.Random(1).sample(range(N), C)
NAMES = ("random", "entropy", "coreset", "badge")


def picks(name):
    return numbers("pcb_select")[f"sel:{name}"].astype(int).tolist()


def pool(missing=""):
    features = seeded().stream("pcb/features", (N, D))
    logits = seeded().stream("pcb/logits", (N, C), 2.0)
    logits[:, -1] -= 100 if missing else 0
    return Pool(features / np.linalg.norm(features, axis=1, keepdims=True), logits, FIRST)


def select(name, pool, count):
    draws = Draws(1)
    draws.python.seed(2)
    return SELECTOR_REGISTRY.get(name)().select(pool, count, draws)


@pytest.mark.parametrize("missing", ["", "missing/"])
@pytest.mark.parametrize("name", NAMES)
def test_picks_are_the_authors(name, missing):
    assert picks("round0") == FIRST
    seen, selector = pool(missing), SELECTOR_REGISTRY.get(name)
    assert select(name, seen, C) == picks(f"{missing}{name}/plain")
    candidates = select(name, seen, 16 if selector.proposes_more else C)
    assert candidates == picks(f"{missing}{name}/candidates")
    counts = np.bincount(LABELS[FIRST], minlength=C)
    chosen, after = balanced(candidates, seen.predicted, counts, C, random.Random(3))
    assert (chosen, after) == (picks(f"{missing}{name}/pcb"), picks(f"{missing}{name}/counts_after"))


def test_a_class_without_candidates_counts_as_served_where_that_is_asked_for():
    seen = pool("missing")
    counts = np.bincount(LABELS[FIRST], minlength=C)
    candidates = select("coreset", seen, 16)
    chosen, after = balanced(candidates, seen.predicted, counts, C, random.Random(3), count_missing=True)
    assert sum(after) == 2 * C and len(set(chosen)) == C
    with pytest.raises(ConfigError, match="7 pictures are to be picked of 6"):
        balanced(candidates[:6], seen.predicted, counts, 7, random.Random(3))


@pytest.mark.parametrize("name", NAMES)
def test_every_unlabelled_picture_can_be_had_once(name):
    seen = pool()
    alike = Pool(np.ones_like(seen.features), np.zeros_like(seen.logits), FIRST)
    for one in (seen, alike):
        found = select(name, one, N - C)
        assert sorted(found) == sorted(set(range(N)) - set(FIRST))
    assert select(name, seen, 0) == []


def test_badge_draws_on_explicit_gradient_embeddings():
    seen = pool()
    errors = -seen.probabilities
    errors[np.arange(N), seen.predicted] += 1
    rows = np.einsum("nc,nd->ncd", errors, seen.features).reshape(N, -1)[seen.unlabelled]
    chosen, draws = [int(np.linalg.norm(rows, axis=1).argmax())], np.random.RandomState(1)
    while len(chosen) < 20:
        square = np.min([((rows - rows[i]) ** 2).sum(axis=1) for i in chosen], axis=0)
        place = int((np.cumsum(square / square.sum()) >= draws.random_sample()).argmax())
        chosen += [place] if place not in chosen else []
    assert select("badge", seen, 20) == [seen.unlabelled[place] for place in chosen]
