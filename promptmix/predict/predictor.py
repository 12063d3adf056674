"""Classifies any picture with what a run learned, also among class names that it never saw.

``promptmix.load("output/run").predict(["cat.jpg"], classnames=["cat", "dog"])``. The data set of the run is not needed: its words
(class names, templates) are in ``results.json``. A predictor may be called from several threads, as web servers do.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from yacs.config import CfgNode

from promptmix import config
from promptmix.config.checks import check_templates
from promptmix.config.declare import shown
from promptmix.config.places import places_of_parts
from promptmix.data.reading.images import READINGS, as_rgb, read_bytes, read_image
from promptmix.data.reading.transforms import build_transform
from promptmix.engine.checkpoint import load_state_dict_strict
from promptmix.errors import CheckpointError, ConfigError, DataError, WeightsError
from promptmix.files.places import is_own_place
from promptmix.plugin_manager import check_plugins, load_plugin
from promptmix.predict.given import Picture, checked, count, each, texts
from promptmix.prompts.learner import Learner, PromptLearner
from promptmix.prompts.step import Step
from promptmix.prompts.trainer import PromptTrainer
from promptmix.registry import TRAINER_REGISTRY
from promptmix.runs import calibration, results
from promptmix.runs.hub import place_of
from promptmix.runs.results import FILE_NAME, RunResult
from promptmix.utils import get_logger, quiet

__all__ = ["Picture", "Prediction", "Predictor", "forget_places", "load", "read_result"]


@dataclass(frozen=True)
class Prediction:
    """What a picture shows.

    Attributes:
        image: its path, or "" for one that was given as a picture or as bytes.
        classnames: class names, the most probable first.
        probabilities: their probabilities.
        embedding: normalised image feature (D,), or (E, D) where experts prompt the image tower; None unless asked for.
    """

    image: str
    classnames: tuple[str, ...]
    probabilities: tuple[float, ...]
    embedding: Tensor | None = field(default=None, compare=False, repr=False)

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
    device: str | torch.device = "",
    plugins: Sequence[str] = (),
    reading: str = "",
    weights: str | Path = "",
    descriptions: str | Path = "",
    temperature: float | None = None,
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
            else's, so that no file is opened just because a run names it.
        descriptions: file or folder of sentences about the classes, for methods that read them (``DATASET.DESCRIPTIONS``), where
            the run had one of its own or class names are new to it.
        temperature: scores are divided by it before they become probabilities; None = the one that was fitted on the run's val
            pictures (`promptmix eval RUN --calibrate`, and `fit`), 1 where there is none.

    Raises:
        UserError: the folder holds no run, its checkpoint is missing, its method can't be rebuilt, or it names a file.
    """
    files = {"weights": weights, "descriptions": descriptions}
    return Predictor(run, epoch=epoch, device=device, plugins=plugins, reading=reading, temperature=temperature, **files)


