"""What parts are built for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from promptmix.clip import CLIP
from promptmix.data.descriptions import Descriptions


class Templates(tuple[str, ...]):
    """A data set's templates, which know whether anything has read one."""

    were_read = False

    def __iter__(self) -> Iterator[str]:
        self.were_read = True
        return super().__iter__()

    def __getitem__(self, place: Any) -> Any:  # a place or a slice
        self.were_read = True
        return super().__getitem__(place)


@dataclass(frozen=True)
class Task:
    """What parts are built for: the frozen model, the data set's words, and the labels that training will show.

    Attributes:
        clip: the frozen model, on its device.
        classnames: names of the C classes that are told apart, by label.
        all_classnames: names of all classes of the data set, base classes first.
        templates: the data set's hard templates, such as ``"a photo of a {}."``.
        template_groups: hard templates in groups of similar ones (MoCoOp's experts).
        train_labels: label of each training picture, in the data set's order; empty where there is no training set (``predict``).
        open_world: all classes are told apart, by what was trained on the base ones (the first half).
        descriptions: sentences about classes, for parts that read them.
    """

    clip: CLIP
    classnames: tuple[str, ...]
    all_classnames: tuple[str, ...]
    templates: tuple[str, ...]
    template_groups: tuple[tuple[str, ...], ...]
    train_labels: tuple[int, ...] = ()
    open_world: bool = False
    descriptions: Descriptions = field(default_factory=lambda: Descriptions({}))
    _ensembles: dict[tuple[str, ...], Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("templates", "template_groups"):
            object.__setattr__(self, name, Templates(getattr(self, name)))

    def raw_ensemble(self, templates: Sequence[str]) -> Tensor:
        """Return ``CLIP.raw_ensemble`` (C, D) of the classes told apart, encoded once for all parts that ask for it."""
        key = tuple(templates)
        if key not in self._ensembles:
            self._ensembles[key] = self.clip.raw_ensemble(key, self.classnames)
        return self._ensembles[key]

    def label_rows(self, features: Tensor) -> Tensor:
        """Pick from features (E, C_all, D) of all class names those of the classes told apart: (E, C, D)."""
        rows = {name: row for row, name in reversed(list(enumerate(self.all_classnames)))}
        return features[:, [rows[name] for name in self.classnames]]
