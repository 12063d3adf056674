"""What an evaluation takes over from the run that it evaluates."""

from __future__ import annotations

import json

import pytest

from promptmix.config import get_cfg, merge_opts
from promptmix.errors import ConfigError
from promptmix.runs.from_run import take_from_run
from promptmix.runs.results import RunResult

GROUPS = [["a photo of a {}."], ["art of the {}.", "a rendering of a {}."]]


def config(*opts):
    cfg = get_cfg()
    merge_opts(cfg, ["TRAINER.NAME", "MoCoOp", "DATASET.NAME", "EuroSAT", *opts])
    return cfg


@pytest.fixture
def folder(tmp_path):
    """A run on ImageNet that was told how to read pictures."""
    old = RunResult.from_config(json.loads(json.dumps(config("DATASET.NAME", "ImageNet", "INPUT.READING", "upright"))))
    old.metrics, old.learned_parameters = {"test": {"accuracy": 50.0}}, 10
    old.vocabulary = {"classnames": ["a", "b"], "template_groups": GROUPS}
    old.save(tmp_path)
    return str(tmp_path)


def test_experts_keep_their_groups_and_pictures_their_reading(folder):
    cfg = config()
    take_from_run(cfg, folder)
    assert [list(group) for group in cfg.DATASET.TEMPLATE_GROUPS] == GROUPS
    assert cfg.INPUT.READING == "upright"


def test_what_the_command_says_stands(folder):
    cfg = config("DATASET.TEMPLATE_GROUPS", "(('itap of a {}.',),)", "INPUT.READING", "auto")
    take_from_run(cfg, folder)
    assert cfg.DATASET.TEMPLATE_GROUPS == (("itap of a {}.",),)
    assert cfg.INPUT.READING == "auto"


@pytest.mark.parametrize("where", ["", "nowhere"])
def test_a_folder_without_results_says_nothing(tmp_path, where):
    cfg = config()
    take_from_run(cfg, where and str(tmp_path / where))
    assert cfg == config()


def test_the_same_data_set_has_its_own_groups(folder):
    cfg = config("DATASET.NAME", "ImageNet")
    take_from_run(cfg, folder)
    assert cfg.DATASET.TEMPLATE_GROUPS == ()


LN = "TRAINER.MOCOOP.TUNE_LAYERNORM"


@pytest.fixture
def tuned(tmp_path):
    """A run with settings that nobody would guess."""
    opts = [LN, True, "OPTIM.LR", 0.5, "SEED", 3, "DATASET.NUM_SHOTS", 4, "DATALOADER.TRAIN_X.BATCH_SIZE", 8, "TEST.SPLIT", "val"]
    old = RunResult.from_config(json.loads(json.dumps(config(*opts))))
    old.metrics = {"test": {"accuracy": 50.0}}
    old.save(tmp_path)
    return str(tmp_path)


def test_what_the_tensors_were_made_with_is_taken_over(tuned):
    cfg = config()
    take_from_run(cfg, tuned)
    assert cfg.TRAINER.MOCOOP.TUNE_LAYERNORM is True
    assert (cfg.SEED, cfg.DATASET.NUM_SHOTS, cfg.OPTIM.LR, cfg.DATALOADER.TRAIN_X.BATCH_SIZE) == (3, 4, 0.5, 8)
    assert cfg.TEST.SPLIT == "test"


@pytest.mark.parametrize(("key", "value"), [(LN, False), ("SEED", 2), ("DATASET.NUM_SHOTS", 16), ("TRAINER.PREC", "bf16")])
def test_what_contradicts_the_run_is_refused(tuned, key, value):
    with pytest.raises(ConfigError, match=rf"{key} is {value!r} \(set by command line\), but the run in .* was trained with"):
        take_from_run(config(key, value), tuned)


def test_how_it_was_trained_is_not_the_evaluations_to_say(tuned):
    cfg = config("OPTIM.LR", 0.1, "TRAIN.CLIP_GRAD_NORM", 1.0)
    take_from_run(cfg, tuned)
    assert (cfg.OPTIM.LR, cfg.TRAIN.CLIP_GRAD_NORM) == (0.5, 0.0)


def test_a_setting_that_may_differ_at_test_is_the_commands(tmp_path):
    opts = ("TRAINER.NAME", "MMRLpp", "DATASET.NAME", "ImageNet", "TRAINER.MMRLPP.TASK", "CD")
    old = RunResult.from_config(json.loads(json.dumps(config(*opts, "TRAINER.MMRLPP.REG_WEIGHT", 0.1))))
    old.metrics, old.learned_parameters, old.vocabulary = {"test": {"accuracy": 50.0}}, 10, {"classnames": ["a", "b"]}
    old.save(tmp_path)
    cfg = config("TRAINER.NAME", "MMRLpp", "TRAINER.MMRLPP.BETA", 0.3)
    take_from_run(cfg, str(tmp_path))
    assert (cfg.TRAINER.MMRLPP.BETA, cfg.TRAINER.MMRLPP.TASK, cfg.TRAINER.MMRLPP.REG_WEIGHT) == (0.3, "CD", 0.1)
    with pytest.raises(ConfigError, match=r"TRAINER.MMRLPP.REG_WEIGHT is 2.0 .* was trained with 0.1"):
        take_from_run(config("TRAINER.NAME", "MMRLpp", "TRAINER.MMRLPP.REG_WEIGHT", 2.0), str(tmp_path))
