"""MoPD's configs against the lists and weights of its authors' code."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from promptmix.trainers.mopd import GENERAL, TEACHERS

from promptmix.config import get_cfg, merge_file
from promptmix.config.flags import resolve_config
from tests.trainers.golden import FOLDER
from tests.trainers.toy import toy_trainer

#: Config file of each data set with the authors' W, W2, k and epochs.
WEIGHTS = {
    "imagenet": (0.8, 0.0005, 3, 25),
    "caltech101": (0.8, 0.0005, 3, 100),
    "oxford_pets": (0.8, 0.5, 3, 25),
    "stanford_cars": (0.8, 0.1, 3, 100),
    "oxford_flowers": (0.8, 0.1, 3, 100),
    "food101": (0.5, 0.1, 2, 25),
    "fgvc_aircraft": (0.8, 0.1, 2, 25),
    "sun397": (0.8, 0.1, 2, 25),
    "dtd": (0.8, 0.1, 2, 25),
    "eurosat": (0.5, 0.1, 2, 100),
    "ucf101": (0.5, 0.1, 2, 25),
}


def merged(*paths):
    cfg = get_cfg()
    for path in paths:
        merge_file(cfg, resolve_config(path))
    return cfg


@pytest.mark.parametrize("name", WEIGHTS)
def test_templates_and_weights_are_the_authors(name):
    cfg = merged(f"configs/datasets/{name}.yaml", f"configs/trainers/MoPD/{name}.yaml")
    theirs = json.loads((FOLDER / "mopd_templates.json").read_text(encoding="utf-8"))
    node = cfg.TRAINER.MOPD
    assert not node.TEMPLATES and list(TEACHERS[cfg.DATASET.NAME]) == theirs[cfg.DATASET.NAME]
    assert WEIGHTS[name] == (node.W, node.W2, node.K, cfg.OPTIM.MAX_EPOCH)
    assert (cfg.DATALOADER.TRAIN_X.BATCH_SIZE, cfg.OPTIM.LR, node.T) == (128, 0.002, 1.0)


def test_teachers_follow_the_data_set_whatever_the_config_is_called(room):
    """The authors' scripts name one config for all data sets."""
    for name, opts, expected in (
        ("OxfordPets", (), TEACHERS["OxfordPets"]),
        ("OxfordPets", ("TRAINER.MOPD.TEMPLATES", ["a {}.", "one {}.", "{}"]), ("a {}.", "one {}.", "{}")),
        ("Own", (), GENERAL),
    ):
        trainer = toy_trainer(room, "MoPD", "TRAINER.MOPD.K", 3, *opts)
        trainer.cfg.defrost()
        trainer.cfg.DATASET.NAME = name
        learner = trainer.build_learner(replace(trainer.model.task, templates=("a photo of a {}.",)))
        assert learner.losses["distill"].templates == expected
