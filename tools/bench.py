"""`promptmix bench` from a checkout, installed or not; what a machine with torch alone lacks (`NEEDS`) is named in one line."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
NEEDS = {"open_clip": "open_clip_torch", "PIL": "pillow", "yaml": "pyyaml"}
NEEDS |= {name: name for name in ("numpy", "pluggy", "safetensors", "tabulate", "torch", "torchvision", "tqdm", "yacs")}
if __name__ == "__main__":
    if lacks := " ".join(package for module, package in NEEDS.items() if find_spec(module) is None):
        print(f"bench lacks {lacks}: `pip download -d wheels {lacks}`, carry it here, `pip install --no-index -f wheels {lacks}`")
        sys.exit(2)
    from promptmix.cli import main

    sys.exit(main(["bench", *sys.argv[1:]]))
