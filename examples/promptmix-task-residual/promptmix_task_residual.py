"""TaskRes: Task Residual for Tuning Vision-Language Models, as a plugin, with a data set of drawn shapes.

Tao Yu, Zhihe Lu, Xin Jin, Zhibo Chen, Xinchao Wang. CVPR 2023. https://arxiv.org/abs/2211.10277

| paper | here |
|---|---|
| t, base classifier: features of hard prompts | ``ResidualClassifier.base`` (C, D) |
| x, task residual, zero at the start | ``ResidualClassifier.residual`` (C, D) |
| t' = t + alpha x | ``ResidualClassifier.classifier``, normalised again |
| alpha | ``TRAINER.TASKRESIDUAL.ALPHA`` |

One residual belongs to each class, so the checkpoint can't serve other classes than those it was trained on.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn

from promptmix import register
from promptmix.config import CfgNode
from promptmix.config.declare import Setting
from promptmix.data import DatasetBase, Datum
from promptmix.data.fewshot import generate_fewshot, subsample_classes
from promptmix.prompts.learner import PromptLearner
from promptmix.prompts.roles import Task
from promptmix.prompts.trainer import PromptTrainer

__version__ = "0.1.0"

COLORS = {"red": (220, 40, 40), "green": (40, 170, 70), "blue": (50, 80, 220)}
SHAPES = ("circle", "square", "triangle")
PICTURES = {"train": 16, "val": 4, "test": 8}  # of each class
SIDE = 64  # pixels


class ResidualClassifier(PromptLearner):
    """A hard-prompt classifier with a learned residual.

    Args:
        task: the frozen model and the data set's words.
        alpha: scale of the residual.
    """

    base: Tensor

    def __init__(self, task: Task, alpha: float) -> None:
        super().__init__(task)
        self.alpha = alpha
        self.register_buffer("base", task.clip.ensemble(task.templates, task.classnames), persistent=False)
        self.residual = nn.Parameter(torch.zeros_like(self.base))

    def classifier(self) -> Tensor:
        """Return classifier weights (C, D)."""
        return F.normalize(self.base + self.alpha * self.residual, dim=-1)

    def logits(self, image_features: Tensor, classifier: Tensor) -> Tensor:
        """Return scores (B, C) for image features (B, D)."""
        return self.clip.scale * image_features @ classifier.to(image_features.dtype).T


@register
class TaskResidual(PromptTrainer):
    """Learns what the task adds to the text features, with cross-entropy."""

    def compose(self, task: Task, alpha: Annotated[float, Setting("scale of the residual", low=0)] = 0.5) -> PromptLearner:
        """Return the classifier with its residual; its settings are the keys of ``TRAINER.TASKRESIDUAL``."""
        return ResidualClassifier(task, alpha)


@register
class DrawnShapes(DatasetBase):
    """Circles, squares and triangles in three colours, drawn once into ``<DATASET.ROOT>/drawn_shapes``."""

    def __init__(self, cfg: CfgNode) -> None:
        """Draw what is missing, take the shots, and keep the base or new classes."""
        classes = sorted(f"{color} {shape}" for color in COLORS for shape in SHAPES)
        folder = Path(cfg.DATASET.ROOT, "drawn_shapes")
        splits = [_draw_split(folder, part, classes) for part in PICTURES]
        if cfg.DATASET.NUM_SHOTS >= 1:
            splits[0] = generate_fewshot(splits[0], cfg.DATASET.NUM_SHOTS)
        train, val, test = subsample_classes(*splits, subsample=cfg.DATASET.SUBSAMPLE_CLASSES)
        super().__init__(train_x=train, val=val, test=test)
        self.templates = ["a drawing of a {}.", "an icon of a {}."]
        self.all_classnames = classes


def _draw_split(folder: Path, part: str, classes: list[str]) -> list[Datum]:
    """Return the pictures of one split, drawing those that are not there yet."""
    items = []
    for label, name in enumerate(classes):
        color, shape = name.split()
        for number in range(PICTURES[part]):
            path = folder / part / f"{name.replace(' ', '_')}_{number:02d}.png"
            if not path.is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                _draw(color, shape, random.Random(f"{part} {name} {number}")).save(path)
            items.append(Datum(impath=str(path), label=label, classname=name))
    return items


def _draw(color: str, shape: str, draw: random.Random) -> Image.Image:
    """Draw one shape at a random place and size, in a colour that varies a little, on a light ground."""
    picture = Image.new("RGB", (SIDE, SIDE), tuple(draw.randint(225, 255) for _ in range(3)))
    size = draw.randint(SIDE // 3, SIDE * 3 // 4)
    x, y = draw.randint(0, SIDE - size), draw.randint(0, SIDE - size)
    fill = tuple(min(255, max(0, value + draw.randint(-30, 30))) for value in COLORS[color])
    pen = ImageDraw.Draw(picture)
    if shape == "circle":
        pen.ellipse((x, y, x + size, y + size), fill=fill)
    elif shape == "square":
        pen.rectangle((x, y, x + size, y + size), fill=fill)
    else:
        pen.polygon(((x, y + size), (x + size, y + size), (x + size // 2, y)), fill=fill)
    return picture
