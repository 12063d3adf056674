"""The config tree: merging, refusing, remembering who set what."""

from __future__ import annotations

import pytest

from promptmix.config import get_cfg, get_cfg_default, merge_file, merge_opts, merge_tree, source_of, validate
from promptmix.errors import ConfigError, RegistryError


@pytest.fixture
def cfg():
    tree = get_cfg()
    merge_opts(tree, ["TRAINER.NAME", "CoOp", "DATASET.NAME", "EmojiFamilies"], source="test")
    return tree


def test_dassl_defaults():
    tree = get_cfg_default()
    assert (tree.INPUT.SIZE, tree.OPTIM.NAME, tree.OPTIM.LR, tree.OPTIM.STEPSIZE) == ((224, 224), "adam", 0.0003, (-1,))
    assert (tree.TEST.FINAL_MODEL, tree.TRAIN.PRINT_FREQ, tree.DATALOADER.NUM_WORKERS) == ("last_step", 10, 4)


@pytest.mark.parametrize(
    ("opts", "words"),
    [
        (["OPTIM.LRR", "0.1"], r"unknown config key 'OPTIM.LRR'; did you mean 'LR'\? \(keys under OPTIM: NAME, LR"),
        (["OPTIMM.LR", "0.1"], "did you mean 'OPTIM'.*at the top of the tree"),
        (["OPTIM.LR"], "has no value"),
        (["OPTIM.LR", "fast"], r"OPTIM.LR is 'fast' \(str\), but must be a float such as 0.0003"),
        (["OPTIM.MAX_EPOCH", "1.5"], "must be an int"),
        (["OPTIM.LR", "None"], "empty"),
        (["OPTIM", "3"], "group of keys"),
        (["OPTIM.LR.X", "3"], "unknown config key"),
    ],
)
def test_wrong_overrides(cfg, opts, words):
    with pytest.raises(ConfigError, match=words):
        merge_opts(cfg, opts)


def test_a_tree_of_keys_is_one(cfg):
    with pytest.raises(ConfigError, match="x is .1.; give a tree of keys"):
        merge_tree(cfg, [1], "x")


def test_types_that_yaml_blurs(cfg):
    merge_opts(cfg, ["OPTIM.LR", "1", "OPTIM.WEIGHT_DECAY", "1e-3", "INPUT.SIZE", "[64, 64]", "DATASET.ROOT", "2024"])
    assert (cfg.OPTIM.LR, cfg.OPTIM.WEIGHT_DECAY, cfg.INPUT.SIZE, cfg.DATASET.ROOT) == (1.0, 0.001, (64, 64), "2024")
    assert isinstance(cfg.OPTIM.LR, float)


def test_files_build_on_files_and_sources_are_known(cfg, tmp_path):
    (tmp_path / "base.yaml").write_text("OPTIM: {LR: 0.1, MAX_EPOCH: 3}\n")
    (tmp_path / "run.yaml").write_text("_BASE_: base.yaml\nOPTIM: {LR: 0.2}\n")
    merge_file(cfg, tmp_path / "run.yaml")
    assert (cfg.OPTIM.LR, cfg.OPTIM.MAX_EPOCH) == (0.2, 3)
    assert source_of(cfg, "OPTIM.LR").endswith("run.yaml")
    assert source_of(cfg, "OPTIM.MAX_EPOCH").endswith("base.yaml")
    assert source_of(cfg, "OPTIM.GAMMA") is None
    assert source_of(cfg.clone(), "OPTIM.LR").endswith("run.yaml")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("OPTIM: {LR: }\n", "OPTIM.LR is empty"),
        ("- a\n", "holds a list, but must hold keys"),
        ("a: [\n", "not valid YAML"),
        ("a: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
        ("_BASE_: nowhere.yaml\n", "nowhere.yaml: No such file"),
    ],
)
def test_wrong_files(cfg, tmp_path, text, words):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=words):
        merge_file(cfg, tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("opts", "error", "words"),
    [
        (["TRAINER.NAME", "CoOpp"], RegistryError, "did you mean 'CoOp'"),
        (["DATASET.NAME", "Emoji"], RegistryError, "unknown dataset"),
        (["DATASET.SUBSAMPLE_CLASSES", "bases"], ConfigError, "choose from 'all', 'base', 'new'"),
        (["TRAINER.MOCOOP.TEXT_WEIGHT", "1"], ConfigError, r"would be ignored: CoOp reads TRAINER\.COOP"),
        (["ROUTER.TOPK.K", "1"], ConfigError, "CoOp reads no key under ROUTER"),
        (["ROUTER.NAME", "TopK"], ConfigError, "CoOp has no such role"),
        (["TRAINER.COOP.CTX_INIT", "a photo of a", "TRAINER.COOP.N_CTX", "8"], ConfigError, "N_CTX 8 would be ignored"),
    ],
)
def test_what_validation_refuses(cfg, opts, error, words):
    merge_opts(cfg, opts)
    with pytest.raises(error, match=words):
        validate(cfg)


@pytest.mark.parametrize("trainer", ["CoOp", "MoCoOp", "ZeroshotCLIP"])
def test_a_file_for_several_methods_serves_each(cfg, tmp_path, trainer):
    (tmp_path / "run.yaml").write_text("TRAINER: {COOP: {N_CTX: 4}, MOCOOP: {TEXT_WEIGHT: 1.0}}\n")
    merge_file(cfg, tmp_path / "run.yaml")
    merge_opts(cfg, ["TRAINER.NAME", trainer])
    validate(cfg)


def test_a_shared_file_stays_shared_when_a_key_of_it_is_overridden(cfg, tmp_path):
    (tmp_path / "run.yaml").write_text("TRAINER: {COOP: {N_CTX: 4}, MOCOOP: {TEXT_WEIGHT: 1.0}}\n")
    merge_file(cfg, tmp_path / "run.yaml")
    merge_opts(cfg, ["TRAINER.COOP.N_CTX", "8"])
    validate(cfg)


def test_a_file_for_another_method_is_refused(cfg, tmp_path):
    (tmp_path / "run.yaml").write_text("TRAINER: {MOCOOP: {TEXT_WEIGHT: 1.0}}\n")
    merge_file(cfg, tmp_path / "run.yaml")
    with pytest.raises(ConfigError, match="would be ignored"):
        validate(cfg)


@pytest.mark.parametrize("source", ["results.json", "mine.yaml"])
def test_a_key_that_is_gone_says_what_to_write_instead(source):
    """Old records hold it at its default, where it said nothing."""
    cfg, old = get_cfg(), {"PROMPT_BANK": {"TEMPLATEGROUPS": {"TEMPLATES": [], "GROUPS": []}}}
    if source == "results.json":
        merge_tree(cfg, old, source)
        old["PROMPT_BANK"]["TEMPLATEGROUPS"]["TEMPLATES"] = ["a photo of a {}."]
    with pytest.raises(ConfigError, match=r"TEMPLATEGROUPS.TEMPLATES is gone: .*DATASET.TEMPLATE_GROUPS"):
        merge_tree(cfg, old, source)
