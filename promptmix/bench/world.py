"""What the suites run on: one backbone with random weights, made-up classes and pictures, and trainers built on them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from yacs.config import CfgNode

from promptmix.clip import CLIP, load_clip
from promptmix.config import get_cfg, merge_opts, validate
from promptmix.cost.count import count
from promptmix.data import DatasetBase, Datum
from promptmix.data.templates import IMAGENET_80
from promptmix.engine import build_trainer
from promptmix.engine.precision import choose_device
from promptmix.prompts.trainer import PromptTrainer
from promptmix.registry import BACKBONE_REGISTRY, DATASET_REGISTRY
from promptmix.utils import quiet

_WORDS = ("dog", "lion", "bus", "tree", "cup", "road", "bird", "ship")
_NAME = "bench"


def class_names(count: int) -> list[str]:
    """Return made-up class names with 1, 2, 3 and 4 words in turn, as long as those of the benchmark data sets."""
    return [" ".join(_WORDS[(i + i // 8 + k) % len(_WORDS)] for k in range(i % 4 + 1)) + f" {i}" for i in range(count)]


class World:
    """One frozen backbone for all trainers of a benchmark.

    Args:
        backbone: a name of the backbone registry or of open_clip; its weights are random.
        folder: where pictures are drawn.
        device: ``auto``, ``cpu``, ``cuda``, or ``meta``, on which work is counted but not done.
    """

    def __init__(self, backbone: str, folder: Path, device: str = "auto") -> None:
        cfg = get_cfg()
        cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.PRETRAINED = backbone, False
        self.backbone, self.folder = backbone, folder
        self.device = torch.device("meta") if device == "meta" else choose_device(device)
        self.clip: CLIP = load_clip(cfg).to("cpu" if device == "meta" else self.device)
        self._state = {name: value.clone() for name, value in self.clip.state_dict().items()} if device == "meta" else {}

    def trainer(
        self,
        name: str,
        classes: int | Sequence[str],
        *opts: object,
        pictures: int = 1,
        test_pictures: int = 1,
        experts: int = 5,
    ) -> PromptTrainer:
        """Build a trainer on made-up pictures.

        Args:
            name: name in the trainer registry.
            classes: C, or the class names; made-up ones otherwise.
            opts: config keys and values.
            pictures: training pictures of each class.
            test_pictures: test pictures in all.
            experts: E, template groups of the data set.
        """
        paths = draw(self.folder)
        names = class_names(classes) if isinstance(classes, int) else list(classes)
        dataset = _dataset(paths, names, pictures, test_pictures, experts)
        cfg = self.config(name, *opts)
        if self.device.type == "meta":  # what an earlier trainer left without numbers is filled again
            self.clip.to_empty(device="cpu").load_state_dict(self._state)
            mask = getattr(self.clip.text, "attn_mask", None)
            if mask is not None:  # towers without a causal mask have none
                self.clip.text.attn_mask = torch.full_like(mask, -torch.inf).triu_(1)
        for registry, entry in ((DATASET_REGISTRY, dataset), (BACKBONE_REGISTRY, lambda cfg: self.clip)):
            registry.register(entry, name=_NAME, force=True)
        validate(cfg)
        torch.manual_seed(0)
        with _one_template(self.clip) if self.device.type == "meta" else nullcontext():
            trainer: Any = build_trainer(cfg)
        trainer.epoch, trainer.batch_idx, trainer.num_batches = 0, 0, 2
        trainer.set_model_mode("train")
        if self.device.type == "meta":
            trainer.clip.to("meta")
            trainer.model.to("meta")
            trainer.device = self.device
        return trainer

    def config(self, name: str, *opts: object) -> CfgNode:
        """Return the config of a trainer on the made-up pictures, with ``opts`` on top."""
        cfg = get_cfg()
        settings: dict[str, object] = {
            "TRAINER.NAME": name,
            "DATASET.NAME": _NAME,
            "MODEL.BACKBONE.NAME": _NAME,
            "INPUT.SIZE": (self.clip.image_size,) * 2,
            "INPUT.PIXEL_MEAN": list(self.clip.mean),
            "INPUT.PIXEL_STD": list(self.clip.std),
            "INPUT.TRANSFORMS": ("center_crop", "normalize"),
            "INPUT.INTERPOLATION": "bicubic",
            "DATALOADER.NUM_WORKERS": 0,
            "DATALOADER.TEST.BATCH_SIZE": 100,
            "OPTIM.NAME": "sgd",
            "OPTIM.LR": 0.002,
            "OUTPUT_DIR": str(self.folder / "output"),
            "DEVICE": "cpu" if self.device.type == "meta" else self.device.type,
            "VERBOSE": False,
        }
        merge_opts(cfg, [part for pair in settings.items() for part in pair], source="the benchmark")
        merge_opts(cfg, opts, source="the benchmark's sizes")
        return cfg

    def batch(self, trainer: PromptTrainer, size: int, *, features: bool = False) -> dict[str, Tensor]:
        """Return a random batch of ``size`` pictures, or of their features as the cached views give them."""
        shape = (size, self.clip.embed_dim) if features else (size, 3, self.clip.image_size, self.clip.image_size)
        generator = torch.Generator().manual_seed(1)
        if self.device.type == "meta":
            return {"img": torch.empty(shape, device="meta"), "label": torch.empty(size, device="meta", dtype=torch.long)}
        img = torch.randn(shape, generator=generator)
        label = torch.randint(trainer.num_classes, (size,), generator=generator)
        return {"img": nn.functional.normalize(img, dim=-1) if features else img, "label": label}


def draw(folder: Path, count: int = 8) -> list[str]:
    """Draw ``count`` JPEGs of 500 x 375 pixels, a common size in the benchmark data sets, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for i in range(count):
        path = folder / f"{i}.jpg"
        if not path.is_file():
            coarse = np.random.RandomState(i).randint(0, 256, size=(12, 16, 3)).astype(np.uint8)
            Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)
        paths.append(str(path))
    return paths


