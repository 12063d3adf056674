"""Made data for sweeps: two small folders of pictures, and a sweep of three methods over them, two seeds, base to new."""

import argparse
import importlib
import multiprocessing
import os
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from promptmix.commands import sweep as flags_of_sweep
from promptmix.runs import backends, results
from promptmix.runs.sweep import read
from tests.forked import Forked, command

ROOT = Path(__file__).resolve().parent.parent.parent
CLASSES = ("apple", "bird", "car", "dog")
METHODS = ("ZeroshotCLIP", "CoOp", "KgCoOp")
#: Data sets, and the seeds of their pictures.
DATASETS = {"paints": 1, "prints": 2}
SEEDS = (1, 2)
#: Small enough that a run takes a fraction of a second.
SETTINGS = {
    "INPUT.SIZE": [32, 32],
    "INPUT.CACHED_VIEWS": 1,
    "OPTIM.MAX_EPOCH": 2,
    "OPTIM.WARMUP_EPOCH": -1,
    "OPTIM.LR": 0.1,
    "DATALOADER.TRAIN_X.BATCH_SIZE": 2,
}


def make_pictures(folder, seed):
    """Write class folders: each class has a colour of its own, under noise, so that accuracies lie between chance and all."""
    draw = np.random.default_rng(seed)
    for name in CLASSES:
        colour = draw.integers(0, 256, 3)
        for part, count in (("train", 3), ("test", 4)):
            (folder / part / name).mkdir(parents=True)
            for number in range(count):
                noise = draw.integers(-90, 90, (16, 16, 3))
                pixels = np.clip(colour + noise, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{number}.png")


def make_sweep(folder, output, **more):
    """Write the data, if it isn't there, and a sweep file; return its path."""
    for name, seed in DATASETS.items():
        if not (folder / "data" / name).exists():
            make_pictures(folder / "data" / name, seed)
            tree = {"DATASET": {"NAME": "ImageFolder", "IMAGEFOLDER": {"FOLDER": name}}}
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    tree = {
        "output": str(output),
        "protocols": ["base-to-new"],
        "trainers": list(METHODS),
        "datasets": [f"{name}.yaml" for name in DATASETS],
        "seeds": list(SEEDS),
        "shots": [2],
        "root": "data",
        "config": "configs/quickstart.yaml",
        "set": SETTINGS,
    } | more
    path = folder / f"{Path(output).name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def start(path, *flags, work=None):
    """Start a sweep file in a process of its own."""
    return Forked(["sweep", str(path), "--threads", "1", *flags], path.parent, os.environ | {"OMP_NUM_THREADS": "1"}, work)


def from_itself(argv):
    """Run a command whose jobs are forked from it, which has what a process to fork them from would import first."""
    from promptmix.prompts import trainer
    from promptmix.runs import backends
    from tests.backbones import Kept

    for name in backends._PRELOAD:
        importlib.import_module(name)
    backends._context = lambda: multiprocessing.get_context("fork")
    trainer.load_clip = Kept(trainer.load_clip)  # for the second part of a job
    return command(argv)


def sweep(path, *flags):
    """Run a sweep file in a process of its own."""
    done = start(path, *flags, work=from_itself)
    done.wait()
    return done


def numbers(output):
    """Return every number of a results tree, by method, data set, classes and seed."""
    runs, notes = results.find(output)
    assert not notes
    return {(run.trainer, run.title, run.subsample_classes, run.seed): run.metrics for run in runs}


def jobs(*trainers):
    """Return jobs that differ by their method."""
    return [backends.Job("base-to-new", trainer, "EmojiFamilies", f"out/{trainer}", 1) for trainer in trainers]


def options_of(tmp_path, flags, **more):
    """Return what the flags of ``promptmix sweep`` come to."""
    plan = read(str(make_sweep(tmp_path, tmp_path / "out", **more)))
    parser = argparse.ArgumentParser()
    flags_of_sweep.add_arguments(parser)
    return flags_of_sweep._options(parser.parse_args(["sweep.yaml", *flags], argparse.Namespace(argv=[])), plan)
