"""The trainer in the abstract: named models with their optimizers and schedules, checkpoints, and the epoch loop."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from promptmix.config.published import Theirs
from promptmix.console import signals
from promptmix.engine.checkpoint import (
    load_state_dict_strict,
    read_model,
    resume_from_checkpoint,
    save_checkpoint,
)
from promptmix.engine.log import LazyWriter
from promptmix.engine.resume import load_progress, save_progress, set_random_states
from promptmix.engine.run_folder import RunFolder
from promptmix.errors import CheckpointError, TrainingError
from promptmix.parallel import group
from promptmix.plugin_manager import get_plugin_manager
from promptmix.registry import TRAINER_REGISTRY, Registry
from promptmix.utils import get_logger, tolist_if_not

__all__ = ["TrainerBase", "training_events"]

Names = str | list[str] | None


def training_events() -> Any:
    """Return the hooks that tell plugins of a training; of several processes, those of the one that writes hear of it."""
    hook = get_plugin_manager().hook
    return hook if group.size() == 1 else _Told(hook)


class _Told:
    """Hooks of one process among several, which does not wait for the others in them."""

    def __init__(self, hook: Any) -> None:
        self._hook = hook

    def __getattr__(self, name: str) -> Any:
        def tell(**what: Any) -> None:
            if group.writes():
                with group.paused():
                    getattr(self._hook, name)(**what)

        return tell


class TrainerBase:
    """The iterative trainer in the abstract: named models with their optimizers and schedulers, and the epoch loop."""

    registry: ClassVar[Registry] = TRAINER_REGISTRY
    #: What the authors' code calls the trainer, and its keys and flags (``TRAINER.COOP.*``: a node), each with the key here.
    published_as: ClassVar[tuple[str, ...]] = ()
    published_keys: ClassVar[Mapping[str, str | Theirs]] = {}

    def __init__(self) -> None:
        self._models: OrderedDict[str, nn.Module] = OrderedDict()
        self._optims: OrderedDict[str, torch.optim.Optimizer | None] = OrderedDict()
        self._scheds: OrderedDict[str, Any] = OrderedDict()
        self._writer: Any = None
        #: Whether losses are checked every ``TRAIN.PRINT_FREQ`` batches only, since a look at each would wait for the GPU.
        self.waits_to_check = False
        self._finite: torch.Tensor | None = None
        self.epoch = self.start_epoch = self.max_epoch = self.batch_idx = 0
        #: The numbers of the latest evaluation of each split.
        self.last_results: dict[str, dict[str, float]] = {}
        #: Whether the training, if it goes on from an earlier one, is the same as unbroken.
        self.resumed_exactly = True
        #: Whether it goes on in as many processes as it was in; others round otherwise.
        self.resumed_alike = True
        #: Random states that the next epoch begins with, where an interrupted training goes on.
        self._random_states: dict[str, Any] | None = None

    # Models

    @property
    def backbone_name(self) -> str:
        """Name of the frozen model that the learned tensors belong to; "" where there is none."""
        cfg = getattr(self, "cfg", None)
        return "" if cfg is None else str(cfg.MODEL.BACKBONE.NAME)

    def register_model(
        self,
        name: str = "model",
        model: nn.Module | None = None,
        optim: torch.optim.Optimizer | None = None,
        sched: Any = None,
    ) -> None:
        """Put a model under the trainer's care: saved, loaded, switched and stepped with the others.

        Args:
            name: also the name of the folder that its checkpoints go to.
            model: the module with the learned tensors.
            optim: its optimizer, if it learns.
            sched: its learning-rate schedule, stepped once an epoch.

        Raises:
            AttributeError: called before ``super().__init__()``.
            ValueError: the name is taken.
        """
        if self.__dict__.get("_models") is None:
            raise AttributeError("call super().__init__() before register_model()")
        if name in self._models:
            raise ValueError(f"two models are registered as {name!r}; give each its own name")
        if model is None:
            raise ValueError(f"register_model({name!r}) got no model")
        self._models[name] = model
        self._optims[name] = optim
        self._scheds[name] = sched

    def get_model_names(self, names: Names = None) -> list[str]:
        """Return ``names`` as a list, or all registered names.

        Raises:
            ValueError: one of ``names`` is not registered.
        """
        known = list(self._models)
        if names is None:
            return known
        names = tolist_if_not(names)
        for name in names:
            if name not in known:
                raise ValueError(f"no model is registered as {name!r} (there are: {', '.join(known) or 'none'})")
        return names

    def set_model_mode(self, mode: str = "train", names: Names = None) -> None:
        """Switch models to ``train``, or to ``test`` (also called ``eval``)."""
        if mode not in ("train", "test", "eval"):
            raise KeyError(f"mode is {mode!r}, but must be train, test or eval")
        for name in self.get_model_names(names):
            self._models[name].train(mode == "train")

    # Checkpoints

    def save_model(
        self,
        epoch: int,
        directory: str,
        is_best: bool = False,
        val_result: float | None = None,
        model_name: str = "",
    ) -> None:
        """Write a checkpoint of every model to ``<directory>/<name>/``; ``epoch`` counts from 0.

        Raises:
            TrainingError: a learned tensor is infinite or NaN.
        """
        for name in self.get_model_names():
            for key, tensor in self._models[name].state_dict().items():
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    raise TrainingError(
                        f"{name}.{key} is infinite or NaN after epoch {epoch + 1} (learning rate {self.get_current_lr():.3g}); "
                        "lower OPTIM.LR, or limit the gradients with TRAIN.CLIP_GRAD_NORM 1.0"
                    )
        for name in self.get_model_names():
            optim, sched = self._optims[name], self._scheds[name]
            state = {
                "state_dict": self._models[name].state_dict(),
                "epoch": epoch + 1,
                "optimizer": None if optim is None else optim.state_dict(),
                "scheduler": None if sched is None else sched.state_dict(),
                "val_result": val_result,
                "trainer": type(self).__name__,
                "backbone": self.backbone_name,
            }
            save_checkpoint(state, str(Path(directory, name)), is_best=is_best, model_name=model_name)

    def resume_model_if_exist(self, directory: str) -> int:
        """Continue from the last checkpoint by epoch in ``directory``, if every model has one there.

        It holds no random states, so that the epochs that follow are those of another run.

        Returns:
            The epoch to begin with; 0 where there is nothing to continue.

        Raises:
            CheckpointError: it is damaged, or of another method, config or backbone.
        """
        names = self.get_model_names()
        if not RunFolder(directory).can_resume(names):
            get_logger().info("No checkpoint found, train from scratch")
            return 0
        get_logger().info("Found checkpoint at %s (will resume training)", directory)
        start_epoch = 0
        for name in names:
            folder = str(Path(directory, name))
            optim, sched = self._optims[name], self._scheds[name]
            start_epoch = resume_from_checkpoint(folder, self._models[name], optim, sched, self.refuse_foreign)
        return start_epoch

    def load_model(self, directory: str, epoch: int | None = None) -> None:
        """Load every model's learned tensors from ``directory``, strictly.

        Args:
            directory: output folder of a run; empty skips loading.
            epoch: which checkpoint; by default the one with the best validation result, else the last.

        Raises:
            CheckpointError: no such checkpoint, or it is of another method or config, or of models that this one lacks.
        """
        log = get_logger()
        if not directory:
            log.info("Note that load_model() is skipped as no pretrained model is given (ignore this if it's done on purpose)")
            return
        folder = RunFolder(directory)
        known = [name for name in folder.models() if name not in self._models and self.can_do_without(directory, name, epoch)]
        folder.refuse_unclaimed([*self.get_model_names(), *known])
        for name in self.get_model_names():
            checkpoint, path = read_model(Path(directory, name), epoch)
            if "state_dict" not in checkpoint:
                raise CheckpointError(f"{path} has no 'state_dict'; it was not written by a training run")
            self.refuse_foreign(checkpoint, path)
            writer = checkpoint.get("trainer", type(self).__name__)
            source = str(path) if writer == type(self).__name__ else f"{path} (written by {writer})"
            load_state_dict_strict(self._models[name], checkpoint["state_dict"], source)
            result = checkpoint.get("val_result")
            shown = "none" if result is None else f"{result:.1f}"
            log.info("Load %s to %s (epoch=%s, val_result=%s)", path, name, checkpoint.get("epoch"), shown)

    def refuse_foreign(self, checkpoint: Mapping[str, Any], path: Path) -> None:
        """Refuse what another method or another backbone learned, whose tensors would fit by accident.

        Raises:
            CheckpointError: ``checkpoint``, which comes from ``path``, says that it is so.
        """
        writer = checkpoint.get("trainer") or type(self).__name__
        known = TRAINER_REGISTRY.get(writer) if writer in TRAINER_REGISTRY else object
        if writer != type(self).__name__ and not isinstance(self, known):  # its own, or an extension's
            raise CheckpointError(
                f"{path} was written by {writer}, not by {type(self).__name__}, whose tensors it would only fit by accident; "
                f"name another folder, or use {writer}"
            )
        theirs = checkpoint.get("backbone", "")
        if self.backbone_name and theirs and theirs != self.backbone_name:
            raise CheckpointError(
                f"{path} was learned with the backbone {theirs}, not with MODEL.BACKBONE.NAME {self.backbone_name}; "
                "name another folder, or that backbone"
            )

    def can_do_without(self, directory: str, name: str, epoch: int | None) -> bool:
        """Tell whether a model in ``directory`` that is not registered here may be left out, since it would change nothing."""
        return False

    # Going on after an interruption

    def progress_state(self) -> dict[str, Any]:
        """Return what this trainer has to know to go on after the present epoch, besides models, optimizers and random states.

        A trainer that learns something outside its registered models adds it: tensors and plain values only.
        """
        return {"last_results": self.last_results}

    def load_progress_state(self, state: dict[str, Any]) -> None:
        """Take back what ``progress_state`` returned."""
        self.last_results = {split: dict(results) for split, results in state["last_results"].items()}

    def save_progress(self) -> None:
        """Write the state after the present epoch to the output folder, where there is one."""
        directory = getattr(self, "output_dir", "")
        if directory:
            save_progress(self, RunFolder(directory))

    def load_progress(self, directory: str) -> int:
        """Go on where a training in ``directory`` was interrupted; without such a state, from its last checkpoint.

        Returns:
            The epoch to begin with; 0 where there is nothing to continue.
        """
        self._random_states = load_progress(self, RunFolder(directory))
        if self._random_states is not None:
            return self.start_epoch
        start_epoch = self.resume_model_if_exist(directory)
        self.resumed_exactly = not 0 < start_epoch < self.max_epoch
        return start_epoch

    # Scalars

    def init_writer(self, log_dir: str) -> None:
        """Make the TensorBoard writer of this run, unless there is one."""
        if self._writer is None:
            if find_spec("tensorboard"):
                get_logger().info("Initialize tensorboard (log_dir=%s)", log_dir)
            self._writer = LazyWriter(log_dir)

    def close_writer(self) -> None:
        """Close the TensorBoard writer, if there is one."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def write_scalar(self, tag: str, scalar_value: float, global_step: int | None = None) -> None:
        """Report a number to every logger plugin."""
        training_events().log_scalar(trainer=self, tag=tag, value=scalar_value, step=global_step)

    # The loop

    def train(self, start_epoch: int, max_epoch: int) -> None:
        """Run the epochs from ``start_epoch`` up to ``max_epoch``."""
        self.start_epoch = start_epoch
        self.max_epoch = max_epoch
        hook = training_events()
        try:
            self.before_train()
            hook.before_train(trainer=self)
            if self._random_states is not None:  # last, since anything before may have drawn
                set_random_states(self, self._random_states)
            with signals.listening():
                for epoch in range(self.start_epoch, self.max_epoch):
                    self.epoch = epoch
                    self.before_epoch()
                    self.run_epoch()
                    self.after_epoch()
                    hook.after_epoch(trainer=self)
                    self.save_progress()
                    signals.check()
                self.after_train()
        finally:
            hook.after_train(trainer=self)
            self.close_writer()

    def before_train(self) -> None:
        """Do what is needed before the first epoch."""

    def after_train(self) -> None:
        """Do what is needed after the last epoch."""

    def before_epoch(self) -> None:
        """Do what is needed before each epoch."""

    def after_epoch(self) -> None:
        """Do what is needed after each epoch."""

    def run_epoch(self) -> None:
        """Go once through the training data."""
        raise NotImplementedError

    def test(self, split: str | None = None) -> float:
        """Evaluate and return the first number."""
        raise NotImplementedError

    # parse_batch_train and forward_backward take anything here: subclasses take one batch (TrainerX) or two (TrainerXU).

    def parse_batch_train(self, *batches: Any, **kwargs: Any) -> Any:
        """Take what training needs from a batch and put it on the device."""
        raise NotImplementedError

    def parse_batch_test(self, batch: dict[str, Any]) -> Any:
        """Take what evaluation needs from a batch and put it on the device."""
        raise NotImplementedError

    def forward_backward(self, *batches: Any, **kwargs: Any) -> dict[str, float] | None:
        """Learn from one batch; return what the log line should show."""
        raise NotImplementedError

    def model_inference(self, input: torch.Tensor) -> torch.Tensor:
        """Return scores (B, C) for a batch of inputs."""
        raise NotImplementedError

    # One step

    def detect_anomaly(self, loss: torch.Tensor) -> None:
        """Stop at a loss that is infinite or not a number; with ``waits_to_check`` at the next ``check_anomalies``.

        Raises:
            TrainingError: it is.
        """
        finite = torch.isfinite(loss.detach()).all()
        if self.waits_to_check:
            self._finite = finite if self._finite is None else self._finite & finite
            return
        self._finite = finite
        self.check_anomalies()

    def check_anomalies(self) -> None:
        """Stop if one of the losses since the last check was infinite or not a number.

        Raises:
            TrainingError: it was; lower the learning rate or limit the gradients.
        """
        finite, self._finite = self._finite, None
        if finite is not None and not finite:
            step = f"epoch {self.epoch + 1}, batch {self.batch_idx + 1}"
            since = " or up to TRAIN.PRINT_FREQ batches before" if self.waits_to_check else ""
            raise TrainingError(
                f"Loss is infinite or NaN at {step}{since} (learning rate {self.get_current_lr():.3g}); lower OPTIM.LR, "
                "or limit the gradients with TRAIN.CLIP_GRAD_NORM 1.0"
            )

    def model_zero_grad(self, names: Names = None) -> None:
        """Clear the gradients of the models' optimizers."""
        for optim in self._optimizers(names):
            optim.zero_grad()

    def model_backward(self, loss: torch.Tensor) -> None:
        """Check the loss and propagate it."""
        self.detect_anomaly(loss)
        loss.backward()
        group.average_gradients(p for optim in self._optimizers() for one in optim.param_groups for p in one["params"])

    def model_update(self, names: Names = None) -> None:
        """Step the models' optimizers."""
        for optim in self._optimizers(names):
            optim.step()

    def model_backward_and_update(self, loss: torch.Tensor, names: Names = None) -> None:
        """Clear gradients, propagate ``loss`` and step the optimizers."""
        self.model_zero_grad(names)
        self.model_backward(loss)
        self.model_update(names)

    def update_lr(self, names: Names = None) -> None:
        """Step the learning-rate schedules; methods call this after the last batch of an epoch."""
        for name in self.get_model_names(names):
            if self._scheds[name] is not None:
                self._scheds[name].step()

    def get_current_lr(self, names: Names = None) -> float:
        """Return the learning rate of the first parameter group of the first model that learns."""
        for optim in self._optimizers(names):
            return float(optim.param_groups[0]["lr"])
        return 0.0

    def _optimizers(self, names: Names = None) -> list[torch.optim.Optimizer]:
        chosen = [self._optims[name] for name in self.get_model_names(names)]
        return [optim for optim in chosen if optim is not None]
