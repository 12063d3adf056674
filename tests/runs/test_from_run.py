"""What an evaluation takes over from the run that it evaluates."""

from __future__ import annotations

import json

import pytest

from promptmix.config import get_cfg, merge_opts
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
