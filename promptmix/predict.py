"""Classifies any picture with what a run learned, also among class names that it never saw.

``promptmix.load("output/run").predict(["cat.jpg"], classnames=["cat", "dog"])``. The data set of the run is not needed: its words
(class names, templates) are in ``results.json``.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from yacs.config import CfgNode

from promptmix import config
from promptmix.config.declare import shown
from promptmix.config.places import places_of_parts
from promptmix.data.reading.images import READINGS, as_rgb, read_image
from promptmix.data.reading.transforms import build_transform
from promptmix.engine.checkpoint import load_state_dict_strict
from promptmix.errors import CheckpointError, ConfigError, DataError, WeightsError
from promptmix.files.places import is_own_place
from promptmix.plugin_manager import check_plugins, load_plugin
from promptmix.prompts.learner import PromptLearner
from promptmix.prompts.trainer import PromptTrainer
from promptmix.registry import TRAINER_REGISTRY
from promptmix.runs import results
from promptmix.runs.hub import place_of
from promptmix.runs.results import FILE_NAME, RunResult
from promptmix.utils import get_logger

__all__ = ["Prediction", "Predictor", "load"]

Picture = str | Path | Image.Image


@dataclass(frozen=True)
class Prediction:
    """What a picture shows.

    Attributes:
        image: its path, or "" for one that was given as a picture.
        classnames: class names, the most probable first.
        probabilities: their probabilities.
    """

    image: str
    classnames: tuple[str, ...]
    probabilities: tuple[float, ...]

    @property
    def classname(self) -> str:
        """The most probable class."""
        return self.classnames[0]

    @property
    def probability(self) -> float:
        """Its probability."""
        return self.probabilities[0]


def load(
    run: str | Path,
    *,
    epoch: int | None = None,
    device: str = "",
    plugins: Sequence[str] = (),
    reading: str = "",
    weights: str | Path = "",
    descriptions: str | Path = "",
) -> Predictor:
    """Load the learned prompts of a run for predictions.

    Args:
        run: output folder of the run.
        epoch: which checkpoint; None = the one that the run was tested with.
        device: auto, cpu or cuda; "" = as the run.
        plugins: modules or files that the run loaded with ``--plugin``.
        reading: ``upright`` (EXIF turns, transparent on white) or ``benchmark`` (as CoOp reads); "" = the run's
            ``INPUT.READING``, and upright where that is ``auto``, whatever the run was trained on: the pictures are the user's.
        weights: file of the backbone, where the run had one of its own (``MODEL.BACKBONE.WEIGHTS``). A run may be somebody
            else's, so that no file is opened only since a run names it.
        descriptions: file or folder of sentences about the classes, for methods that read them (``DATASET.DESCRIPTIONS``), where
            the run had one of its own or class names are new to it.

    Raises:
        UserError: the folder holds no run, its checkpoint is missing, its method can't be rebuilt, or it names a file.
    """
    files = {"weights": weights, "descriptions": descriptions}
    return Predictor(run, epoch=epoch, device=device, plugins=plugins, reading=reading, **files)


class Predictor:
    """A run's method with its learned tensors, without its data set. Arguments as for ``load``.

    Attributes:
        result: the run's ``results.json``.
        classnames: names of the classes that the run told apart.
        reading: how pictures are read, ``upright`` or ``benchmark``.
    """

    def __init__(
        self,
        run: str | Path,
        *,
        epoch: int | None = None,
        device: str = "",
        plugins: Sequence[str] = (),
        reading: str = "",
        weights: str | Path = "",
        descriptions: str | Path = "",
    ) -> None:
        if reading not in ("", *READINGS):
            raise ConfigError(f"reading is {reading!r}; choose from {', '.join(map(repr, READINGS))}, or leave it out")
        check_plugins()
        for plugin in plugins:
            load_plugin(plugin)
        if not isinstance(run, (str, Path)) or "\0" in str(run):
            raise ConfigError(f"the run is {shown(run)}; give the output folder of a run")
        if epoch is not None and (type(epoch) is not int or epoch < 1):
            raise ConfigError(f"epoch is {shown(epoch)}; give a whole number from 1 on, or leave it out")
        folder = place_of(run)
        self.result = read_result(folder)
        cfg = config.get_cfg()
        config.merge_tree(cfg, self.result.config, str(folder / FILE_NAME))
        forget_places(cfg, folder, str(weights), str(descriptions))
        cfg.VERBOSE = False
        cfg.DEVICE = device or cfg.DEVICE
        config.check_values(cfg)
        cfg.freeze()
        self._folder = folder
        self.reading = reading or (cfg.INPUT.READING if cfg.INPUT.READING != "auto" else "upright")
        self.classnames: tuple[str, ...] = tuple(self.result.vocabulary["classnames"])
        with quiet():
            self._trainer = _without_data(cfg, self.result.vocabulary)
            self._load(folder, epoch)
            self._trainer.set_model_mode("eval")
            transform = self._trainer.test_transform() or build_transform(cfg, is_train=False)
        if transform is None:
            raise ConfigError(
                f"the run in {folder} was made with INPUT.NO_TRANSFORM, so its method can't be given plain pictures"
            )
        self._transform = transform
        self._learner_of = lru_cache(maxsize=8)(self._build_learner)

    @property
    def trainer(self) -> PromptTrainer:
        """The run's trainer with its learned tensors, without loaders."""
        found: PromptTrainer = self._trainer
        return found

    def predict(
        self,
        images: Iterable[Picture] | Picture,
        classnames: Sequence[str] | None = None,
        *,
        batch_size: int = 32,
        unreadable: list[str] | None = None,
    ) -> list[Prediction]:
        """Classify pictures.

        Args:
            images: paths (``pack.zip::member`` too) or pictures; one, or several.
            classnames: names to choose from; None = the run's own.
            batch_size: pictures at a time.
            unreadable: gets a line for each picture that can't be read, which is then left out; None = stop at the first.

        Raises:
            DataError: a picture can't be read.
            ConfigError: the names are no list of texts, fewer than one, or one is twice there; a picture is none.
            CheckpointError: the run's prompts belong to its own classes.
        """
        if type(batch_size) is not int or batch_size < 1:
            raise ConfigError(f"batch_size is {shown(batch_size)}; give a whole number from 1 on")
        if isinstance(classnames, (str, bytes)):
            raise ConfigError(f"classnames is {shown(classnames)}; give a list of names, such as [{shown(classnames)}]")
        names = self.classnames if classnames is None else _texts(classnames)
        if not names or len(set(names)) < len(names) and classnames is not None:
            raise ConfigError(f"class names {list(names)} must be one or more, each once")
        given = [images] if isinstance(images, Picture) else _listed(images)
        found: list[Prediction] = []
        with torch.no_grad(), quiet():
            learner = self._learner_of(names)
            with self._trainer.precision.autocast():
                classifier = learner.classifier()
            for start in range(0, len(given), batch_size):
                batch, inputs = self._read_batch(given[start : start + batch_size], unreadable)
                if batch:
                    found += self._batch(learner, classifier, batch, inputs.to(self._trainer.device), names)
        return found

    def learner(self, names: Sequence[str]) -> PromptLearner:
        """Return the run's method for class names.

        Raises:
            CheckpointError: the run's prompts belong to its own classes.
        """
        with torch.no_grad(), quiet():
            return self._learner_of(tuple(names))

    def _read_batch(self, images: list[Picture], unreadable: list[str] | None) -> tuple[list[Picture], Tensor]:
        """Return those pictures that can be read, with their pixels (B, 3, H, W)."""
        batch: list[Picture] = []
        inputs: list[Tensor] = []
        for image in images:
            try:
                picture = as_rgb(image, self.reading) if isinstance(image, Image.Image) else read_image(str(image), self.reading)
            except DataError as error:
                if unreadable is None:
                    raise
                unreadable.append(str(error))
            else:
                batch.append(image)
                inputs.append(self._transform(picture))
        return batch, torch.stack(inputs) if inputs else torch.empty(0)

    def _batch(
        self,
        learner: PromptLearner,
        classifier: Any,  # noqa: ANN401
        batch: list[Picture],
        inputs: Tensor,
        names: tuple[str, ...],
    ) -> list[Prediction]:
        with self._trainer.precision.autocast():
            logits: Tensor = learner.logits(learner.encode_images(inputs), classifier)
        probabilities, order = logits.float().softmax(dim=-1).cpu().sort(dim=-1, descending=True, stable=True)
        return [
            Prediction("" if isinstance(image, Image.Image) else str(image), tuple(names[i] for i in ranks), tuple(values))
            for image, ranks, values in zip(batch, order.tolist(), probabilities.tolist(), strict=True)
        ]

    def _load(self, folder: Path, epoch: int | None) -> None:
        """Load the checkpoint that the run was tested with, or that of ``epoch``."""
        tested = self.result.checkpoint or {}
        if tested:
            epoch = tested["epoch"] if epoch is None else epoch
            folder = Path(tested["directory"])
        self._trainer.load_model(str(folder), epoch=epoch)

    def _build_learner(self, names: tuple[str, ...]) -> PromptLearner:
        """Return the learner for ``names``, with the run's learned tensors."""
        learned: PromptLearner = self._trainer.model
        if names == self.classnames:
            return learned
        if learned.class_specific:
            raise CheckpointError(
                f"{self._folder} learned {learned.per_class} for each of its own {len(self.classnames)} classes, which can't "
                "serve other names; leave the class names out, or take a method that learns nothing for each class"
            )
        task = self._trainer._task()
        known = tuple(dict.fromkeys((*task.all_classnames, *names)))
        learner: PromptLearner = self._trainer.build_learner(replace(task, classnames=names, all_classnames=known))
        load_state_dict_strict(learner, learned.state_dict(), str(self._folder))
        return learner.to(self._trainer.device).eval()


