"""Teachers: whose class vectors and image features a student learns.

B images, C classes, D the teacher's joint width. A teacher scores by one vector for each class; such vectors can be kept in a
file, so that its text tower runs once.
"""

from __future__ import annotations

import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from promptmix.clip import CLIP
from promptmix.errors import CheckpointError
from promptmix.parallel import group
from promptmix.prompts.task import Task
from promptmix.utils import atomic_write

__all__ = ["Backbone", "ClassVectors", "Teacher"]


class Teacher(ABC):
    """Who teaches.

    Attributes:
        name: for messages and files.
        width: D.
        scale: factor on its cosines.
    """

    name: str
    width: int
    scale: float

    @abstractmethod
    def vectors(self, names: Sequence[str]) -> Tensor:
        """Return the normalised vector of each class name (C, D), without gradient."""

    @abstractmethod
    def image(self, images: Tensor) -> Tensor:
        """Return normalised features (B, D) of images (B, 3, S, S), without gradient."""


class Backbone(Teacher):
    """The frozen backbone with a hard prompt, the data set's first template."""

    def __init__(self, task: Task) -> None:
        self.clip: CLIP = task.clip
        self.template, self.name = task.templates[0], f"ZeroshotCLIP on {task.clip.name}"
        self.width, self.scale = task.clip.embed_dim, task.clip.scale.item()

    def vectors(self, names: Sequence[str]) -> Tensor:
        """Return the hard prompt's features (C, D)."""
        return self.clip.hard_features([self.template], names)[0]

    def image(self, images: Tensor) -> Tensor:
        """Return the frozen tower's features (B, D)."""
        return self.clip.encode_frozen(lambda: self.clip.encode_image(images))


@dataclass(frozen=True)
class ClassVectors:
    """A teacher's class vectors.

    Attributes:
        names: of the C classes.
        vectors: (C, D), normalised.
        scale: factor on the teacher's cosines.
        teacher: its name.
    """

    names: tuple[str, ...]
    vectors: Tensor
    scale: float
    teacher: str

    def of(self, names: Sequence[str]) -> Tensor | None:
        """Return the vectors (C, D) of ``names``, None where one is missing."""
        rows = {name: row for row, name in enumerate(self.names)}
        return self.vectors[[rows[name] for name in names]] if rows.keys() >= set(names) else None

    def save(self, path: Path) -> None:
        """Write a safetensors file: ``vectors`` and ``scale``, with ``names`` and ``teacher`` in its header.

        Raises:
            OutputError: it can't be written.
        """
        if not group.writes():
            return
        tensors = {"vectors": self.vectors.detach().float().cpu().contiguous(), "scale": torch.tensor(self.scale)}
        header = {"names": json.dumps(list(self.names)), "teacher": self.teacher}
        atomic_write(path, lambda file: save_file(tensors, file, metadata=header))

    @classmethod
    def read(cls, path: str) -> ClassVectors:
        """Read what ``save`` wrote.

        Raises:
            CheckpointError: no such file, or not one of class vectors.
        """
        file = Path(os.path.expanduser(path))
        if not file.is_file():
            raise CheckpointError(f"no class vectors {file}; name the class_vectors.safetensors of a run, or leave the key out")
        try:
            with safe_open(file, framework="pt") as opened:
                header = opened.metadata() or {}
                names, teacher = json.loads(header["names"]), header["teacher"]
                vectors, scale = opened.get_tensor("vectors").float(), float(opened.get_tensor("scale"))
        except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{file} holds no class vectors ({error}); name the class_vectors.safetensors of a run"
            ) from error
        texts = isinstance(names, list) and all(isinstance(name, str) for name in names) and len(set(names)) == len(names)
        fits = texts and vectors.dim() == 2 and len(vectors) == len(names) and vectors.isfinite().all() and math.isfinite(scale)
        if not fits:
            raise CheckpointError(f"{file}: names, vectors and scale do not go together; let a run write it anew")
        return cls(tuple(names), vectors, scale, teacher)
