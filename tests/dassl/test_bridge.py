"""promptmix's trainers under a real Dassl's registry and data manager (here a stand-in with its interfaces)."""

from __future__ import annotations

import importlib
import logging
import sys
from pathlib import Path

import pytest
import torch

import promptmix.dassl as pm
from promptmix.errors import ConfigError, PluginError
from promptmix.registry import TRAINER_REGISTRY
from tests.trainers import toy


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bridge")
    toy.draw(folder / "toy")
    toy.write_backbone(folder / "clip.safetensors")
    return folder


@pytest.fixture
def dassl(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent / "standin"))
    yield importlib.import_module("dassl.engine")
    for name in [name for name in sys.modules if name.split(".")[0] == "dassl"]:
        del sys.modules[name]
    logging.disable(logging.NOTSET)


def extend_cfg(room, trainer):
    """What a CoOp-style `train.py` does, with the one line more."""
    cfg = importlib.import_module("dassl.config").get_cfg_default()
    cfg.TRAINER.COOP = type(cfg)({"N_CTX": 16, "PREC": "fp16"})
    cfg.DATASET.SUBSAMPLE_CLASSES = "base"

    pm.register(cfg)  # the line

    cfg.TRAINER.NAME, cfg.OUTPUT_DIR = trainer, str(room / f"out-{trainer}")
    cfg.DATASET.NAME, cfg.DATASET.ROOT = "OxfordPets", str(room)
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.WEIGHTS = "ViT-B/16", str(room / "clip.safetensors")
    cfg.INPUT.SIZE, cfg.DATALOADER.TRAIN_X.BATCH_SIZE = (32, 32), 4
    cfg.OPTIM.NAME, cfg.OPTIM.LR, cfg.OPTIM.MAX_EPOCH, cfg.USE_CUDA = "sgd", 0.002, 1, False
    cfg.freeze()
    return cfg


@pytest.mark.parametrize("name", ["CoOp", "MoCoOp", "MaPLe", "KgCoOp"])
def test_ours_train_under_dassl(room, dassl, name):
    cfg = extend_cfg(room, name)
    torch.manual_seed(0)
    trainer = dassl.build_trainer(cfg)
    assert isinstance(trainer.dm, importlib.import_module("dassl.data").DataManager)
    assert trainer.dm.dataset.templates[0] == "a photo of a {}, a type of pet."
    trainer.train()
    assert set(trainer.last_results["test"]) >= {"accuracy", "macro_f1"}
    trainer.load_model(cfg.OUTPUT_DIR, epoch=1)
    assert cfg.DATASET.SUBSAMPLE_CLASSES == "base"  # the program's own values stay


def test_cached_views_work_on_dassls_loader(room, dassl):
    cfg = extend_cfg(room, "CoOp")
    cfg.defrost()
    cfg.INPUT.CACHED_VIEWS, cfg.OUTPUT_DIR = 1, str(room / "out-views")
    trainer = dassl.build_trainer(cfg)
    trainer.train()
    assert next(iter(trainer.train_loader_x))["img"].shape == (4, 64)  # features, not pictures


def test_every_shipped_config_merges_into_a_tree_of_dassls(room, dassl):
    """By yacs itself, which knows no _BASE_ and takes no 15 for 15.0."""
    cfg = importlib.import_module("dassl.config").get_cfg_default()
    cfg.DATASET.SUBSAMPLE_CLASSES = "all"
    pm.register(cfg)
    folder = Path(__file__).resolve().parents[2] / "configs" / "trainers"
    files = [file for file in folder.glob("*/*.yaml") if not file.name.startswith("_")]
    assert len(files) > 50
    tree = cfg.clone()
    for file in [*files, folder / "CoOp" / "vit_b16_ep50.yaml"]:  # the last is a name in a table
        tree.merge_from_file(str(file))
    tree = cfg.clone()
    tree.merge_from_file(str(folder / "PromptSRC" / "base_to_new.yaml"))
    assert tree.TRAINER.PROMPTSRC.GPA_MEAN == 15.0 and tree.OPTIM.LR != cfg.OPTIM.LR
    assert cfg.TRAINER.PROMPTSRC.GPA_MEAN != 15.0 or cfg.OPTIM.LR != tree.OPTIM.LR  # clones don't share


def test_the_programs_own_yaml_is_read_as_before(room, dassl, tmp_path):
    cfg = importlib.import_module("dassl.config").get_cfg_default()
    cfg.DATASET.SUBSAMPLE_CLASSES = "all"
    pm.register(cfg)
    (tmp_path / "own.yaml").write_text("INPUT:\n  SIZE: (24, 24)\nOPTIM:\n  LR: 0.5\n")
    cfg.merge_from_file(str(tmp_path / "own.yaml"))
    assert cfg.INPUT.SIZE == (24, 24) and cfg.OPTIM.LR == 0.5
    (tmp_path / "wrong.yaml").write_text("OPTIM:\n  LRR: 0.5\n")
    with pytest.raises(KeyError, match="OPTIM.LRR"):
        cfg.merge_from_file(str(tmp_path / "wrong.yaml"))


def test_the_programs_own_trainers_stay(room, dassl, capsys):
    class CoOp:
        pass

    dassl.TRAINER_REGISTRY.register(CoOp)
    cfg = importlib.import_module("dassl.config").get_cfg_default()
    cfg.TRAINER.COOP = type(cfg)({"PREC": "fp16"})
    names = pm.register(cfg)
    assert "CoOp" not in names and "MoCoOp" in names
    assert dassl.TRAINER_REGISTRY.get("CoOp") is CoOp and dict(cfg.TRAINER.COOP) == {"PREC": "fp16"}
    assert "CoOp stay as this program defines them" in capsys.readouterr().out
    assert "CoOp" in pm.register(cfg, replace=True)
    assert cfg.TRAINER.COOP.PREC == "fp16" and cfg.TRAINER.COOP.N_CTX == 16
    assert set(pm.register(cfg)) == set(TRAINER_REGISTRY)  # twice is fine


def test_settings_are_checked(room, dassl):
    cfg = extend_cfg(room, "MaPLe")
    cfg.defrost()
    cfg.TRAINER.MAPLE.PROMPT_DEPTH = 0
    with pytest.raises(ConfigError, match=r"TRAINER.MAPLE.PROMPT_DEPTH is 0"):
        dassl.build_trainer(cfg)


def test_misuse_is_named(dassl):
    cfg = importlib.import_module("dassl.config").get_cfg_default()
    cfg.freeze()
    with pytest.raises(ConfigError, match=r"call it before cfg.freeze\(\)"):
        pm.register(cfg)


def test_without_a_real_dassl():
    from promptmix.config import get_cfg_default

    with pytest.raises(PluginError, match=r"needs a real Dassl.*--coop-repo PATH"):
        pm.register(get_cfg_default())
    with pm.installed(), pytest.raises(PluginError, match="registered already; leave the call out"):
        pm.register(get_cfg_default())
