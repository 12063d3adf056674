"""What the tests of trainers run on: a data set of a few drawn pictures, and a small random CLIP in OpenAI's layout."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from promptmix.config import get_cfg, merge_opts, validate
from promptmix.data import DatasetBase, Datum
from promptmix.data.fewshot import subsample_classes, unlabeled
from promptmix.data.templates import IMAGENET_60
from promptmix.engine import build_trainer, set_random_seed
from promptmix.registry import TRAINER_REGISTRY

#: Of five classes three are base and two are new, so that a tensor with a class axis can't pass for one without.
CLASSES = ("barn owl", "pine_tree", "red double decker bus", "cat", "lighthouse")
PIXELS = 32
LAYERS = 12  # as in ViT-B/16, so that every default depth fits
#: Of the 60 templates that these encode, toys take three; the golden cases have all.
MANY_TEMPLATES = ("PromptSRC", "SurPL", "TRIP")


class ToyPictures(DatasetBase):
    """Pictures in one colour a class, with noise: 4 for training, 1 for validation and 2 for the test of each class."""

    def __init__(self, cfg):
        folder = Path(cfg.DATASET.ROOT, "toy")
        if not folder.is_dir():
            draw(folder)
        items = {
            split: [
                Datum(str(folder / f"{split}-{label}-{i}.png"), label, 0, name)
                for label, name in enumerate(CLASSES)
                for i in range(n)
            ]
            for split, n in (("train", 4), ("val", 1), ("test", 2))
        }
        train, val, test = subsample_classes(*items.values(), subsample=cfg.DATASET.SUBSAMPLE_CLASSES)
        super().__init__(train_x=train, train_u=unlabeled(cfg, items["train"]), val=val, test=test)
        self.templates = ["a photo of a {}.", "a drawing of a {}.", "a picture of the {}."]
        self.template_groups = [["a photo of a {}."], ["a drawing of a {}.", "a drawing of the {}."], ["a {} seen from afar."]]
        self.all_classnames = list(CLASSES)
        self.descriptions = {name: [f"A {name} in the morning.", f"This is how a {name} looks at night."] for name in CLASSES}


def draw(folder: Path) -> None:
    folder.mkdir(parents=True)
    random = np.random.RandomState(0)
    for label in range(len(CLASSES)):
        colour = random.randint(0, 200, size=3)
        for split, n in (("train", 4), ("val", 1), ("test", 2)):
            for i in range(n):
                pixels = colour + random.randint(0, 56, size=(PIXELS, PIXELS, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{split}-{label}-{i}.png")


def write_backbone(path: Path, width: int = 64, layers: int = LAYERS) -> Path:
    """Write random weights of a CLIP of vision transformer form, with ``layers`` in each tower and a head for 64 of its width."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, std: float | None = None, mean: float = 0.0) -> torch.Tensor:
        return mean + torch.randn(shape, generator=generator) * (shape[-1] ** -0.5 if std is None else std)

    def norm(prefix: str) -> dict[str, torch.Tensor]:
        return {f"{prefix}.weight": normal(width, std=0.05, mean=1.0), f"{prefix}.bias": normal(width, std=0.02)}

    def linear(prefix: str, out: int, into: int) -> dict[str, torch.Tensor]:
        return {f"{prefix}weight": normal(out, into), f"{prefix}bias": normal(out, std=0.02)}

    state = {
        "visual.class_embedding": normal(width, std=0.5),
        "visual.positional_embedding": normal((PIXELS // 8) ** 2 + 1, width, std=0.5),
        "visual.proj": normal(width, width),
        "visual.conv1.weight": normal(width, 3, 8, 8, std=0.1),
        "positional_embedding": normal(77, width, std=0.1),
        "text_projection": normal(width, width),
        "token_embedding.weight": normal(49408, width, std=0.2),
        "logit_scale": torch.tensor(math.log(14.0)),
        **norm("visual.ln_pre"),
        **norm("visual.ln_post"),
        **norm("ln_final"),
    }
    for tower in ("visual.transformer", "transformer"):
        for i in range(layers):
            block = f"{tower}.resblocks.{i}."
            state |= linear(f"{block}attn.in_proj_", 3 * width, width) | linear(f"{block}attn.out_proj.", width, width)
            state |= linear(f"{block}mlp.c_fc.", 4 * width, width) | linear(f"{block}mlp.c_proj.", width, 4 * width)
            state |= norm(f"{block}ln_1") | norm(f"{block}ln_2")
    save_file(state, path)
    return path


def toy_cfg(room: Path, trainer: str, *opts: object, classes: str = "base", seed: int = 1):
    """Return a config of ``trainer`` with its defaults, on the toy pictures and the random backbone in ``room``."""
    cfg = get_cfg()
    settings = toy_settings(room, trainer) | {"DATASET.SUBSAMPLE_CLASSES": classes, "SEED": seed}
    merge_opts(cfg, [part for pair in settings.items() for part in pair], source="the test")
    merge_opts(cfg, list(opts), source="the test's options")
    return cfg


def toy_settings(room: Path, trainer: str) -> dict[str, object]:
    """Return what ``trainer`` is told so that it learns the toy pictures with the random backbone in ``room``."""
    return {
        "TRAINER.NAME": trainer,
        "DATASET.NAME": "ToyPictures",
        "DATASET.ROOT": str(room),
        "MODEL.BACKBONE.NAME": "ViT-B/16",
        "MODEL.BACKBONE.WEIGHTS": str(room / "clip.safetensors"),
        "INPUT.SIZE": (PIXELS, PIXELS),
        "INPUT.TRANSFORMS": ("center_crop", "normalize"),
        "DATALOADER.NUM_WORKERS": 0,
        "DATALOADER.TRAIN_X.BATCH_SIZE": 4,
        "OPTIM.NAME": "sgd",
        "OPTIM.LR": 0.002,
        "OUTPUT_DIR": str(room / "output"),
        "USE_CUDA": False,
        "VERBOSE": False,
    }


def three_layers(room: Path) -> tuple[str, str]:
    """Return the setting of a backbone of three layers, for what depth proves nothing about."""
    return "MODEL.BACKBONE.WEIGHTS", str(room / "flat.safetensors")


def toy_trainer(room: Path, trainer: str, *opts: object, classes: str = "base", seed: int = 1):
    """Return a built trainer, as a seeded run builds it."""
    cfg = toy_cfg(room, trainer, *opts, classes=classes, seed=seed)
    validate(cfg)
    cfg.freeze()
    set_random_seed(seed)
    with pytest.MonkeyPatch.context() as patch:
        for module in {TRAINER_REGISTRY.get(name).__module__ for name in MANY_TEMPLATES}:
            patch.setattr(f"{module}.IMAGENET_60", IMAGENET_60[:3])
        return build_trainer(cfg)


def shallow(trainer, layers: int = 2):
    """Leave the towers of a built trainer, or of a benchmark's world, their first layers; more would only take longer."""
    for blocks in (trainer.clip.text.blocks, trainer.clip.image.layers.blocks):
        del blocks[layers:]
    return trainer


def first_step(trainer, stage: int = 0) -> dict[str, torch.Tensor]:
    """Learn from the first batch of a stage; the gradients stay where they are."""
    trainer.set_model_mode("train")
    trainer.num_batches = len(trainer.train_loader_x)
    trainer.epoch, trainer.batch_idx = divmod(trainer.stages.bounds[stage], trainer.num_batches)
    return trainer.forward_backward(next(iter(trainer.train_loader_x)))


def scores(trainer) -> torch.Tensor:
    """Return the class scores of the first test pictures."""
    trainer.set_model_mode("eval")
    with torch.no_grad():
        return trainer.model_inference(trainer.parse_batch_test(next(iter(trainer.test_loader)))[0])
