"""What the prompt trainer itself does: cached views, layer-norm tuning, text encoded once, on the embedded backbones."""

from __future__ import annotations

import pytest
import torch

from promptmix.cli import main
from promptmix.config import validate
from promptmix.config.flags import make_config
from promptmix.data.features.views import CachedViews
from promptmix.engine import build_trainer, set_random_seed
from promptmix.errors import CheckpointError, ConfigError

SMALL = ["DATASET.NUM_SHOTS", "1", "OPTIM.MAX_EPOCH", "2", "DATALOADER.TRAIN_X.BATCH_SIZE", "8", "VERBOSE", "False"]
TINY_VIT = ["MODEL.BACKBONE.NAME", "tiny-vit", "INPUT.SIZE", "(64, 64)"]


def trainer(tmp_path, name, *opts):
    cfg = make_config(["configs/quickstart.yaml"], {}, ["TRAINER.NAME", name, "OUTPUT_DIR", str(tmp_path), *SMALL, *opts])
    validate(cfg)
    set_random_seed(1)
    return build_trainer(cfg)


def learned(subject):
    return torch.cat([parameter.detach().flatten() for parameter in subject.model.parameters()])


def test_one_cached_view_of_plain_pictures_is_the_uncached_run(tmp_path):
    finals = []
    for views in ("0", "1"):
        subject = trainer(tmp_path / views, "CoOp", "INPUT.CACHED_VIEWS", views, "TEST.NO_TEST", "True")
        subject.train()
        assert isinstance(subject.train_loader_x.dataset, CachedViews) == (views == "1")
        finals.append(learned(subject))
    torch.testing.assert_close(*finals, rtol=1e-5, atol=1e-6)


def test_views_take_turns_by_epoch(tmp_path):
    opts = ["INPUT.TRANSFORMS", "['random_resized_crop', 'normalize']", "INPUT.CACHED_VIEWS", "2"]
    subject = trainer(tmp_path, "CoOp", *opts)
    subject.before_train()
    views = subject.train_loader_x.dataset
    assert views.features.shape == (2, len(views.items), 128)
    assert not torch.equal(*views.features)
    seen = []
    for subject.epoch in range(3):
        subject.before_epoch()
        seen.append(views[0]["img"])
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[1])


def test_layer_norms_learn_at_a_tenth(tmp_path):
    opts = ["TRAINER.MOCOOP.TUNE_LAYERNORM", "True", "INPUT.CACHED_VIEWS", "0", *TINY_VIT]
    subject = trainer(tmp_path, "MoCoOp", *opts, "OPTIM.WARMUP_EPOCH", "0", "TEST.NO_TEST", "True")
    before = {name: value.clone() for name, value in subject.clip.state_dict().items()}
    assert subject.get_current_lr("image_norms") == pytest.approx(0.1 * subject.get_current_lr("prompt_learner"))
    subject.train()
    moved = {name for name, value in subject.clip.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and all(name.rsplit(".", 1)[0].endswith(("ln_1", "ln_2")) and "visual" in name for name in moved)
    again = trainer(tmp_path, "MoCoOp", *opts)
    again.load_model(str(tmp_path), epoch=2)
    assert all(torch.equal(value, again.clip.state_dict()[name]) for name, value in subject.clip.state_dict().items())


def test_layer_norm_tuning_refuses_cached_views_and_towers_without_layers(tmp_path):
    tune = ["TRAINER.MOCOOP.TUNE_LAYERNORM", "True"]
    with pytest.raises(ConfigError, match=r"INPUT.CACHED_VIEWS is 1, but MoCoOp trains the image side"):
        trainer(tmp_path, "MoCoOp", *tune, *TINY_VIT).train()
    with pytest.raises(ConfigError, match=r"tiny-en has no ln_1 and ln_2 in its layers"):
        trainer(tmp_path, "MoCoOp", *tune)


@pytest.mark.parametrize("name", ["CoOp", "MoCoOp", "ZeroshotCLIP"])
def test_text_is_encoded_once_per_evaluation(tmp_path, name, monkeypatch):
    subject = trainer(tmp_path, name, "DATALOADER.TEST.BATCH_SIZE", "20")
    calls = []
    original = subject.model.classifier
    monkeypatch.setattr(subject.model, "classifier", lambda: calls.append(1) or original())
    subject.test()
    assert len(subject.test_loader) > 2 and len(calls) == 1
    subject.test()  # weights may have moved since
    assert len(calls) == 2


def test_pictures_prepared_for_another_model_are_warned_about(tmp_path, capsys):
    trainer(tmp_path, "ZeroshotCLIP", "INPUT.PIXEL_MEAN", "[0.1, 0.1, 0.1]")
    assert "INPUT.PIXEL_MEAN is [0.1, 0.1, 0.1], but backbone tiny-en was trained with [0.5, 0.5, 0.5]" in capsys.readouterr().out


def test_class_specific_contexts_serve_their_own_classes_only(tmp_path):
    """Ten base and ten new classes would fit each other's tensors."""
    flags = ["train", "--trainer", "CoOp", "--config-file", "configs/quickstart.yaml", "--seed", "1"]
    opts = [*SMALL, "TRAINER.COOP.CSC", "True", "TRAINER.COOP.CTX_INIT", "", "DATASET.NAME", "EmojiConcepts"]
    opts += ["DATASET.EMOJI.NUM_CONCEPTS", "20", "OPTIM.MAX_EPOCH", "1"]
    assert (
        main([*flags, "--output-dir", str(tmp_path / "base"), *opts, "DATASET.SUBSAMPLE_CLASSES", "base", "TEST.NO_TEST", "True"])
        == 0
    )
    evaluate = [*flags, "--output-dir", str(tmp_path / "new"), "--eval-only", "--model-dir", str(tmp_path / "base")]
    evaluate += ["--load-epoch", "1"]
    with pytest.raises(CheckpointError, match=r"each of its own 10 classes"):
        main([*evaluate, "--debug", *opts, "DATASET.SUBSAMPLE_CLASSES", "new"])
    assert main([*evaluate, *opts, "DATASET.SUBSAMPLE_CLASSES", "base"]) == 0