def forget_places(cfg: CfgNode, folder: Path, weights: str, descriptions: str) -> None:
    """Take the files and folders out of a run's config: nothing is opened, and nothing written, since a run says so.

    Raises:
        WeightsError: the run had backbone weights of its own, and the caller named none.
        DataError: the same of sentences about its classes.
    """
    recorded = cfg.MODEL.BACKBONE.WEIGHTS
    if recorded and not weights and not is_own_place(recorded):
        raise WeightsError(
            f"the run in {folder} had its backbone from {recorded}; a run may be somebody else's, so no file is opened only "
            f'since it says so: name the file yourself, with --weights {recorded} (in Python weights="{recorded}")'
        )
    cfg.MODEL.BACKBONE.WEIGHTS = weights or recorded
    sentences = cfg.DATASET.DESCRIPTIONS
    if sentences and not descriptions:
        raise DataError(
            f"the run in {folder} read sentences about its classes from {sentences}; a run may be somebody else's, so no file "
            f'is opened only since it says so: name it yourself, with --descriptions {sentences} (in Python descriptions="...")'
        )
    cfg.DATASET.DESCRIPTIONS = descriptions
    for key in places_of_parts(cfg):
        config.merge_opts(cfg, [key, ""], source="predict")
    cfg.MODEL.INIT_WEIGHTS = cfg.RESUME = cfg.DATASET.ROOT = ""  # the checkpoint holds every learned tensor
    cfg.OUTPUT_DIR = str(folder)
    cfg.INPUT.FEATURE_CACHE, cfg.INPUT.FEATURE_CACHE_DIR = False, ""


