"""A command that trains a small method on four grey squares, and what commands are held to."""

from pathlib import Path

import yaml
from PIL import Image

from promptmix.cli import main

PLUGIN = str(Path(__file__).resolve().parent / "dots_plugin.py")


def command(tmp_path):
    """Return the start of a command that trains `Linear` on `Dots` into tmp_path/out."""
    folder = tmp_path / "data" / "dots"
    folder.mkdir(parents=True)
    for name, grey in {"black": 0, "dark": 80, "light": 160, "white": 255}.items():
        Image.new("RGB", (8, 8), (grey, grey, grey)).save(folder / f"{name}.png")
    config = tmp_path / "dots.yaml"
    tree = {
        "DATASET": {"NAME": "Dots"},
        "DATALOADER": {"NUM_WORKERS": 0, "TRAIN_X": {"BATCH_SIZE": 4}},
        "INPUT": {"SIZE": [8, 8], "TRANSFORMS": ["normalize"]},
        "OPTIM": {"MAX_EPOCH": 2, "NAME": "sgd", "LR": 0.01},
    }
    config.write_text(yaml.safe_dump(tree))
    return [
        *("train", "--plugin", PLUGIN, "--config-file", str(config), "--root", str(tmp_path / "data")),
        *("--output-dir", str(tmp_path / "out"), "--trainer", "Linear", "--seed", "1"),
    ]


def fails(capsys, argv, *words):
    """Run a command that must end as a user error; return its line."""
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("promptmix: error: ")
    assert len(error.strip().splitlines()) == 1
    assert "Traceback" not in error
    for word in words:
        assert word in error
    return error
