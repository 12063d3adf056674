"""Trainers with Dassl's interface: data, model, evaluation, resume and log lines that every method shares."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from yacs.config import CfgNode

from promptmix.console import signals
from promptmix.data import DataManager
from promptmix.data.reading.loaders import TrainLoader
from promptmix.data.reading.streams import Streams, get_streams
from promptmix.engine.base import Names, TrainerBase, training_events
from promptmix.engine.checkpoint import load_checkpoint
from promptmix.engine.evaluator import build_evaluator
from promptmix.engine.log import progress
from promptmix.engine.meters import AverageMeter, MetricMeter
from promptmix.engine.precision import choose_device, clip_gradients
from promptmix.engine.run_folder import BEST_FILE, RunFolder
from promptmix.engine.samples import SampleKeeper
from promptmix.errors import CheckpointError, ConfigError
from promptmix.files.text import counted
from promptmix.parallel import group
from promptmix.plugin_manager import get_plugin_manager
from promptmix.registry import TRAINER_REGISTRY
from promptmix.utils import get_logger

__all__ = ["TRAINER_REGISTRY", "SimpleTrainer", "TrainerBase", "TrainerX", "TrainerXU", "build_trainer"]


def build_trainer(cfg: CfgNode) -> TrainerBase:
    """Build the trainer that ``TRAINER.NAME`` names.

    Raises:
        RegistryError: no such trainer; the message lists those there are.
    """
    get_plugin_manager()
    trainer_class = TRAINER_REGISTRY.get(cfg.TRAINER.NAME)
    if cfg.VERBOSE:
        get_logger().info("Loading trainer: %s", cfg.TRAINER.NAME)
    trainer: TrainerBase = trainer_class(cfg)
    return trainer


class SimpleTrainer(TrainerBase):
    """A trainer that builds itself from a config: data, model, evaluator; with resume, model selection and evaluation.

    Args:
        cfg: the whole config tree.
    """

    model: nn.Module  # made by build_model()

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        self.check_cfg(cfg)
        self.device = choose_device(cfg.DEVICE, cfg.USE_CUDA)
        self.waits_to_check = self.device.type == "cuda"
        self.start_epoch = self.epoch = 0
        self.max_epoch = cfg.OPTIM.MAX_EPOCH
        self.output_dir: str = cfg.OUTPUT_DIR
        self.cfg = cfg
        self.build_data_loader()
        self.build_model()
        self.evaluator = build_evaluator(cfg, lab2cname=self.lab2cname)
        self.best_result = -float("inf")
        #: Random states that the first epoch began with.
        self.first_streams: Streams = {}
        #: What the latest test said of each picture (see ``SampleKeeper.arrays``); empty where ``TEST.PREDICTIONS`` is 0.
        self.samples: dict[str, Any] = {}

    def check_cfg(self, cfg: CfgNode) -> None:
        """Raise ``ConfigError`` for settings that this trainer can't work with."""

    def build_data_loader(self) -> None:
        """Make the data attributes; an override must make the same ones (``dm`` is optional)."""
        dm = DataManager(self.cfg, custom_tfm_test=self.test_transform())
        self.train_loader_x: DataLoader[Any] = dm.train_loader_x
        self.train_loader_u: DataLoader[Any] | None = dm.train_loader_u
        self.val_loader: DataLoader[Any] | None = dm.val_loader
        self.test_loader: DataLoader[Any] = dm.test_loader
        self.num_classes: int = dm.num_classes
        self.num_source_domains: int = dm.num_source_domains
        self.lab2cname: dict[int, str] = dm.lab2cname
        self.dm = dm

    def test_transform(self) -> Callable[[Any], Any] | None:
        """Return what is done to the pictures of an evaluation; None = what the config says."""
        return None

    def build_model(self) -> None:
        """Make the model, its optimizer and its schedule, and register them."""
        raise NotImplementedError(f"{type(self).__name__} must define build_model()")

    def train(self) -> None:  # type: ignore[override]  # takes no epochs, as in Dassl
        """Train for ``OPTIM.MAX_EPOCH`` epochs, from where an earlier run stopped."""
        try:
            super().train(self.start_epoch, self.max_epoch)
        finally:
            for loader in vars(self).values():
                if isinstance(loader, TrainLoader):
                    loader.close()

    def before_train(self) -> None:
        """Resume if there is something to resume, and open the writer.

        Raises:
            CheckpointError: ``RESUME`` names a folder without checkpoints, or they don't fit.
        """
        directory = self.cfg.RESUME or self.cfg.OUTPUT_DIR
        self.start_epoch = self.load_progress(directory)
        if self.cfg.RESUME and not self.start_epoch:
            raise CheckpointError(f"nothing to resume in {directory}; --resume takes the output folder of a run")
        if self.start_epoch > self.max_epoch:
            raise CheckpointError(
                f"{directory} was trained for {counted(self.start_epoch, 'epoch')}, and OPTIM.MAX_EPOCH is "
                f"{self.max_epoch}; give it that value, or choose another --output-dir"
            )
        best_val = self.cfg.TEST.FINAL_MODEL == "best_val"
        if self.cfg.RESUME and best_val:
            for name in self.get_model_names() if group.writes() else ():  # the best epoch may be one of those done there
                RunFolder(self.output_dir).take_best(RunFolder(directory), name)
            group.wait()
        if self._random_states is None:
            self.first_streams = get_streams()
            if self.start_epoch and best_val:
                self.best_result = self._best_so_far()
        self.init_writer(str(Path(self.output_dir, "tensorboard")))
        self.time_start = time.time()

    def progress_state(self) -> dict[str, Any]:
        """Return the best result so far, the state of loss scaling, and the random states of the beginning too."""
        scaler = getattr(getattr(self, "precision", None), "scaler", None)
        return {
            **super().progress_state(),
            "best_result": self.best_result,
            "first_streams": self.first_streams,
            "scaler": None if scaler is None else scaler.state_dict(),
        }

    def load_progress_state(self, state: dict[str, Any]) -> None:
        """Take back what ``progress_state`` returned."""
        super().load_progress_state(state)
        self.best_result, self.first_streams = state["best_result"], dict(state["first_streams"])
        scaler = getattr(getattr(self, "precision", None), "scaler", None)
        if scaler is not None and state["scaler"] is not None:
            scaler.load_state_dict(state["scaler"])

    def after_train(self) -> None:
        """Evaluate the final model and say how long it took."""
        log = get_logger()
        log.info("Finish training")
        if not self.cfg.TEST.NO_TEST:
            if self.cfg.TEST.FINAL_MODEL == "best_val":
                log.info("Deploy the model with the best val performance")
                group.wait()  # for who writes it
                self.load_model(self.output_dir)
            else:
                log.info("Deploy the last-epoch model")
            self.test()
        elapsed = datetime.timedelta(seconds=round(time.time() - self.time_start))
        log.info("Elapsed: %s", elapsed)
        self.close_writer()

    def after_epoch(self) -> None:
        """Validate if the best model is wanted, and write checkpoints when due."""
        done = self.epoch + 1
        if not self.cfg.TEST.NO_TEST and self.cfg.TEST.FINAL_MODEL == "best_val":
            result = self.test(split="val")
            if result > self.best_result:
                self.best_result = result
                self.save_model(self.epoch, self.output_dir, val_result=result, model_name=BEST_FILE)
        freq = self.cfg.TRAIN.CHECKPOINT_FREQ
        if done == self.max_epoch or (freq > 0 and done % freq == 0):
            self.save_model(self.epoch, self.output_dir)

    @torch.no_grad()
    def test(self, split: str | None = None) -> float:
        """Evaluate on ``split`` (default ``TEST.SPLIT``; without validation data, the test split).

        Returns:
            The first of the evaluator's numbers; all of them are in ``last_results[split]``.
        """
        self.set_model_mode("eval")
        self.evaluator.reset()
        split = split or self.cfg.TEST.SPLIT
        if split == "val" and self.val_loader is not None:
            loader = self.val_loader
        else:
            split, loader = "test", self.test_loader
        get_logger().info("Evaluate on the *%s* set", split)
        most = self.cfg.TEST.get("PREDICTIONS", 0) if split == "test" else 0  # a real Dassl's tree lacks it
        keeper, checked = SampleKeeper(most) if most else None, False
        with signals.listening():
            for batch in progress(loader, desc=f"evaluate {split}"):
                signals.check()
                inputs, label = self.parse_batch_test(batch)
                scores = self.score_batch(inputs, label)
                if not checked:
                    group.refuse_differences([scores])
                    checked = True
                if keeper is not None:
                    keeper.take(scores, label, batch.get("impath"), self.kept_beside_scores())
        results = self.evaluator.evaluate()
        self.samples = {} if keeper is None else keeper.arrays(self.lab2cname)
        self.last_results[split] = results
        training_events().after_test(trainer=self, split=split, results=results)
        for name, value in results.items():
            self.write_scalar(f"{split}/{name}", value, self.epoch)
        return next(iter(results.values()))

    def score_batch(self, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Give the evaluator what the model says of a batch, and return the scores (B, C)."""
        scores = self.model_inference(inputs)
        self.evaluator.process(scores, labels)
        return scores

    def model_inference(self, input: torch.Tensor) -> torch.Tensor:
        """Return the model's scores (B, C)."""
        scores: torch.Tensor = self.model(input)
        return scores

    def kept_beside_scores(self) -> dict[str, torch.Tensor]:
        """Return what ``predictions.npz`` keeps of the batch that ``model_inference`` saw last: tensors (B, ...) by name."""
        return {}

    def model_update(self, names: Names = None) -> None:
        """Step the optimizers, gradients limited to ``TRAIN.CLIP_GRAD_NORM`` where it is set."""
        if self.cfg.TRAIN.CLIP_GRAD_NORM > 0:
            clip_gradients(self._optimizers(names), self.cfg.TRAIN.CLIP_GRAD_NORM)
        super().model_update(names)

    def parse_batch_test(self, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return pictures and labels on the device."""
        return batch["img"].to(self.device), batch["label"].to(self.device)

    def _best_so_far(self) -> float:
        """Return the validation result of the best model that an interrupted run left in this output folder."""
        path = RunFolder(self.output_dir).best(self.get_model_names()[0])
        result = None if path is None else load_checkpoint(path).get("val_result")
        return -float("inf") if result is None else float(result)

    # What the loops of TrainerX and TrainerXU share

    def _run_batches(self, batches: Iterator[tuple[dict[str, Any], ...]], num_batches: int) -> None:
        """Learn from each batch, print a line now and then, report scalars."""
        self.set_model_mode("train")
        self.num_batches = num_batches
        losses, batch_time, data_time = MetricMeter(), AverageMeter(), AverageMeter()
        freq = self.cfg.TRAIN.PRINT_FREQ
        scalars: list[tuple[str, float | torch.Tensor, int]] = []  # not reported yet
        end = time.time()
        for self.batch_idx, batch in enumerate(batches):
            signals.check()
            data_time.update(time.time() - end)
            summary = self.forward_backward(*batch)
            batch_time.update(time.time() - end)
            losses.update(summary)
            if not self.batch_idx:
                self.check_processes(summary)
            shows = (self.batch_idx + 1) % freq == 0 or num_batches < freq
            if shows:
                self.check_anomalies()
                get_logger().info(self._line(losses, batch_time, data_time))
            step = self.epoch * num_batches + self.batch_idx
            scalars += [("train/" + name, meter.pending_avg, step) for name, meter in losses.meters.items()]
            scalars.append(("train/lr", self.get_current_lr(), step))
            if shows or not any(isinstance(value, torch.Tensor) for _, value, _ in scalars):
                self._write_scalars(scalars)
            end = time.time()
        self.check_anomalies()
        self._write_scalars(scalars)

    def check_processes(self, summary: Any) -> None:  # what forward_backward returned
        """Refuse a step after which the processes of a training on several devices don't hold the same."""
        losses = [value for value in (summary or {}).values() if isinstance(value, torch.Tensor)]
        learned = [p for optim in self._optimizers() for one in optim.param_groups for p in one["params"]]
        group.refuse_differences(losses, learned)

    def _write_scalars(self, scalars: list[tuple[str, float | torch.Tensor, int]]) -> None:
        """Report and forget scalars; those that lie on a GPU are fetched together."""
        there = [value for _, value, _ in scalars if isinstance(value, torch.Tensor)]
        fetched = iter(torch.stack(there).tolist() if there else ())
        for tag, value, step in scalars:
            self.write_scalar(tag, next(fetched) if isinstance(value, torch.Tensor) else value, step)
        scalars.clear()

    def _line(self, losses: MetricMeter, batch_time: AverageMeter, data_time: AverageMeter) -> str:
        """Return the log line of the present batch."""
        left = self.num_batches - self.batch_idx - 1 + (self.max_epoch - self.epoch - 1) * self.num_batches
        eta = datetime.timedelta(seconds=int(batch_time.avg * left))
        return (
            f"epoch [{self.epoch + 1}/{self.max_epoch}] batch [{self.batch_idx + 1}/{self.num_batches}] "
            f"time {batch_time.val:.3f} ({batch_time.avg:.3f}) data {data_time.val:.3f} ({data_time.avg:.3f}) "
            f"{losses} lr {self.get_current_lr():.4e} eta {eta}"
        )


class TrainerX(SimpleTrainer):
    """A trainer that learns from labelled data only."""

    def run_epoch(self) -> None:
        """Go once through the labelled data."""
        self._run_batches(((batch,) for batch in self.train_loader_x), len(self.train_loader_x))

    def parse_batch_train(self, batch: dict[str, Any]) -> Any:
        """Return pictures, labels and domains on the device."""
        return tuple(batch[key].to(self.device) for key in ("img", "label", "domain"))


class TrainerXU(SimpleTrainer):
    """A trainer that learns from labelled and unlabelled data together."""

    def run_epoch(self) -> None:
        """Go through both; ``TRAIN.COUNT_ITER`` says whose length an epoch has, and the shorter one starts again.

        Raises:
            ConfigError: ``TRAIN.COUNT_ITER`` is unknown, or the data set has no unlabelled part.
        """
        if self.train_loader_u is None:
            dataset = self.cfg.DATASET.NAME
            raise ConfigError(f"{self.cfg.TRAINER.NAME} needs unlabelled data, but {dataset} has none (train_u)")
        lengths = {"train_x": len(self.train_loader_x), "train_u": len(self.train_loader_u)}
        lengths["smaller_one"] = min(lengths.values())
        count = self.cfg.TRAIN.COUNT_ITER
        if count not in lengths:
            raise ConfigError(f"TRAIN.COUNT_ITER is {count!r}, but must be one of: {', '.join(lengths)}")
        # Both iterators are made before the first batch is drawn, as Dassl does, so that seeds give the same batches.
        first_x, first_u = iter(self.train_loader_x), iter(self.train_loader_u)
        streams = _forever(self.train_loader_x, first_x), _forever(self.train_loader_u, first_u)
        pairs = zip(range(lengths[count]), *streams, strict=False)
        self._run_batches(((x, u) for _, x, u in pairs), lengths[count])

    def parse_batch_train(self, batch_x: dict[str, Any], batch_u: dict[str, Any]) -> Any:
        """Return labelled pictures, their labels and unlabelled pictures on the device."""
        return batch_x["img"].to(self.device), batch_x["label"].to(self.device), batch_u["img"].to(self.device)


def _forever(loader: DataLoader[Any], first: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield from ``first``, then from new passes over ``loader`` without end."""
    yield from first
    while True:
        yield from loader
