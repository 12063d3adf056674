"""A finished run with its learned tensors and, where they are at hand, its test pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from promptmix import config
from promptmix.config.flags import check_place, load_plugins
from promptmix.errors import ConfigError, DataError
from promptmix.predict import Predictor, forget_places, read_result
from promptmix.prompts.trainer import PromptTrainer
from promptmix.registry import TRAINER_REGISTRY
from promptmix.runs.hub import place_of
from promptmix.runs.results import FILE_NAME, RunResult
from promptmix.utils import quiet

__all__ = ["Opened", "open_run"]


@dataclass
class Opened:
    """A run that can be looked into.

    Attributes:
        folder: its output folder.
        result: its ``results.json``.
        trainer: its trainer, with the learned tensors.
        lacks: why the test pictures are not at hand; "" where they are.
    """

    folder: Path
    result: RunResult
    trainer: Any
    lacks: str = ""

    @torch.no_grad()
    def batches(self) -> Iterator[tuple[Tensor, Tensor, Any]]:
        """Go once through the test pictures: features as ``encode_images`` gives them, labels (B,), and the classifier."""
        trainer = self.trainer
        with quiet(), trainer._features_of("test"), trainer.precision.autocast():
            classifier = trainer.model.classifier()
            for batch in trainer.test_loader:
                inputs, labels = trainer.parse_batch_test(batch)
                yield trainer.encode_images(inputs), labels, classifier


def open_run(
    run: str | Path, *, root: str = "", weights: str = "", epoch: int | None = None, device: str = "", plugins: Sequence[str] = ()
) -> Opened:
    """Open a run's output folder.

    Args:
        run: the folder.
        root: folder of the data sets. A run may be somebody else's, so no place is read just because it says so; the embedded
            data sets need none.
        weights: file of the backbone, where the run had one of its own.
        epoch: which checkpoint; None = the one that the run was tested with.
        device: auto, cpu or cuda; "" = as the run.
        plugins: modules or files that the run loaded.

    Raises:
        UserError: the folder holds no run, its method can't be rebuilt, or ``root`` has no such data.
    """
    load_plugins(plugins)
    check_place("--root", root)
    folder = place_of(run)
    result = read_result(folder)
    trainer_class = TRAINER_REGISTRY.get(result.trainer)
    if not issubclass(trainer_class, PromptTrainer):
        raise ConfigError(
            f"the run in {folder} is of {result.trainer}, which has no prompts to look into; name a run of a method"
        )
    cfg = config.get_cfg()
    config.merge_tree(cfg, result.config, str(folder / FILE_NAME))
    forget_places(cfg, folder, weights, "")
    cfg.DATASET.ROOT, cfg.VERBOSE, cfg.DEVICE = root, False, device or cfg.DEVICE
    config.check_values(cfg)
    cfg.freeze()
    with quiet():
        try:
            trainer = trainer_class(cfg)
        except DataError as error:
            if root:
                raise
            predictor = Predictor(folder, epoch=epoch, device=device, weights=weights)
            return Opened(folder, result, predictor.trainer, f"{error}; give --root DIR, the folder of the data sets")
        names = [trainer.lab2cname[label] for label in range(trainer.num_classes)]
        if names != result.vocabulary["classnames"]:
            raise DataError(
                f"--root {root}: its classes are not those of the run in {folder}; name the data set that it was run on"
            )
        tested = result.checkpoint or {}
        place = tested.get("directory") or str(folder)
        trainer.load_model(str(place), epoch=tested.get("epoch") if epoch is None else epoch)
        trainer.set_model_mode("eval")
        cfg.defrost()
        cfg.INPUT.FEATURE_CACHE = bool(trainer.model.image_is_frozen)
        cfg.freeze()
    return Opened(folder, result, trainer)
