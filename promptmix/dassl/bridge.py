"""promptmix's trainers in a program that runs on a real Dassl: one call in its ``extend_cfg``."""

from __future__ import annotations

import logging
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from promptmix.config.tree import file_trees
from promptmix.errors import ConfigError, PluginError
from promptmix.registry import DATASET_REGISTRY, TRAINER_REGISTRY
from promptmix.utils import get_logger

__all__ = ["fill", "register"]


def register(cfg: CfgNode, replace: bool = False) -> list[str]:
    """Put promptmix's trainers into the real Dassl's ``TRAINER_REGISTRY``, and the keys that they read into ``cfg``.

    Call it where a CoOp-style ``train.py`` extends its config, after its own keys: ``pm.register(cfg)``. The trainers then are
    built by Dassl's ``build_trainer(cfg)``, on the data sets and loaders of Dassl's ``DataManager``. Keys that ``cfg`` has keep
    their values.

    Args:
        cfg: the tree of ``dassl.config.get_cfg_default()``, not frozen yet.
        replace: also take the names that the program's own trainers have (``CoOp``), and add to their nodes.

    Returns:
        The names that were registered.

    Raises:
        PluginError: there is no real Dassl to register in.
        ConfigError: ``cfg`` is frozen.
    """
    registry, manager = _real_dassl()
    if cfg.is_frozen():
        raise ConfigError("promptmix.dassl.register(cfg): cfg is frozen; call it before cfg.freeze(), in extend_cfg")
    from promptmix.config import get_cfg

    ours = get_cfg()  # also loads every plugin
    # Importing Dassl turns off the loggers of the whole process up to warnings; what a trainer reports is its output.
    logging.disable(logging.NOTSET)
    theirs = set(registry.registered_names())
    mine = [name for name in TRAINER_REGISTRY if _is_bridged(registry, name) or name not in theirs or replace]
    kept = sorted(set(TRAINER_REGISTRY) - set(mine))
    for name in kept:
        del ours.TRAINER[name.upper()]
    fill(cfg, ours)
    object.__setattr__(cfg, "__class__", _ReadsOurs)  # yacs takes an assignment for a key
    for name in mine:
        registry.register(_bridge(name, TRAINER_REGISTRY.get(name), manager), force=name in theirs)
    if kept:
        get_logger().info(
            "promptmix: %s stay as this program defines them; register(cfg, replace=True) takes promptmix's", ", ".join(kept)
        )
    return mine


class _ReadsOurs(CfgNode):
    """A tree whose ``merge_from_file`` reads promptmix's YAML files too: ``_BASE_``, and 15 where 15.0 is meant."""

    def merge_from_file(self, cfg_filename: str) -> None:
        """Merge a YAML file as yacs does, or one of promptmix's as promptmix does."""
        path = Path(cfg_filename)
        ours = Path(str(files("promptmix.configs"))).resolve() in path.resolve().parents
        if not ours and path.is_file() and "_BASE_" not in path.read_text(encoding="utf-8"):
            super().merge_from_file(cfg_filename)
            return
        for tree, _ in file_trees(path):
            self.merge_from_other_cfg(CfgNode(_as_typed(tree, self)))

    @classmethod
    def _decode_cfg_value(cls, value: Any) -> Any:
        return CfgNode._decode_cfg_value(value)  # nodes below this one are plain


def _as_typed(tree: dict[str, Any], defaults: CfgNode) -> dict[str, Any]:
    """Return ``tree`` with whole numbers as floats where the default is one, which yacs insists on."""
    typed = dict(tree)
    for key, value in tree.items():
        default = defaults.get(key)
        if isinstance(value, dict) and isinstance(default, CfgNode):
            typed[key] = _as_typed(value, default)
        elif isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
            typed[key] = float(value)
    return typed


def _real_dassl() -> tuple[Any, Any]:
    """Return the registry and the data manager of the real Dassl."""
    try:
        from dassl.data import DataManager
        from dassl.engine import TRAINER_REGISTRY as registry
    except ImportError as error:
        raise PluginError(
            f"promptmix.dassl.register(cfg) needs a real Dassl, but import dassl fails ({error}); "
            "without one, run the program's trainers with `promptmix train --coop-repo PATH`"
        ) from error
    if registry is TRAINER_REGISTRY:
        raise PluginError(
            f"promptmix.dassl.register(cfg): {sys.modules['dassl'].__name__} stands for dassl here, where promptmix's trainers "
            "are registered already; leave the call out"
        )
    return registry, DataManager


def _is_bridged(registry: Any, name: str) -> bool:
    return name in registry.registered_names() and hasattr(registry.get(name), "promptmix_manager")


def fill(cfg: CfgNode, defaults: CfgNode) -> None:
    """Add to ``cfg`` the keys of ``defaults`` that it lacks."""
    for key, value in defaults.items():
        if key not in cfg:
            cfg[key] = value.clone() if isinstance(value, CfgNode) else value
        elif isinstance(value, CfgNode) and isinstance(cfg[key], CfgNode):
            fill(cfg[key], value)


def _bridge(name: str, trainer: type, manager: Any) -> type:
    """Return ``trainer`` with its data from Dassl's ``DataManager``."""

    def check_cfg(self: Any, cfg: CfgNode) -> None:
        from promptmix.config import get_cfg, get_key
        from promptmix.config.declare import all_declared

        # Here nothing runs promptmix.config.validate, which would do both.
        for key, setting in all_declared(get_cfg()).items():
            if key.startswith(f"TRAINER.{name.upper()}."):
                setting.check(key, get_key(cfg, key))
        getattr(trainer, "validate", lambda cfg: None)(cfg)
        trainer.check_cfg(self, cfg)  # type: ignore[attr-defined]

    def build_data_loader(self: Any) -> None:
        dm = self.promptmix_manager(self.cfg)
        for attribute in ("train_loader_x", "train_loader_u", "val_loader", "test_loader", "num_classes", "lab2cname"):
            setattr(self, attribute, getattr(dm, attribute))
        self.num_source_domains = dm.num_source_domains
        _add_words(dm.dataset, self.cfg.DATASET.NAME)
        self.dm = dm

    members = {
        "__module__": trainer.__module__,
        "__doc__": trainer.__doc__,
        "check_cfg": check_cfg,
        "build_data_loader": build_data_loader,
        "promptmix_manager": staticmethod(manager),
    }
    bridged = type(name, (trainer,), members)
    return bridged


def _add_words(dataset: Any, name: str) -> None:
    """Give a data set of Dassl or CoOp the words that promptmix's trainers read: templates, their groups, all class names.

    They are those of promptmix's own data set of that name; without one, trainers use "a photo of a {}.".
    """
    own = DATASET_REGISTRY.get(name) if name in DATASET_REGISTRY else None
    for attribute in ("templates", "template_groups"):
        words = getattr(own, attribute, None)
        if words and not hasattr(dataset, attribute):
            setattr(dataset, attribute, words)
    # MoCoOp's data sets keep the names of base and new classes under this name.
    names = getattr(dataset, "all_class_names", None)
    if names and not hasattr(dataset, "all_classnames") and set(dataset.classnames) <= set(names):
        dataset.all_classnames = list(names)