class Predictor:
    """A run's method with its learned tensors, without its data set. Arguments as for ``load``.

    Attributes:
        result: the run's ``results.json``.
        classnames: names of the classes that the run told apart.
        reading: how pictures are read, ``upright`` or ``benchmark``.
        temperature: what scores are divided by.
        config: the run's config, without the files and folders that it names.
    """

    def __init__(
        self,
        run: str | Path,
        *,
        epoch: int | None = None,
        device: str | torch.device = "",
        plugins: Sequence[str] = (),
        reading: str = "",
        weights: str | Path = "",
        descriptions: str | Path = "",
        temperature: float | None = None,
    ) -> None:
        checked("reading", reading, str, f"{', '.join(map(repr, READINGS))}, or leave it out")
        checked("device", device, (str, torch.device), "auto, cpu or cuda, or leave it out")
        checked("weights", weights, (str, Path), "the path of a file, or leave it out")
        checked("descriptions", descriptions, (str, Path), "the path of a file, or leave it out")
        if reading not in ("", *READINGS):
            raise ConfigError(f"reading is {reading!r}; choose from {', '.join(map(repr, READINGS))}, or leave it out")
        check_plugins()
        if not isinstance(plugins, (list, tuple)):
            raise ConfigError(f"plugins is {shown(plugins)}; give a list of modules or files")
        for plugin in plugins:
            load_plugin(plugin)
        if not isinstance(run, (str, Path)) or "\0" in str(run):
            raise ConfigError(f"the run is {shown(run)}; give the output folder of a run")
        if epoch is not None:
            count("epoch", epoch)
        folder = place_of(run)
        self.result = read_result(folder)
        cfg = config.get_cfg()
        config.merge_tree(cfg, self.result.config, str(folder / FILE_NAME))
        forget_places(cfg, folder, str(weights), str(descriptions))
        cfg.VERBOSE = False
        cfg.DEVICE = str(device) or cfg.DEVICE
        config.check_values(cfg)
        cfg.freeze()
        self._folder, self.config = folder, cfg
        self.temperature = _temperature(folder, self.result, epoch, temperature)
        self._lock = threading.RLock()
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
        self._classifier_of = lru_cache(maxsize=8)(self._build_classifier)

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
        embeddings: bool = False,
    ) -> list[Prediction]:
        """Classify pictures.

        Args:
            images: paths (``pack.zip::member`` too), pictures, or contents of picture files as bytes; one, or several.
            classnames: names to choose from; None = the run's own.
            batch_size: pictures at a time.
            unreadable: gets a line for each picture that can't be read, which is then left out; None = stop at the first.
            embeddings: also give each picture's feature.

        Raises:
            DataError: a picture can't be read.
            ConfigError: the names are no list of texts, fewer than one, or one is twice there; a picture is none.
            CheckpointError: the run's prompts belong to its own classes.
        """
        options: dict[str, Any] = {"batch_size": batch_size, "unreadable": unreadable, "embeddings": embeddings}
        return list(self.stream(list(each(images)), classnames, **options))

    def stream(
        self,
        images: Iterable[Picture] | Picture,
        classnames: Sequence[str] | None = None,
        *,
        batch_size: int = 32,
        unreadable: list[str] | None = None,
        embeddings: bool = False,
    ) -> Iterator[Prediction]:
        """Classify pictures as they come, a batch at a time; arguments and errors as for ``predict``.

        Yields:
            Predictions in the order of the pictures.
        """
        count("batch_size", batch_size)
        checked("unreadable", unreadable, (list, type(None)), "a list, which gets a line for each, or leave it out")
        checked("embeddings", embeddings, bool, "True or False")
        names = self._names(classnames)
        learner, classifier = self.classifier(names)
        given = each(images)
        while batch := list(islice(given, batch_size)):
            readable, inputs = self._read_batch(batch, unreadable)
            if readable:
                yield from self._batch(learner, classifier, readable, inputs, names, embeddings)

    def _names(self, classnames: Sequence[str] | None) -> tuple[str, ...]:
        """Return the names to choose from."""
        if isinstance(classnames, (str, bytes)):
            raise ConfigError(f"classnames is {shown(classnames)}; give a list of names, such as [{shown(classnames)}]")
        names = self.classnames if classnames is None else texts(classnames)
        if not names or len(set(names)) < len(names) and classnames is not None:
            raise ConfigError(f"class names {list(names)} must be one or more, each once")
        return names

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        device: torch.device = self._trainer.device
        return device

    def classifier(self, classnames: Sequence[str] | None = None) -> tuple[PromptLearner, Any]:
        """Return the method with its learned tensors for class names (None = the run's own), and what its ``logits`` needs.

        Raises:
            ConfigError: the names are no list of texts, fewer than one, or one is twice there.
            CheckpointError: the run's prompts belong to its own classes.
        """
        with self._lock:
            return self._classifier_of(self._names(classnames))

    def _build_classifier(self, names: tuple[str, ...]) -> tuple[PromptLearner, Any]:
        with torch.no_grad(), quiet():
            learner = self._build_learner(names)
            with self._trainer.precision.autocast():
                return learner, learner.classifier()

    def learner(self, names: Sequence[str]) -> PromptLearner:
        """Return the run's method for class names.

        Raises:
            CheckpointError: the run's prompts belong to its own classes.
        """
        return self.classifier(names)[0]

    def _read_batch(self, images: list[Picture], unreadable: list[str] | None) -> tuple[list[Picture], Tensor]:
        """Return those pictures that can be read, with their pixels (B, 3, H, W)."""
        batch: list[Picture] = []
        inputs: list[Tensor] = []
        for image in images:
            try:
                inputs.append(self._transform(self._picture(image)))
                batch.append(image)
            except DataError as error:
                if unreadable is None:
                    raise
                unreadable.append(str(error))
        return batch, torch.stack(inputs) if inputs else torch.empty(0)

    def _picture(self, image: Picture) -> Image.Image:
        """Return a picture as RGB."""
        if isinstance(image, bytes):
            return read_bytes(image, self.reading)
        return as_rgb(image, self.reading) if isinstance(image, Image.Image) else read_image(str(image), self.reading)

    @torch.no_grad()
    def _batch(
        self,
        learner: PromptLearner,
        classifier: Any,
        batch: list[Picture],
        inputs: Tensor,
        names: tuple[str, ...],
        embeddings: bool,
    ) -> list[Prediction]:
        with self._lock, self._trainer.precision.autocast():
            given = inputs.to(self._trainer.device, torch.float32)  # whatever the default of the program is
            if embeddings or not learner.routes_first:
                given = learner.encode_images(given)
            logits, _ = learner.infer(given, classifier)
            seen = embedding_of(learner, given).float().cpu() if embeddings else None
        if bool(logits.isnan().any()):
            raise CheckpointError(f"scores of the run in {self._folder} are NaN, so no class can be chosen; train it again")
        probabilities = (logits.float() / self.temperature).softmax(dim=-1).cpu()
        ranked, order = probabilities.sort(dim=-1, descending=True, stable=True)
        return [
            Prediction(
                str(image) if isinstance(image, (str, Path)) else "",
                tuple(names[i] for i in ranks),
                tuple(values),
                None if seen is None else seen[row],
            )
            for row, (image, ranks, values) in enumerate(zip(batch, order.tolist(), ranked.tolist(), strict=True))
        ]

    def _load(self, folder: Path, epoch: int | None) -> None:
        """Load the checkpoint that the run was tested with, or that of ``epoch``."""
        tested = self.result.checkpoint or {}
        if tested:
            epoch = tested.get("epoch") if epoch is None else epoch
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


