"""The evaluator's numbers against scikit-learn's, its lines against Dassl's."""

import numpy as np
import pytest
import torch

from promptmix.config import get_cfg_default
from promptmix.engine import build_evaluator, compute_accuracy
from promptmix.errors import ConfigError, DataError, RegistryError


@pytest.fixture
def cfg(tmp_path):
    cfg = get_cfg_default()
    cfg.OUTPUT_DIR = str(tmp_path / "out")
    return cfg


def answers(count=400, classes=6, seed=0):
    """Uneven labels; class 4 is never true, class 5 rarely guessed."""
    rng = np.random.default_rng(seed)
    true = rng.choice([0, 0, 0, 1, 1, 2, 3, 5], size=count)
    scores = rng.normal(size=(count, classes))
    scores[np.arange(count), true] += 1.0
    return torch.tensor(scores), torch.tensor(true)


def evaluate(cfg, scores, true, batch=64, **kwargs):
    evaluator = build_evaluator(cfg, **kwargs)
    for start in range(0, len(true), batch):
        evaluator.process(scores[start : start + batch], true[start : start + batch])
    return evaluator.evaluate()


@pytest.mark.parametrize("seed", range(4))
def test_numbers_agree_with_sklearn(cfg, seed):
    from sklearn.metrics import balanced_accuracy_score, f1_score  # here, so that other processes of the suite need not

    scores, true = answers(seed=seed)
    predicted = scores.argmax(1)
    results = evaluate(cfg, scores, true)
    accuracy = 100 * (predicted == true).double().mean().item()
    f1 = 100 * f1_score(true, predicted, average="macro", labels=np.unique(true))
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        balanced = 100 * balanced_accuracy_score(true, predicted)
    assert list(results) == ["accuracy", "error_rate", "macro_f1", "macro_accuracy"]
    assert list(results.values()) == pytest.approx([accuracy, 100 - accuracy, f1, balanced])
    assert all(type(value) is float for value in results.values())


def test_lines_are_dassls(cfg, capsys):
    cfg.VERBOSE = False
    cfg.TEST.PER_CLASS_RESULT = True
    true = torch.tensor([0] * 1000 + [2] * 234)
    scores = torch.zeros(1234, 3)
    scores[:900, 0] = 1
    scores[900:1134, 1] = 1
    scores[1134:, 2] = 1
    results = evaluate(cfg, scores, true, lab2cname={0: "ant", 1: "bee", 2: "cat"})
    assert capsys.readouterr().out.splitlines() == [
        "=> result",
        "* total: 1,234",
        "* correct: 1,000",
        "* accuracy: 81.0%",
        "* error: 19.0%",
        "* macro_f1: 77.3%",
        "* macro_acc: 66.4%",
        "=> per-class result",
        "* class: 0 (ant)\ttotal: 1,000\tcorrect: 900\tacc: 90.0%",
        "* class: 2 (cat)\ttotal: 234\tcorrect: 100\tacc: 42.7%",
        "* average: 66.4%",
    ]
    assert results["perclass_accuracy"] == pytest.approx(66.367521)


def test_confusion_matrix_is_sklearns_and_holds_no_code(cfg, tmp_path):
    from sklearn.metrics import confusion_matrix  # here, so that other processes of the suite need not

    cfg.TEST.COMPUTE_CMAT = True
    scores, true = answers()
    evaluate(cfg, scores, true)
    saved = torch.load(tmp_path / "out" / "cmat.pt", weights_only=True)
    assert np.allclose(saved, confusion_matrix(true, scores.argmax(1), normalize="true"))


def test_reset_forgets(cfg):
    scores, true = answers()
    evaluator = build_evaluator(cfg)
    evaluator.process(scores, true)
    evaluator.reset()
    evaluator.process(torch.eye(3), torch.tensor([0, 1, 0]))
    assert evaluator.evaluate()["accuracy"] == pytest.approx(200 / 3)


def test_nothing_to_evaluate_is_an_error(cfg):
    with pytest.raises(DataError, match="nothing to evaluate"):
        build_evaluator(cfg).evaluate()


def test_per_class_results_need_names(cfg):
    cfg.TEST.PER_CLASS_RESULT = True
    with pytest.raises(ConfigError, match="PER_CLASS_RESULT"):
        build_evaluator(cfg)


def test_unknown_evaluator_lists_choices(cfg):
    cfg.TEST.EVALUATOR = "Clasification"
    with pytest.raises(RegistryError, match="did you mean 'Classification'"):
        build_evaluator(cfg)


def test_compute_accuracy_top_k():
    output = torch.tensor([[0.1, 0.7, 0.2], [0.6, 0.3, 0.1], [0.2, 0.5, 0.3]])
    target = torch.tensor([1, 1, 0])
    top1, top2 = compute_accuracy((output,), target, topk=(1, 2))
    assert top1.shape == (1,)
    assert (top1.item(), top2.item()) == (pytest.approx(100 / 3), pytest.approx(200 / 3))
    assert compute_accuracy(output, target, topk=(5,))[0].item() == 100
