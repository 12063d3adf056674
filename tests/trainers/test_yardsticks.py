"""Yardsticks on image features end to end: caches are filled and kept, searches run, other classes are refused."""

from __future__ import annotations

import math

import pytest
import torch
from PIL import Image
from promptmix.trainers.linear_probe import STRENGTHS, choose, fit

from promptmix.cli import main
from promptmix.errors import CheckpointError, ConfigError
from promptmix.predict import load
from tests.trainers.toy import scores, toy_trainer

SMALL = ["DATASET.NUM_SHOTS", "1", "OPTIM.MAX_EPOCH", "1", "VERBOSE", "False"]


def train(name, folder, *opts):
    flags = ["train", "--trainer", name, "--config-file", f"configs/trainers/{name}/tiny.yaml", "--seed", "1"]
    return main([*flags, "--output-dir", str(folder), *SMALL, *opts])


@pytest.mark.parametrize("name", ["TipAdapter", "TipAdapterF"])
def test_a_filled_cache_is_saved_and_loaded(room, name, tmp_path):
    subject = toy_trainer(room, name, "OUTPUT_DIR", str(tmp_path), "OPTIM.MAX_EPOCH", 2)
    before = scores(subject)
    subject.train()
    head = subject.model.head
    assert head.keys.shape[0] == 12 and head.values.sum(dim=0).tolist() == [4.0, 4.0, 4.0]
    if name == "TipAdapter":
        torch.testing.assert_close(head.keys.norm(dim=-1), torch.ones(12))
    assert not torch.equal(scores(subject), before)
    again = toy_trainer(room, name, seed=2)
    again.model.head.keys.data = again.model.head.keys.data[:5]  # sizes follow the checkpoint
    again.load_model(str(tmp_path), epoch=2)
    assert torch.equal(scores(again), scores(subject))


def test_alpha_and_beta_are_searched_and_kept(room, tmp_path):
    found = ["TRAINER.TIPADAPTER.SEARCH_SCALE", (7.0, 3.0), "TRAINER.TIPADAPTER.SEARCH_STEP", (3, 3)]
    subject = toy_trainer(room, "TipAdapter", *found, "OUTPUT_DIR", str(tmp_path), "OPTIM.MAX_EPOCH", 1)
    subject.train()
    head = subject.model.head
    grid = {round(i * (end - 0.1) / 3 + 0.1, 4) for end in (7.0, 3.0) for i in range(3)}
    assert {round(head.alpha.item(), 4), round(head.beta.item(), 4)} <= grid
    again = toy_trainer(room, "TipAdapter")
    again.load_model(str(tmp_path), epoch=1)
    assert again.model.head.alpha == head.alpha and again.model.head.beta == head.beta


def test_a_search_needs_val_pictures_and_no_choice_of_epochs(room):
    scale = ["TRAINER.TIPADAPTER.SEARCH_SCALE", (7.0, 3.0)]
    with pytest.raises(ConfigError, match=r"TRAINER.TIPADAPTER.SEARCH_SCALE searches on the val part"):
        toy_trainer(room, "TipAdapter", *scale, "TEST.FINAL_MODEL", "best_val")
    with pytest.raises(ConfigError, match=r"SEARCH_SCALE is \[7.0\], but must be"):
        toy_trainer(room, "TipAdapter", "TRAINER.TIPADAPTER.SEARCH_SCALE", (7.0,))
    subject = toy_trainer(room, "TipAdapter", *scale)
    subject.val_loader = None
    with pytest.raises(ConfigError, match=r"SEARCH_SCALE needs val pictures"):
        subject.train()


@pytest.mark.parametrize(
    ("name", "what"), [("TipAdapter", "a cache of pictures"), ("TaskRes", "a residual"), ("LinearProbe", "weights")]
)
def test_predicts_its_own_classes_and_refuses_others(tmp_path, name, what):
    assert train(name, tmp_path / "base", "TEST.NO_TEST", "True") == 0
    assert list(tmp_path.glob("base/prompt_learner/model.pth.tar-1"))  # the command trains where only prepare() learns
    predictor = load(tmp_path / "base")
    picture = torch.rand(64, 64, 3).mul(255).byte().numpy()

    (found,) = predictor.predict(Image.fromarray(picture))
    assert set(found.classnames) == set(predictor.classnames) and sum(found.probabilities) == pytest.approx(1.0, abs=1e-4)
    with pytest.raises(CheckpointError, match=f"learned {what} for each of its own"):
        predictor.predict(Image.fromarray(picture), ["one", "two"])
    evaluate = ["train", "--trainer", name, "--config-file", f"configs/trainers/{name}/tiny.yaml", "--eval-only", "--debug"]
    evaluate += ["--model-dir", str(tmp_path / "base"), "--load-epoch", "1", "--output-dir", str(tmp_path / "new"), *SMALL]
    with pytest.raises(CheckpointError, match=f"learned {what} for each of its own"):
        main([*evaluate, "DATASET.SUBSAMPLE_CLASSES", "new"])


def test_logistic_regression_is_at_its_minimum():
    """The gradient of |W|^2 / 2 + C sum of cross-entropies is zero there; for C 1 that is -W for the data's part."""
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(30, 6, generator=generator), torch.arange(30) % 3
    for strength in (0.01, 1.0, 100.0):
        weight, bias = fit(features, labels, 3, strength)
        error = (features @ weight.T + bias).softmax(dim=-1) - torch.nn.functional.one_hot(labels, 3)
        assert ((weight + strength * error.T @ features) / (strength * 30)).abs().max() < 2e-4
        assert error.mean(dim=0).abs().max() < 2e-4


def test_strength_is_searched_as_coop_does():
    assert choose(lambda c: 1.0, 0) == STRENGTHS[0]  # the first best wins
    assert choose(lambda c: 1.0, 1) == pytest.approx(1e5)  # a tie keeps the smaller side
    assert choose(lambda c: -abs(math.log10(c) - 2.5), 8) == pytest.approx(10**2.5, rel=0.05)


@pytest.mark.parametrize("features", ["projected", "unprojected"])
def test_a_fitted_probe_is_saved_and_loaded(room, features, tmp_path):
    opts = ["TRAINER.LINEARPROBE.FEATURES", features, "OPTIM.MAX_EPOCH", 1]
    subject = toy_trainer(room, "LinearProbe", *opts, "OUTPUT_DIR", str(tmp_path))
    subject.train()
    assert subject.model.head.weight.abs().max() > 0
    again = toy_trainer(room, "LinearProbe", *opts)
    again.load_model(str(tmp_path), epoch=1)
    assert torch.equal(scores(again), scores(subject))
    subject = toy_trainer(room, "LinearProbe", *opts)
    subject.val_loader = None
    with pytest.raises(ConfigError, match=r"TRAINER.LINEARPROBE.C is 0"):
        subject.train()


def test_features_of_small_norm_are_fitted_too():
    features, labels = 1e-3 * torch.eye(6), torch.arange(6)
    weight, bias = fit(features, labels, 6, 1e6)
    assert ((features @ weight.T + bias).argmax(dim=-1) == labels).all()


def test_clap_takes_its_multipliers_without_a_graph(room, tmp_path):
    subject = toy_trainer(room, "CLAP", "TRAINER.CLAP.VIEWS", 1, "OPTIM.MAX_EPOCH", 2, "OUTPUT_DIR", str(tmp_path))
    subject.train()
    multipliers = subject.model.losses.constraint.multipliers
    assert not multipliers.requires_grad and 0 < multipliers.max() < 1