def embedding_of(learner: PromptLearner, features: Tensor) -> Tensor:
    """Return normalised image features (B, D), or (B, E, D), of what ``learner.encode_images`` gave."""
    return Step(learner, None, features=features).image if isinstance(learner, Learner) else features


def _temperature(folder: Path, result: RunResult, epoch: int | None, given: float | None) -> float:
    """Return what scores are divided by: what the caller says, or what was fitted for this checkpoint.

    Raises:
        ConfigError: the caller's is not a positive number.
    """
    if given is not None:
        if isinstance(given, bool) or not isinstance(given, (int, float)) or not 0 < given < 1e300:
            raise ConfigError(f"temperature is {shown(given)}; give a positive number, or leave it out")
        return float(given)
    found = calibration.read(folder)
    if found is None:
        return 1.0
    last = result.config.get("OPTIM", {}).get("MAX_EPOCH")
    best = result.config.get("TEST", {}).get("FINAL_MODEL") == "best_val"
    tested = None if best else last
    if (epoch or tested) != (found.epoch or tested):
        get_logger().warning(
            "%s was fitted for another checkpoint, so probabilities are not calibrated; run `promptmix eval %s --calibrate "
            "--load-epoch %s`",
            folder / calibration.FILE,
            folder,
            epoch,
        )
        return 1.0
    return found.temperature


