"""Trackers of experiments: Weights & Biases and MLflow, each an extra (``pip install 'promptmix[wandb]'``, ``[mlflow]``).

Both get the whole config and every scalar of a training, and both stay on this machine unless they are told otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

from yacs.config import CfgNode

from promptmix import hookimpl
from promptmix.config.declare import Setting, all_values, declare
from promptmix.engine.log import logger_is_on
from promptmix.errors import ConfigError
from promptmix.utils import get_logger

if TYPE_CHECKING:
    from promptmix.engine import SimpleTrainer


class Tracker(Protocol):
    """A run in somebody else's records."""

    def log(self, tag: str, value: float, step: int) -> None:
        """Add a number; ``step`` counts batches or epochs, by tag."""

    def close(self) -> None:
        """End the run."""


class Wandb:
    """A run of Weights & Biases, below ``<OUTPUT_DIR>/wandb``."""

    def __init__(self, cfg: CfgNode, name: str, values: dict[str, Any]) -> None:
        import wandb

        node, folder = cfg.LOGGER.WANDB, str(Path(cfg.OUTPUT_DIR).absolute())
        options = {"project": node.PROJECT, "entity": node.ENTITY or None, "mode": node.MODE, "name": name}
        self._run = wandb.init(dir=folder, config=values, reinit="create_new", **options)

    def log(self, tag: str, value: float, step: int) -> None:
        """Add a number, over a count of its own: W&B's one counter does not go back, but epochs are fewer than batches."""
        axis = f"{tag.partition('/')[0]}/step"
        self._run.define_metric(tag, step_metric=axis)
        self._run.log({tag: value, axis: step})

    def close(self) -> None:
        """End the run."""
        self._run.finish()


class MLflow:
    """A run of MLflow, by default in ``<OUTPUT_DIR>/mlflow.db``."""

    def __init__(self, cfg: CfgNode, name: str, values: dict[str, Any]) -> None:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # minutes otherwise, where no server answers
        from mlflow.tracking import MlflowClient

        node = cfg.LOGGER.MLFLOW
        uri = node.URI or f"sqlite:///{Path(cfg.OUTPUT_DIR, 'mlflow.db').absolute()}"
        self._client = MlflowClient(tracking_uri=uri)
        found = self._client.get_experiment_by_name(node.EXPERIMENT)
        experiment = self._client.create_experiment(node.EXPERIMENT) if found is None else found.experiment_id
        self._id = self._client.create_run(experiment, run_name=name).info.run_id
        for key, value in values.items():
            self._client.log_param(self._id, key, str(value)[:500])

    def log(self, tag: str, value: float, step: int) -> None:
        """Add a number."""
        self._client.log_metric(self._id, tag, value, step=step)

    def close(self) -> None:
        """End the run."""
        self._client.set_terminated(self._id)


_MOST_LETTERS = 500  # of the name of an experiment in MLflow
#: Node below LOGGER, the module that it needs, and the tracker.
TRACKERS: dict[str, tuple[str, Callable[..., Tracker]]] = {"WANDB": ("wandb", Wandb), "MLFLOW": ("mlflow", MLflow)}
_open: WeakKeyDictionary[Any, list[Tracker]] = WeakKeyDictionary()


@hookimpl
def extend_config(cfg: CfgNode) -> None:
    """Declare the nodes of both."""
    wandb, mlflow = CfgNode(), CfgNode()
    cfg.LOGGER.WANDB, cfg.LOGGER.MLFLOW = wandb, mlflow
    tracked, served = ((((f"LOGGER.{node}.ENABLED", (True,)),)) for node in ("WANDB", "MLFLOW"))
    declare(wandb, "ENABLED", False, Setting("track trainings with Weights & Biases (extra wandb)"))
    declare(wandb, "PROJECT", "promptmix", Setting("its project", needs=tracked))
    declare(wandb, "ENTITY", "", Setting('user or team; "" = your own', needs=tracked))
    modes = ("offline", "online", "disabled")
    declare(
        wandb, "MODE", "offline", Setting("offline keeps it on this machine until `wandb sync`", choices=modes, needs=tracked)
    )
    declare(mlflow, "ENABLED", False, Setting("track trainings with MLflow (extra mlflow)"))
    declare(mlflow, "URI", "", Setting('tracking server or store; "" = <OUTPUT_DIR>/mlflow.db', needs=served))
    declare(mlflow, "EXPERIMENT", "promptmix", Setting("its experiment", needs=served))


@hookimpl
def validate_config(cfg: CfgNode) -> None:
    """Refuse a tracker that is not installed.

    Raises:
        ConfigError: the message names the extra; or MLflow takes no experiment of such a name.
    """
    for node, (module, _) in TRACKERS.items():
        if cfg.LOGGER[node].ENABLED and find_spec(module) is None:
            raise ConfigError(f"LOGGER.{node}.ENABLED is True, but {module} is not installed; pip install 'promptmix[{module}]'")
    name = cfg.LOGGER.MLFLOW.EXPERIMENT
    if cfg.LOGGER.MLFLOW.ENABLED and not 0 < len(name.strip()) <= _MOST_LETTERS:  # MLflow would say it after it made its store
        raise ConfigError(f"LOGGER.MLFLOW.EXPERIMENT has {len(name)} letters; give it 1 to {_MOST_LETTERS}")


@hookimpl
def before_train(trainer: SimpleTrainer) -> None:
    """Begin a run in each tracker that is on.

    Raises:
        ConfigError: one of them can't.
    """
    chosen = {node: make for node, (_, make) in TRACKERS.items() if logger_is_on(trainer, node)}
    if not chosen:
        return
    cfg = trainer.cfg
    values = dict(all_values(cfg))
    name = f"{cfg.TRAINER.NAME}-{cfg.DATASET.NAME}-seed{cfg.SEED}"
    made = _open.setdefault(trainer, [])
    for node, make in chosen.items():
        try:
            made.append(make(cfg, name, values))
        except Exception as error:  # whatever its library raises
            raise ConfigError(
                f"LOGGER.{node} can't begin a run ({type(error).__name__}: {error}); fix its settings, or set "
                f"LOGGER.{node}.ENABLED False"
            ) from error


@hookimpl
def log_scalar(trainer: SimpleTrainer, tag: str, value: float, step: int | None) -> None:
    """Pass the number on."""
    for tracker in list(_open.get(trainer, ())):
        try:
            tracker.log(tag, value, step or 0)
        except Exception as error:  # a server that went away ends no training
            _open[trainer].remove(tracker)
            get_logger().warning("%s records nothing more: %s: %s", type(tracker).__name__, type(error).__name__, error)


@hookimpl
def after_train(trainer: SimpleTrainer) -> None:
    """End what was begun."""
    for tracker in _open.pop(trainer, ()):
        try:
            tracker.close()
        except Exception as error:
            get_logger().warning("%s could not end its run: %s: %s", type(tracker).__name__, type(error).__name__, error)
