"""OpenworldAUC against its authors' numbers and against the definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from promptmix.config import get_cfg
from promptmix.engine import build_evaluator
from promptmix.engine.openworld import openworld_auc
from promptmix.errors import ConfigError, DataError, TrainingError
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


def evaluator(classes="open"):
    cfg = get_cfg()
    cfg.TEST.EVALUATOR, cfg.DATASET.SUBSAMPLE_CLASSES = "OpenWorld", classes
    return build_evaluator(cfg)


def test_evaluator_gives_the_authors_numbers():
    case = numbers("openworldauc_metric")
    base, new = (torch.from_numpy(case[f"{side}_predictions"]) for side in ("base", "new"))
    found = evaluator()
    with pytest.raises(DataError, match="nothing to evaluate"):
        found.evaluate()
    scores = torch.full((16, 8), -9.0)  # 4 base names, the last of which nobody has, and 4 new ones
    scores[:7, :3], scores[7:, 4:] = base.float(), new.float()
    labels = torch.tensor([*case["base_labels"], *(case["new_labels"] + 4)]).long()
    ranks = torch.tensor([*case["base_score"], *case["new_score"]])
    for part in (slice(0, 10), slice(10, 16)):
        found.process(scores[part], labels[part], ranks[part])
    results = found.evaluate()
    assert next(iter(results)) == "openworld_auc"
    for ours, theirs in (("openworld_auc",) * 2, ("base_accuracy",) * 2, ("new_accuracy",) * 2, ("auroc",) * 2):
        assert results[ours] == pytest.approx(100 * float(case[theirs.replace("_auc", "auc")]))


def test_evaluator_ranks_by_the_largest_probability_of_a_base_name_and_refuses_what_it_cannot_rank():
    torch.manual_seed(0)
    scores, labels = torch.randn(40, 5), torch.arange(40) % 5
    given, own = evaluator(), evaluator()
    given.process(scores, labels, scores.softmax(dim=1)[:, :3].amax(dim=1))
    own.process(scores, labels)
    assert own.evaluate() == given.evaluate()
    own.process(scores * float("nan"), labels)
    with pytest.raises(TrainingError, match="NaN"):
        own.evaluate()
    with pytest.raises(ConfigError, match="SUBSAMPLE_CLASSES is 'all'.*open"):
        evaluator("all")
