"""Measure what the packed models do without training: the zero-shot numbers of the model card."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from assets.render import HELD_OUT_STYLES
from assets.towers import VISION_CFGS, encode

TEMPLATE = "a photo of a {}."


def load_packed(out: Path, name: str) -> tuple[torch.nn.Module, open_clip.SimpleTokenizer, int]:
    """Return a packed model with its tokenizer and picture size."""
    folder = out / "models"
    description = json.loads((folder / f"{name}.json").read_text())
    model = open_clip.CLIP(**description["model_cfg"])
    state = {key: value for file in description["weights"] for key, value in load_file(folder / file).items()}
    model.load_state_dict(state, strict=True)
    tokenizer = open_clip.SimpleTokenizer(
        bpe_path=str(folder / description["tokenizer"]["bpe"]), context_length=description["tokenizer"]["context_length"]
    )
    return model.eval(), tokenizer, description["image_size"]


def read_pack(out: Path, style: str, codes: list[str], size: int) -> np.ndarray:
    """Return the pictures (N, size, size, 3) of a pack in the order of the hexcodes, resized as at run time."""
    with zipfile.ZipFile(out / "emoji" / f"{style}.zip") as pack:
        pictures = [Image.open(io.BytesIO(pack.read(f"{code}.webp"))).convert("RGB") for code in codes]
    return np.stack([np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC)) for picture in pictures])


def _accuracy(images: torch.Tensor, texts: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """Return plain and class-balanced accuracy in percent of features (N, D) against class features (C, D)."""
    right = ((images @ texts.T).argmax(1) == labels).float()
    by_class = torch.stack([right[labels == label].mean() for label in labels.unique()])
    return 100 * right.mean().item(), 100 * by_class.mean().item()


@torch.inference_mode()
def report(out: Path) -> None:
    """Print zero-shot accuracy over seen and novel concepts and over the families' test pictures, by style."""
    concepts: list[dict[str, Any]] = json.loads((out / "emoji" / "concepts.json").read_text(encoding="utf-8"))["concepts"]
    row_of = {concept["hexcode"]: row for row, concept in enumerate(concepts)}
    test = json.loads((out / "emoji" / "families_split.json").read_text(encoding="utf-8"))["test"]
    families = sorted(test)
    test_rows = [row_of[code] for family in families for code in test[family]]
    test_labels = torch.tensor([label for label, family in enumerate(families) for _ in test[family]])
    seen = torch.tensor([row for row, concept in enumerate(concepts) if not concept["novel"]])
    novel = torch.tensor([row for row, concept in enumerate(concepts) if concept["novel"]])
    print(f"| model | style | {len(seen)} seen | {len(novel)} novel | families | class-balanced |")
    print("|---|---|---|---|---|---|")
    for name in VISION_CFGS:
        model, tokenizer, size = load_packed(out, name)

        def texts(names: list[str], model: Any = model, tokenizer: Any = tokenizer) -> torch.Tensor:
            return F.normalize(model.encode_text(tokenizer([TEMPLATE.format(each) for each in names])), dim=-1)

        labels, kinds = texts([concept["label"] for concept in concepts]), texts(families)
        for style in HELD_OUT_STYLES:
            images = read_pack(out, style, [concept["hexcode"] for concept in concepts], size)
            features = F.normalize(encode(model.visual, images, size), dim=-1)
            over = [_accuracy(features[rows], labels[rows], torch.arange(len(rows)))[0] for rows in (seen, novel)]
            plain, balanced = _accuracy(features[test_rows], kinds, test_labels)
            print(f"| {name} | {style} | {over[0]:.1f} | {over[1]:.1f} | {plain:.1f} | {balanced:.1f} |", flush=True)