def _texts(names: Any) -> tuple[str, ...]:  # noqa: ANN401  (whatever the caller gave)
    """Return class names as a tuple.

    Raises:
        ConfigError: they are no names.
    """
    try:
        found = tuple(names)
    except TypeError:
        found = ()
    if not found or not all(isinstance(name, str) and name.strip() for name in found):
        raise ConfigError(f"classnames is {shown(names)}; give a list of one or more names, each once")
    return found


def _listed(images: Any) -> list[Picture]:  # noqa: ANN401
    """Return pictures as a list.

    Raises:
        ConfigError: one of them is neither a path nor a picture.
    """
    try:
        found = list(images)
    except TypeError:
        found = [images]
    for image in found:
        if not isinstance(image, Picture):
            raise ConfigError(f"image is {shown(image)}; give paths or PIL pictures")
    return found


def read_result(folder: Path) -> RunResult:
    path = folder / FILE_NAME
    if not path.is_file():
        raise DataError(f"no {path}; name the output folder of a run that finished")
    result = results.load(path)
    names = result.vocabulary.get("classnames")
    if names and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise DataError(f"{path}: vocabulary.classnames must be a list of names; test that run again with --eval-only")
    if not names:
        raise DataError(f"{path} has no class names (an older promptmix wrote it); test that run again with --eval-only")
    return result


def _without_data(cfg: CfgNode, vocabulary: dict[str, Any]) -> Any:  # noqa: ANN401
    """Build the run's trainer around its words instead of its data set."""
    trainer_class = TRAINER_REGISTRY.get(cfg.TRAINER.NAME)
    if not issubclass(trainer_class, PromptTrainer):
        raise ConfigError(f"predictions need a PromptTrainer, which {cfg.TRAINER.NAME} is not; evaluate it with --eval-only")
    names = list(vocabulary["classnames"])

    def build_data_loader(self: Any) -> None:  # noqa: ANN401
        self.train_loader_x = self.train_loader_u = self.val_loader = self.test_loader = None
        self.num_classes, self.num_source_domains, self.lab2cname = len(names), 0, dict(enumerate(names))
        self.dm = SimpleNamespace(dataset=SimpleNamespace(**vocabulary))

    # Under the trainer's own name, which is what a checkpoint knows its writer by.
    return type(trainer_class.__name__, (trainer_class,), {"build_data_loader": build_data_loader})(cfg)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the trainer's progress messages off the output, but not its warnings."""
    logger = get_logger()
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)
