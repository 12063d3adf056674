"""Embedded pictures at their artists' size as JPEGs, for what depends on decoding and resizing (``benchmarks/README.md``)."""

from __future__ import annotations

import io
import json
from pathlib import Path

from PIL import Image

from assets.render import key_of
from assets.sources import reader


def write_jpegs(archives: Path, families: Path, out: Path, size: int) -> None:
    """Write Fluent 3D on white, ``size`` x ``size`` pixels, as ``<out>/train/<family>/<hexcode>.jpg`` and so on.

    Args:
        archives: Folder of the pinned archives.
        families: The split file of the embedded data set.
        out: Folder that ``DATASET.NAME ImageFolder`` then reads.
        size: Pixels of an edge; the artists' pictures have 256.
    """
    split = json.loads(families.read_text(encoding="utf-8"))
    drawn = {key_of(code): data for code, data in reader(archives, "fluent_3d").read_all("assets/", ".webp").items()}
    count = 0
    for part in ("train", "val", "test"):
        for family, codes in split[part].items():
            folder = out / part / family
            folder.mkdir(parents=True, exist_ok=True)
            for code in codes:
                picture = Image.open(io.BytesIO(drawn[code])).convert("RGBA").resize((size, size), Image.Resampling.LANCZOS)
                canvas = Image.new("RGBA", picture.size, "white")
                canvas.alpha_composite(picture)
                canvas.convert("RGB").save(folder / f"{code}.jpg", quality=90)
                count += 1
    print(f"{out}: {count} pictures")