def forget_places(cfg: CfgNode, folder: Path, weights: str, descriptions: str) -> None:
    """Take the files and folders out of a run's config: nothing is opened, and nothing written, since a run says so.

    Raises:
        WeightsError: the run had backbone weights of its own, and the caller named none.
        DataError: the same of sentences about its classes.
    """
    recorded = cfg.MODEL.BACKBONE.WEIGHTS
    if recorded and not weights and not is_own_place(recorded):
        raise WeightsError(
            f"the run in {folder} had its backbone from {recorded}; a run may be somebody else's, so no file is opened just "
            f'because it says so: name the file yourself, with --weights {recorded} (in Python weights="{recorded}")'
        )
    cfg.MODEL.BACKBONE.WEIGHTS = weights or recorded
    sentences = cfg.DATASET.DESCRIPTIONS
    if sentences and not descriptions:
        raise DataError(
            f"the run in {folder} read sentences about its classes from {sentences}; a run may be somebody else's, so no file "
            f'is opened just because it says so: name it yourself, with --descriptions {sentences} (in Python descriptions="...")'
        )
    cfg.DATASET.DESCRIPTIONS = descriptions
    for key in places_of_parts(cfg):
        config.merge_opts(cfg, [key, ""], source="predict")
    cfg.MODEL.INIT_WEIGHTS = cfg.RESUME = cfg.DATASET.ROOT = ""  # the checkpoint holds every learned tensor
    cfg.OUTPUT_DIR = str(folder)
    cfg.INPUT.FEATURE_CACHE, cfg.INPUT.FEATURE_CACHE_DIR, cfg.INPUT.PICTURE_CACHE = False, "", False


def read_result(folder: Path) -> RunResult:
    """Return the result in a run's folder, with its class names.

    Raises:
        DataError: there is none, or an older promptmix wrote it without.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        raise DataError(f"no {path}; name the output folder of a run that finished")
    result = results.load(path)
    names = result.vocabulary.get("classnames")
    if not names:
        raise DataError(f"{path} has no class names (an older promptmix wrote it); test that run again with --eval-only")
    for key in ("templates", "all_classnames"):
        if not result.vocabulary.get(key):
            raise DataError(f"{path}: vocabulary has no {key}; test that run again with --eval-only")
    for key, templates in (("templates", result.vocabulary["templates"]), *_groups(result.vocabulary)):
        check_templates(f"{path}: vocabulary.{key}", templates)
    return result


def _groups(vocabulary: dict[str, Any]) -> list[tuple[str, list[str]]]:
    return [("template_groups", group) for group in vocabulary.get("template_groups", [])]


def _without_data(cfg: CfgNode, vocabulary: dict[str, Any]) -> Any:
    """Build the run's trainer around its words instead of its data set."""
    trainer_class = TRAINER_REGISTRY.get(cfg.TRAINER.NAME)
    if not issubclass(trainer_class, PromptTrainer):
        raise ConfigError(f"predictions need a PromptTrainer, which {cfg.TRAINER.NAME} is not; evaluate it with --eval-only")
    names = list(vocabulary["classnames"])

    def build_data_loader(self: Any) -> None:
        self.train_loader_x = self.train_loader_u = self.val_loader = self.test_loader = None
        self.num_classes, self.num_source_domains, self.lab2cname = len(names), 0, dict(enumerate(names))
        self.dm = SimpleNamespace(dataset=SimpleNamespace(**vocabulary))

    # Under the trainer's own name, which is what a checkpoint knows its writer by.
    return type(trainer_class.__name__, (trainer_class,), {"build_data_loader": build_data_loader})(cfg)
