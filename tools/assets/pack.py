"""Write the results into ``promptmix/assets``: picture packs, tables, models, tokenizer and licence texts."""

from __future__ import annotations

import io
import json
import re
import shutil
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file

from assets.concepts import load_concepts, split_families
from assets.render import HELD_OUT_STYLES, load_style
from assets.sources import ARCHIVES, reader
from assets.towers import BPE_FILE, CONTEXT_LENGTH, MEAN, STD, VISION_CFGS, model_config

# Flat artwork packs smallest without loss; the shaded 3D pictures take five times less at this quality.
WEBP = {style: {"lossless": True, "quality": 100, "method": 6} for style in HELD_OUT_STYLES}
WEBP["fluent_3d"] = {"quality": 90, "method": 6}
ORIGINS = {
    "concepts.json": (
        f"emojibase-data {ARCHIVES['emojibase'].version} (MIT; names and tags from CLDR, Unicode licence); novel concepts and "
        "families chosen by tools/build_assets.py"
    ),
    "families_split.json": (
        "41 visual families merged from CLDR subgroups (tools/assets/families.json), split by concept by tools/build_assets.py "
        "with a fixed seed: two concepts a family for validation, the others in halves for shots (train) and test"
    ),
}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON with each innermost list on one line, so that changes show in a diff and the file stays small."""
    text = json.dumps(content, ensure_ascii=False, indent=1)
    text = re.sub(r"\[[^][{}]*\]", lambda match: " ".join(match[0].split()), text)
    path.write_text(text + "\n", encoding="utf-8")


def pack_pictures(work: Path, out: Path) -> None:
    """Write one ``<style>.zip`` a held-out style, the table of concepts, and the families' split."""
    out.mkdir(parents=True, exist_ok=True)
    concepts = load_concepts(work)
    for style in HELD_OUT_STYLES:
        pictures = load_style(work, style)
        with zipfile.ZipFile(out / f"{style}.zip", "w", zipfile.ZIP_STORED) as pack:
            for concept in concepts:
                buffer = io.BytesIO()
                Image.fromarray(pictures[concept.hexcode]).save(buffer, "WEBP", **WEBP[style])
                # A fixed date makes the pack the same file on every build.
                pack.writestr(zipfile.ZipInfo(f"{concept.hexcode}.webp", (2020, 1, 1, 0, 0, 0)), buffer.getvalue())
        print(f"{style}.zip: {(out / f'{style}.zip').stat().st_size / 1e6:.2f} MB")
    rows = [asdict(concept) for concept in concepts]
    table = {"origin": ORIGINS["concepts.json"], "concepts": rows}
    (out / "concepts.json").write_text(
        json.dumps(table, ensure_ascii=False).replace('{"hexcode"', '\n{"hexcode"') + "\n", encoding="utf-8"
    )
    _write_json(out / "families_split.json", {"origin": ORIGINS["families_split.json"], **split_families(concepts)})


def pack_models(work: Path, out: Path) -> None:
    """Write the float16 weights, the text part once for both models, and a JSON description of each model."""
    out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(work / BPE_FILE, out / BPE_FILE)
    text = torch.load(work / "tiny-text.pt", weights_only=True)
    save_file({key: value.contiguous() for key, value in text.items()}, out / "tiny-text.safetensors")
    for name, vision in VISION_CFGS.items():
        source = work / f"{name}-image.pt"
        if not source.exists():
            continue
        image = torch.load(source, weights_only=True)
        save_file({f"visual.{key}": value.contiguous() for key, value in image.items()}, out / f"{name}-image.safetensors")
        description = {
            "model_cfg": model_config(name),
            "weights": [f"{name}-image.safetensors", "tiny-text.safetensors"],
            "tokenizer": {"bpe": BPE_FILE, "context_length": CONTEXT_LENGTH},
            "mean": MEAN,
            "std": STD,
            "interpolation": "bicubic",
            "image_size": vision["image_size"],
        }
        _write_json(out / f"{name}.json", description)
    for path in sorted(out.iterdir()):
        print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB")


def pack_licences(archives: Path, out: Path) -> None:
    """Write the full licence texts, from the packages that carry them and from the list of SPDX licences."""
    out.mkdir(parents=True, exist_ok=True)
    spdx = reader(archives, "licences")
    for name in ("Apache-2.0", "CC-BY-4.0", "Unicode-3.0"):
        text = spdx.json(f"licenses/{name}.json")["licenseText"]
        (out / f"{name}.txt").write_text(text.strip() + "\n", encoding="utf-8")
    openmoji = reader(archives, "openmoji").read("LICENSE.txt").decode()
    (out / "CC-BY-SA-4.0.txt").write_text(openmoji.strip() + "\n", encoding="utf-8")
    mit = reader(archives, "emojibase").read("LICENSE").decode().strip().splitlines()
    body = "\n".join(line for line in mit if not line.startswith(("MIT License", "Copyright"))).strip()
    for name, holder in MIT_HOLDERS.items():
        (out / f"MIT-{name}.txt").write_text(f"MIT License\n\n{holder}\n\n{body}\n", encoding="utf-8")


MIT_HOLDERS = {
    "emojibase": "Copyright (c) 2017-2019 Miles Johnson",
    "fluentui-emoji": "Copyright (c) Microsoft Corporation.",
    "openai-clip": "Copyright (c) 2021 OpenAI",
}
