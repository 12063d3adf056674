"""`promptmix bench` from a checkout, installed or not, on a machine that may have torch and no network.

What such a machine lacks is read from the wheels in `wheels/` of the checkout, unpacked; what is lacking even then is
named in one line with the command that fetches it elsewhere.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import BadZipFile, ZipFile

ROOT = Path(__file__).resolve().parent.parent
NEEDS = {"open_clip": "open_clip_torch", "PIL": "pillow", "yaml": "pyyaml"}
NEEDS |= {name: name for name in ("numpy", "pluggy", "safetensors", "tabulate", "torch", "torchvision", "tqdm", "yacs")}
#: What open_clip imports beside these.
NEEDS |= {name: name for name in ("ftfy", "regex", "wcwidth")}


def main(argv: list[str], root: Path = ROOT) -> int:
    """Run `promptmix bench` and return its exit code; 2 where a package is lacking."""
    with TemporaryDirectory() as unpacked:
        for wheel in sorted(root.glob("wheels/*.whl")):
            try:
                ZipFile(wheel).extractall(unpacked)
            except (BadZipFile, OSError) as error:
                print(f"{wheel} cannot be unpacked ({error}); fetch it again")
                return 2
        sys.path[:0] = [str(ROOT)]
        sys.path.append(unpacked)  # behind what is installed
        if lacks := " ".join(package for module, package in NEEDS.items() if find_spec(module) is None):
            python = ".".join(map(str, sys.version_info[:2]))
            fetch = f"pip download --no-deps --only-binary=:all: --python-version {python} -d wheels {lacks}"
            print(f"bench lacks {lacks}: where there is a network `{fetch}`, then carry the folder wheels/ into {root}")
            return 2
        from promptmix.cli import main as promptmix

        return promptmix(["bench", *argv])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
