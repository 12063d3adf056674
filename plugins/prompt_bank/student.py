"""A student of another model: image prompts, and a projector to its teacher's class vectors (PromptKD, arXiv 2403.02781).

B images, C classes, D the student's joint width, D' the teacher's. The bank is offered by its method, which names the teacher.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from promptmix.clip.vision import VisualPrompts
from promptmix.errors import CheckpointError, ConfigError, DataError
from promptmix.prompts.deep import VisionPrompts, check_depth
from promptmix.prompts.roles import ImageLevel, PromptBank, Task
from promptmix.prompts.teachers import Backbone, ClassVectors, Teacher


class Projector(nn.Module):
    """From the student's width D to the teacher's D': 1x1 convolution, batch norm, ReLU, 1x1 convolution."""

    def __init__(self, width: int, to: int) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(width, to, 1), nn.BatchNorm2d(to), nn.ReLU(), nn.Conv2d(to, to, 1))

    def forward(self, features: Tensor) -> Tensor:
        """Return (B, D') of features (B, D), not normalised.

        Raises:
            DataError: in training, one picture is not a batch to take statistics of.
        """
        if self.training and len(features) == 1:
            raise DataError("a batch of one picture has no statistics for batch norm; train on 2 pictures or more")
        projected: Tensor = self.conv1(features[..., None, None])
        return projected.flatten(1)


class Student(PromptBank):
    """Prompts of the image tower and a projector to the teacher's class vectors, which are the classifier.

    Args:
        teacher: whose image features are learned, and whose class vectors where none are given.
        given: class vectors that the caller names.
        n_ctx: learned tokens of a layer.
        depth: layers with tokens of their own.
        is_named: the caller names the teacher, so that it comes before what a checkpoint holds.
    """

    image_level: ImageLevel = "raw"
    needs_preparing = True
    training_only = ("vectors", "names", "of_backbone")

    vectors: Tensor
    names: Tensor
    of_backbone: Tensor

    def __init__(self, task: Task, teacher: Teacher, given: ClassVectors | None, n_ctx: int, depth: int, is_named: bool) -> None:
        super().__init__()
        check_depth(task.clip, "prompt_depth_vision", depth, vision=True)
        self.task, self.teacher, self.given, self.is_named = task, teacher, given, is_named
        width = teacher.width if given is None else given.vectors.shape[1]
        self.vision = VisionPrompts(task.clip.image.width, n_ctx, depth)
        self.projector = Projector(task.clip.embed_dim, width)
        self.register_buffer("vectors", torch.zeros(0, width))  # (C, D'), of all class names
        self.register_buffer("names", torch.zeros(0, dtype=torch.uint8))  # which these are: JSON in UTF-8
        self.register_buffer("of_backbone", torch.tensor(given is None and isinstance(teacher, Backbone)))
        self._known: dict[tuple[str, ...], Tensor] = {}

    def prepare(self, look: object) -> None:
        """Take the class vectors of all class names; the pictures are not looked at.

        Raises:
            ConfigError: the class vectors are of another teacher than the one whose image features are learned.
        """
        if self.given is not None and self.given.teacher != self.teacher.name:
            raise ConfigError(
                f"the class vectors are those of {self.given.teacher}, but the teacher is {self.teacher.name}; name the run that "
                "they are from in TRAINER.PROMPTKD.TEACHER, or leave CLASS_VECTORS out"
            )
        names = self.task.all_classnames
        self.vectors = self.class_vectors(names).clone()
        self.names = torch.tensor(list(json.dumps(names).encode()), dtype=torch.uint8, device=self.vectors.device)

    def class_vectors(self, names: Sequence[str]) -> Tensor:
        """Return the teacher's class vectors (C, D'): those that the caller names, else the checkpoint's, else the backbone's.

        Raises:
            DataError: nobody has them, or they have another width than the projector.
        """
        key = (*names, str(self.vectors.device))
        if key not in self._known:
            self._known[key] = self._find(names).to(self.vectors.device, self.vectors.dtype)
        return self._known[key]

    def _find(self, names: Sequence[str]) -> Tensor:
        if self.is_named and self.given is None or self.vectors.is_meta:
            found: Tensor | None = self.teacher.vectors(names)
        else:
            kept = ClassVectors(self.kept_names(), self.vectors, 0.0, "")
            rows = (table.of(names) for table in (self.given, kept) if table is not None)
            found = next((vectors for vectors in rows if vectors is not None), None)
            if found is None and (self.of_backbone or not isinstance(self.teacher, Backbone)):
                found = self.teacher.vectors(names)
        width = self.vectors.shape[1]
        if found is None or found.shape[1] != width:
            lack = f"there are no class vectors for all of {list(names)[:4]}"
            wrong = "" if found is None else f"the class vectors have width {found.shape[1]}, but the student learned {width}"
            raise DataError(
                f"{wrong or lack}; name the teacher's run in TRAINER.PROMPTKD.TEACHER, or a file with these names in "
                "TRAINER.PROMPTKD.CLASS_VECTORS"
            )
        return found

    def kept_names(self) -> tuple[str, ...]:
        """Return the class names whose vectors are kept.

        Raises:
            CheckpointError: a checkpoint was changed, so that names and vectors don't go together.
        """
        try:
            names = json.loads(bytes(self.names.tolist()).decode() or "[]")
        except ValueError:
            names = None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(names) != len(self.vectors):
            raise CheckpointError("the checkpoint's class names and class vectors do not go together; train the student anew")
        return tuple(names)

    def take_sizes(self, state: Mapping[str, Tensor]) -> None:
        """Take the teacher's width, and the number of class vectors, from a checkpoint."""
        self._known.clear()
        first = state.get("projector.conv1.0.weight")
        if first is not None and first.shape[1] == self.task.clip.embed_dim and not self.is_named:
            for name, own in self.projector.state_dict(keep_vars=True).items():
                own.data = own.new_zeros(state.get(f"projector.{name}", own).shape)
            self.vectors.data = self.vectors.new_zeros(0, len(first))
        for name in ("vectors", "names"):
            theirs, own = state.get(name), getattr(self, name)
            if theirs is not None and theirs.shape[1:] == own.shape[1:]:
                own.data = own.new_zeros(theirs.shape)

    def visual(self) -> Sequence[VisualPrompts]:
        return self.vision()

    def adapt(self, image: Tensor) -> Tensor:
        """Return normalised, projected features (B, D') of raw ones (B, D)."""
        return F.normalize(self.projector(image), dim=-1)

    def forward(self, names: Sequence[str], image_features: Tensor | None = None, *, full_stop: bool | None = None) -> Tensor:
        return self.class_vectors(names)[None]

    def references(self, names: Sequence[str]) -> Tensor:
        """Return the class vectors (1, C, D'), which nothing changes."""
        return self(names)
