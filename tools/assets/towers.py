"""The two CLIP models by configuration, and tiny-en's fixed image tower: EfficientNet-Lite0 with a PCA-whitening head."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F

from assets.concepts import load_concepts
from assets.render import PRETRAIN_STYLES, load_style
from assets.sources import lite0_weights

EMBED_DIM = 128
SCALE = 20.0
VOCAB_SIZE = 8192
CONTEXT_LENGTH = 32
BPE_FILE = f"bpe_{VOCAB_SIZE}.txt.gz"
TEXT_CFG = {"context_length": CONTEXT_LENGTH, "vocab_size": VOCAB_SIZE, "width": 128, "heads": 2, "layers": 4}
VISION_CFGS: dict[str, dict[str, Any]] = {
    "tiny-en": {
        "timm_model_name": "tf_efficientnet_lite0",
        "timm_model_pretrained": False,
        "timm_pool": "avg",
        "timm_proj": "linear",
        "timm_proj_bias": True,
        "image_size": 128,
    },
    "tiny-vit": {"layers": 6, "width": 192, "head_width": 64, "patch_size": 8, "image_size": 64},
}
MEAN = STD = (0.5, 0.5, 0.5)


def model_config(name: str) -> dict[str, Any]:
    """Return the keyword arguments of ``open_clip.model.CLIP`` for ``tiny-en`` or ``tiny-vit``."""
    config = {"embed_dim": EMBED_DIM, "vision_cfg": VISION_CFGS[name], "text_cfg": TEXT_CFG, "quick_gelu": False}
    return copy.deepcopy(config)


def build(name: str) -> torch.nn.Module:
    """Build an untrained model of the given name."""
    return open_clip.model.CLIP(**model_config(name), init_logit_scale=float(np.log(SCALE)))


def prepare(images: torch.Tensor, size: int) -> torch.Tensor:
    """Turn uint8 pictures (N, H, W, 3) into normalised (N, 3, size, size); bicubic, a little sharper than Pillow's."""
    pixels = images.permute(0, 3, 1, 2).float() / 255
    if pixels.shape[-1] != size:
        pixels = F.interpolate(pixels, size=(size, size), mode="bicubic", align_corners=False).clamp(0, 1)
    return (pixels - 0.5) / 0.5


@torch.inference_mode()
def encode(visual: torch.nn.Module, images: np.ndarray, size: int, batch: int = 128) -> torch.Tensor:
    """Return the outputs (N, D) of an image tower for uint8 pictures (N, H, W, 3), not normalised."""
    visual.eval()
    chunks = [
        visual(prepare(torch.from_numpy(np.ascontiguousarray(images[i : i + batch])), size)) for i in range(0, len(images), batch)
    ]
    return torch.cat(chunks).float()


def load_lite0(visual: torch.nn.Module) -> None:
    """Load the package's network into timm's; both keep the same tensors in the same order under other names."""
    source = list(lite0_weights().values())
    target = visual.trunk.state_dict()
    # The package's last two tensors are ImageNet's classifier, which the trunk doesn't have.
    if [value.shape for value in source[:-2]] != [value.shape for value in target.values()]:
        raise SystemExit("EfficientNet-Lite0: the package's tensors do not match timm's tf_efficientnet_lite0")
    visual.trunk.load_state_dict(dict(zip(target, source[:-2], strict=True)), strict=True)


def pretraining_pictures(work: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the pictures (N, 64, 64, 3) of the seen concepts in all pretraining styles, and their rows (N,)."""
    row_of = {concept.hexcode: row for row, concept in enumerate(c for c in load_concepts(work) if not c.novel)}
    images, rows = [], []
    for style in PRETRAIN_STYLES:
        for key, image in load_style(work, style).items():
            if key in row_of:
                images.append(image)
                rows.append(row_of[key])
    return np.stack(images), np.array(rows)


def prototypes(features: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
    """Return the normalised mean (C, D) of the normalised features (N, D) of each concept's pictures."""
    sums = torch.zeros(int(rows.max()) + 1, features.shape[1])
    sums.index_add_(0, torch.from_numpy(rows), F.normalize(features, dim=-1))
    return F.normalize(sums, dim=-1)


def whitening(features: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weight (dim, F) and bias (dim,) of the linear map that centres and PCA-whitens the features (N, F)."""
    mean = features.double().mean(0)
    centred = features.double() - mean
    values, vectors = torch.linalg.eigh(centred.T @ centred / (len(features) - 1))
    order = values.argsort(descending=True)[:dim]
    weight = (vectors[:, order] / values[order].sqrt()).T
    return weight.float(), (-weight @ mean).float()


def build_image_tower(work: Path) -> None:
    """Write ``tiny-en-image.pt`` (the tower in float16 precision) and ``prototypes.pt`` of the seen concepts."""
    visual = build("tiny-en").visual.eval()
    load_lite0(visual)
    visual.head.proj = torch.nn.Identity()
    images, rows = pretraining_pictures(work)
    size = VISION_CFGS["tiny-en"]["image_size"]
    weight, bias = whitening(encode(visual, images, size), EMBED_DIM)
    visual.head.proj = torch.nn.Linear(weight.shape[1], EMBED_DIM)
    visual.head.proj.load_state_dict({"weight": weight, "bias": bias})
    # Everything after this sees the tower exactly as the float16 file will give it back.
    rounded = {key: value.half() if value.is_floating_point() else value for key, value in visual.state_dict().items()}
    visual.load_state_dict({key: value.float() if value.is_floating_point() else value for key, value in rounded.items()})
    torch.save(rounded, work / "tiny-en-image.pt")
    torch.save(prototypes(encode(visual, images, size), rows), work / "prototypes.pt")
    print(f"tiny-en: {len(images)} pictures of {int(rows.max()) + 1} concepts")


def load_image_tower(work: Path) -> torch.nn.Module:
    """Return tiny-en's finished image tower."""
    visual = build("tiny-en").visual
    visual.load_state_dict(torch.load(work / "tiny-en-image.pt", weights_only=True), strict=True)
    return visual.float().eval()
