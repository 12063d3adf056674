"""A made checkout of CoOp that tests change, run, and look at."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from promptmix.cli import main

HERE = Path(__file__).resolve().parent


def make(tmp_path):
    """Return a folder with a checkout to change, its data and the weights of its model."""
    shutil.copytree(HERE / "checkout", tmp_path / "fork")
    generator = torch.Generator().manual_seed(0)
    state = {"visual.weight": torch.randn(4, 3, generator=generator), "words.weight": torch.randn(128, 4, generator=generator)}
    (tmp_path / "weights").mkdir()
    torch.save(state, tmp_path / "weights" / "tiny.pt")
    torch.save({name: 0 * value for name, value in state.items()}, tmp_path / "weights" / "large.pt")
    return tmp_path


def change(room, file, *pairs):
    path = room / "fork" / file
    text = path.read_text()
    for old, new in pairs:
        assert old in text, old
        text = text.replace(old, new)
    path.write_text(text)


def command(room, *flags, trainer="WordBias", weights="weights/tiny.pt"):
    pairs = ("MODEL.BACKBONE.WEIGHTS", str(room / weights)) if weights else ()
    return [
        *(
            "train",
            "--coop-repo",
            str(room / "fork"),
            "--trainer",
            trainer,
            "--root",
            str(room),
            "--output-dir",
            str(room / "out"),
        ),
        *("--dataset-config-file", "configs/datasets/squares.yaml", "--config-file", "configs/trainers/WordBias/ep3.yaml"),
        *("--seed", "1", *flags, "OPTIM.MAX_EPOCH", "1", *pairs),
    ]


def run(room, *flags, **options):
    assert main(command(room, *flags, **options)) == 0
    return json.loads((room / "out" / "results.json").read_text())


def refused(room, capsys, *flags, **options):
    assert main(command(room, *flags, **options)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("promptmix: error: ")]
    assert len(lines) == 1
    return lines[0]


def log(room):
    return (room / "out" / "log.txt").read_text()