def _dataset(paths: list[str], names: list[str], pictures: int, test: int, experts: int) -> Callable[[CfgNode], DatasetBase]:
    def build(cfg: CfgNode) -> DatasetBase:
        train = [Datum(paths[(c + k) % len(paths)], c, 0, name) for c, name in enumerate(names) for k in range(pictures)]
        tests = [Datum(paths[i % len(paths)], i % len(names), 0, names[i % len(names)]) for i in range(test)]
        dataset = DatasetBase(train_x=train, val=tests, test=tests)
        dataset.templates = list(IMAGENET_80[:3])
        dataset.template_groups = [list(IMAGENET_80[e::experts][:3]) for e in range(experts)]
        dataset.all_classnames = names
        dataset.descriptions = {name: [f"A {name} seen from the front.", f"A {name} has parts."] for name in names}
        return dataset

    return build


@contextmanager
def _one_template(clip: CLIP) -> Iterator[None]:
    """Have one template's features stand for all of an ensemble: what is counted afterwards asks for their shape alone."""
    encode = clip._raw_features

    def first(templates: Sequence[str], *how: Any) -> Tensor:
        return encode(templates[:1], *how).repeat(len(templates), 1, 1)

    clip._raw_features = first  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del clip._raw_features


def learn(trainer: PromptTrainer, batch: dict[str, Tensor]) -> None:
    """Compute a batch's loss and gradients, without the optimizer's step; works on ``meta`` too."""
    terms = trainer.model.loss(trainer.model.step(batch["img"], batch["label"]))
    terms.total.backward()


@contextmanager
def silenced() -> Iterator[None]:
    """Keep what trainers log out of the table, and progress bars off the terminal."""
    with quiet(logging.ERROR), open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stderr(nowhere):
        yield


class Minimum:
    """Counts what no way of doing the work can avoid: image tower, and unique text tokens through the linear layers."""

    def __init__(self, clip: CLIP) -> None:
        self._clip = clip
        tower = clip.text
        layers = sum(p.numel() for p in tower.blocks.parameters() if p.dim() == 2)
        self._per_token = 2 * layers / 1e9
        self._per_image = 0.0
        self.gflops = 0.0

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Add up what passes through the towers inside the context."""
        self._per_image = self._per_image or _image_gflops(self._clip)
        hooks = (
            self._clip.text.register_forward_hook(self._text),
            self._clip.image.register_forward_hook(self._image),
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _text(self, tower: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        prompts = args[0]
        tokens = prompts.prefix.shape[0] * (prompts.prefix.shape[1] + prompts.tail.shape[1])
        self.gflops += tokens * self._per_token * (2 if output.requires_grad else 1)

    def _image(self, tower: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self.gflops += len(output) * self._per_image * (2 if output.requires_grad else 1)


def _image_gflops(clip: CLIP) -> float:
    parameter = next(clip.image.parameters())
    images = torch.zeros(1, 3, clip.image_size, clip.image_size, device=parameter.device)
    with torch.no_grad():
        return count(lambda: clip.image(images)).gflops


def minimum(trainer: PromptTrainer, work: Callable[[], object]) -> float:
    """Return the GFLOP that ``work`` can't do without."""
    counter = Minimum(trainer.clip)
    with counter.listen():
        work()
    return counter.gflops
