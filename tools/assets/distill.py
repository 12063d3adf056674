"""tiny-vit's image tower: a ViT that learns to give tiny-en's embedding of the same augmented picture."""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from open_clip.transformer import PatchDropout
from torch.nn.attention import SDPBackend, sdpa_kernel

from assets.concepts import load_concepts
from assets.render import load_style
from assets.towers import SCALE, VISION_CFGS, build, encode, load_image_tower, prepare, pretraining_pictures

PICTURES = 49152
CHUNK = 256
STEPS = 2200
BATCH = 128
# The share of steps that see half of the patches: they cost half, and the tower loses nothing by it.
DROP_SHARE = 0.85
LEARNING_RATE = 2e-3
WARMUP = 100
COSINE_WEIGHT = 10.0
EVAL_EVERY = 200
SEED = 2


def _affine(pixels: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Turn, scale, stretch, shift and mirror each picture (N, 3, H, W); what comes in from outside is white."""
    n = len(pixels)

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(n, generator=rng)

    angle, shrink, stretch = uniform(-0.3, 0.3), uniform(0.6, 1.25), uniform(0.88, 1.14)
    mirror = torch.where(torch.rand(n, generator=rng) < 0.5, -1.0, 1.0)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1] = mirror * angle.cos() * shrink * stretch, -angle.sin() * shrink
    theta[:, 1, 0], theta[:, 1, 1] = mirror * angle.sin() * shrink, angle.cos() * shrink / stretch
    theta[:, :, 2] = torch.stack([uniform(-0.25, 0.25), uniform(-0.25, 0.25)], 1)
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    return 1 - F.grid_sample(1 - pixels, grid, mode="bicubic", align_corners=False).clamp(0, 1)


def _line_art(pixels: torch.Tensor) -> torch.Tensor:
    """Draw the grey edges of each picture (N, 3, H, W) in black on white."""
    grey = pixels.mean(1, keepdim=True)
    across = F.pad(grey, (1, 1, 1, 1), mode="replicate")
    dx = across[:, :, 1:-1, 2:] - across[:, :, 1:-1, :-2]
    dy = across[:, :, 2:, 1:-1] - across[:, :, :-2, 1:-1]
    return (1 - 3 * (dx.square() + dy.square()).sqrt()).clamp(0, 1).expand(-1, 3, -1, -1)


def augment(images: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Return one augmented view (N, H, W, 3) uint8 of each picture (N, H, W, 3) uint8."""
    pixels = _affine(images.permute(0, 3, 1, 2).float() / 255, rng)
    n = len(pixels)

    def some(share: float) -> torch.Tensor:
        return (torch.rand(n, generator=rng) < share)[:, None, None, None]

    pixels = torch.where(some(0.1), _line_art(pixels), pixels)
    grey = pixels.mean(1, keepdim=True)
    saturation = torch.where(some(0.1), torch.zeros(()), 0.5 + torch.rand(n, 1, 1, 1, generator=rng))
    pixels = grey + saturation * (pixels - grey)
    # A random tint also colours the white background; turned colour channels make other hues.
    tint = torch.where(some(0.4), 0.6 + 0.4 * torch.rand(n, 3, 1, 1, generator=rng), torch.ones(()))
    pixels = torch.where(some(0.1), pixels.roll(1, dims=1), pixels) * tint
    contrast = 0.7 + 0.5 * torch.rand(n, 1, 1, 1, generator=rng)
    pixels = torch.where(some(0.5), 1 + contrast * (pixels - 1), pixels)
    small = F.interpolate(pixels, scale_factor=0.5, mode="bilinear", antialias=True, align_corners=False)
    pixels = torch.where(some(0.1), F.interpolate(small, scale_factor=2, mode="bilinear", align_corners=False), pixels)
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


@torch.inference_mode()
def build_teacher_set(work: Path, pictures: int = PICTURES) -> None:
    """Write ``teacher.pt``: augmented pictures (N, 64, 64, 3), tiny-en's features (N, D), concept rows (N,)."""
    teacher = load_image_tower(work).to(memory_format=torch.channels_last)
    images, rows = pretraining_pictures(work)
    rng = torch.Generator().manual_seed(SEED)
    order = torch.cat([torch.randperm(len(images), generator=rng) for _ in range(pictures // len(images) + 1)])[:pictures]
    views, features = [], []
    size, start = VISION_CFGS["tiny-en"]["image_size"], time.time()
    for i in range(0, pictures, CHUNK):
        view = augment(torch.from_numpy(images[order[i : i + CHUNK].numpy()]), rng)
        # bfloat16 is twice as fast here, and the features keep a mean cosine of 0.997 with the exact ones.
        with torch.autocast("cpu", torch.bfloat16):
            feature = teacher(prepare(view, size).contiguous(memory_format=torch.channels_last))
        views.append(view)
        features.append(F.normalize(feature.float(), dim=-1).half())
        if i % (20 * CHUNK) == 0:
            print(f"teacher {i} of {pictures}, {time.time() - start:.0f} s", flush=True)
    data = {"images": torch.cat(views), "features": torch.cat(features), "rows": torch.from_numpy(rows)[order]}
    torch.save(data, work / "teacher.pt")


def _optimizers(visual: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the rest (it learns about twice as fast as AdamW alone)."""
    matrices = [p for key, p in visual.named_parameters() if p.ndim == 2 and key.startswith("transformer.")]
    chosen = {id(p) for p in matrices}
    rest = [p for p in visual.parameters() if id(p) not in chosen]
    muon = torch.optim.Muon(matrices, lr=LEARNING_RATE, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(rest, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)]


def train_vit(work: Path, steps: int = STEPS) -> None:
    """Distil the ViT and write ``tiny-vit-image.pt`` (float16), first after ``EVAL_EVERY`` steps, then ever better."""
    torch.manual_seed(SEED)
    data = torch.load(work / "teacher.pt", weights_only=True)
    targets = torch.load(work / "prototypes.pt", weights_only=True)
    visual = build("tiny-vit").visual
    optimizers = _optimizers(visual)

    def rate(step: int) -> float:
        return min((step + 1) / WARMUP, 0.5 + 0.5 * math.cos(math.pi * min(1, step / steps)))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    seen = [concept.hexcode for concept in load_concepts(work) if not concept.novel]
    near = load_style(work, "fluent_3d")
    watched = np.stack([near[key] for key in seen])
    full, half = visual.patch_dropout, PatchDropout(0.5)
    order = torch.cat([torch.randperm(len(data["rows"])) for _ in range(steps * BATCH // len(data["rows"]) + 1)])
    size, start = VISION_CFGS["tiny-vit"]["image_size"], time.time()
    for step in range(steps):
        visual.train()
        visual.patch_dropout = half if step < DROP_SHARE * steps else full
        index = order[step * BATCH : (step + 1) * BATCH]
        # The fused attention kernel is many times slower than plain matrix products for 65 tokens in bfloat16.
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            features = visual(prepare(data["images"][index], size))
        features = F.normalize(features.float(), dim=-1)
        cosine = (features * data["features"][index].float()).sum(-1).mean()
        entropy = F.cross_entropy(SCALE * features @ targets.T, data["rows"][index])
        loss = COSINE_WEIGHT * (1 - cosine) + entropy
        visual.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(visual.parameters(), 5.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        if step % 50 == 0:
            print(f"vit step {step} cos {cosine:.3f} ce {entropy:.3f} {time.time() - start:.0f} s", flush=True)
        if (step + 1) % EVAL_EVERY == 0 or step + 1 == steps:
            visual.patch_dropout = full
            nearest = (F.normalize(encode(visual, watched, size), dim=-1) @ targets.T).argmax(1)
            accuracy = (nearest == torch.arange(len(seen))).float().mean().item()
            print(f"vit step {step + 1}: fluent_3d nearest prototype {accuracy:.1%}", flush=True)
            torch.save({key: value.half() for key, value in visual.state_dict().items()}, work / "tiny-vit-image.pt")
