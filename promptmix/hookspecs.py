"""Every hook of promptmix: the public contract for third-party packages.

A plugin is a module (or object) with functions marked ``@promptmix.hookimpl`` and named as below. It comes in through the
``promptmix`` entry-point group of an installed package, or through ``--plugin`` by module name or file. Arguments are passed
by keyword, and an implementation may leave out those that it doesn't need. ``@promptmix.register`` above a class is the short
form of a ``register_*`` hook that adds it; built-in parts come in by these same ways.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from yacs.config import CfgNode

    from promptmix.registry import Registry

hookspec = pluggy.HookspecMarker("promptmix")
hookimpl = pluggy.HookimplMarker("promptmix")


@hookspec
def register_trainers(registry: Registry) -> None:
    """Fires once per plugin at loading: add trainer classes (``cls(cfg)``, see ``promptmix.engine.SimpleTrainer``)."""


@hookspec
def register_datasets(registry: Registry) -> None:
    """Fires once per plugin at loading: add data set classes (``cls(cfg)``, see ``promptmix.data.DatasetBase``)."""


@hookspec
def register_backbones(registry: Registry) -> None:
    """Fires once per plugin at loading: add functions ``cfg -> promptmix.clip.CLIP``; the name is ``MODEL.BACKBONE.NAME``."""


@hookspec
def register_prompt_banks(registry: Registry) -> None:
    """Fires once per plugin at loading: add ``promptmix.prompts.roles.PromptBank`` classes."""


@hookspec
def register_routers(registry: Registry) -> None:
    """Fires once per plugin at loading: add ``promptmix.prompts.roles.Router`` classes."""


@hookspec
def register_text_supervisions(registry: Registry) -> None:
    """Fires once per plugin at loading: add ``promptmix.prompts.roles.TextSupervision`` classes."""


@hookspec
def register_distillers(registry: Registry) -> None:
    """Fires once per plugin at loading: add ``promptmix.prompts.roles.Distiller`` classes."""


@hookspec
def register_heads(registry: Registry) -> None:
    """Fires once per plugin at loading: add ``promptmix.prompts.roles.Head`` classes."""


@hookspec
def register_evaluators(registry: Registry) -> None:
    """Fires once per plugin at loading: add ``promptmix.engine.evaluator.EvaluatorBase`` classes for ``TEST.EVALUATOR``."""


@hookspec
def register_protocols(registry: Registry) -> None:
    """Fires once per plugin at loading: add ``promptmix.runs.protocols.Protocol`` objects by name, for ``run`` and sweeps."""


@hookspec
def register_sweep_backends(registry: Registry) -> None:
    """Fires once per plugin at loading: add functions ``(jobs, options, started)`` as ``promptmix.runs.backends.Backend``."""


@hookspec
def register_selectors(registry: Registry) -> None:
    """Fires once per plugin at loading: add ``promptmix.runs.selection.Selector`` classes by name, for protocol ``active``."""


@hookspec
def before_plugin(name: str) -> None:
    """Fires before the module of ``--plugin`` is imported: make what it may import importable."""


@hookspec
def extend_config(cfg: CfgNode) -> None:
    """Fires whenever a config tree is made: add nodes with their defaults to ``cfg``; change no key that is there."""


@hookspec
def validate_config(cfg: CfgNode) -> None:
    """Fires on the merged tree before anything is built: raise ``ConfigError`` for what can't work; change nothing."""


@hookspec
def before_train(trainer: Any) -> None:
    """Fires before the first epoch, after a resume: look at ``trainer``, open what you log to."""


@hookspec
def after_epoch(trainer: Any) -> None:
    """Fires after each epoch, when checkpoints of it are written; ``trainer.epoch`` counts from 0."""


@hookspec
def after_test(trainer: Any, split: str, results: dict[str, float]) -> None:
    """Fires after each evaluation: ``results`` holds the evaluator's numbers in percent; add keys to have them recorded."""


@hookspec
def after_train(trainer: Any) -> None:
    """Fires once after training and its final test, also when training failed: close what you opened."""


@hookspec
def log_scalar(trainer: Any, tag: str, value: float, step: int | None) -> None:
    """Fires for every scalar that a trainer reports (``train/loss``, ``test/accuracy``); ``step`` counts batches or epochs."""
