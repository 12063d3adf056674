"""OpenworldAUC against its authors' numbers and against the definition."""

from __future__ import annotations

import numpy as np
import pytest

from promptmix.engine.openworld import openworld_auc
from promptmix.errors import DataError
from tests.trainers.golden import numbers


def by_definition(base, base_right, new, new_right):
    pairs = (base[:, None] > new) + 0.5 * (base[:, None] == new)
    return (pairs * np.outer(base_right, new_right)).mean()


def test_authors_numbers():
    case = numbers("openworldauc_metric")
    right = {side: case[f"{side}_predictions"].argmax(axis=1) == case[f"{side}_labels"] for side in ("base", "new")}
    found = openworld_auc(case["base_score"], right["base"], case["new_score"], right["new"])
    assert found == pytest.approx(float(case["openworldauc"]))
    everything = [np.ones_like(right[side]) for side in ("base", "new")]
    plain = openworld_auc(case["base_score"], everything[0], case["new_score"], everything[1])
    assert plain == pytest.approx(float(case["auroc"]))


def test_definition_with_ties():
    random = np.random.RandomState(0)
    base, new = random.randint(0, 9, 50) / 9, random.randint(0, 9, 70) / 9
    rights = random.rand(50) < 0.7, random.rand(70) < 0.6
    assert openworld_auc(base, rights[0], new, rights[1]) == pytest.approx(by_definition(base, rights[0], new, rights[1]))


def test_pairs_wrong_on_both_sides_never_count():
    assert openworld_auc([0.1, 0.2], [False, False], [0.8, 0.9], [False, False]) == 0.0


@pytest.mark.parametrize("base", [[], [0.1, float("nan")], [0.1]])
def test_what_is_no_pair_of_lists_is_refused(base):
    with pytest.raises(DataError, match="base classes") as refusal:
        openworld_auc(base, [True] * 2 if base else [], [0.5], [True])
    assert "\n" not in str(refusal.value)
