"""A run done again: its config read back, what an evaluation takes over from it, and the command that replays it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from yacs.config import CfgNode

from promptmix import config
from promptmix.config.declare import all_defaults
from promptmix.config.flags import load_plugins, merge_flags, resolve_config
from promptmix.config.places import PLACES, refuse_foreign_places
from promptmix.config.yamlfile import read_yaml
from promptmix.errors import ConfigError, DataError
from promptmix.files.places import is_own_place
from promptmix.registry import DATASET_REGISTRY
from promptmix.runs import results
from promptmix.runs.protocols import dataset_files, is_file
from promptmix.runs.results import RunResult
from promptmix.utils import get_logger


def take_from_run(cfg: CfgNode, model_dir: str) -> None:
    """Set what the run in ``model_dir`` says and ``cfg`` leaves open; a folder of somebody else's code says nothing.

    - ``DATASET.TEMPLATE_GROUPS``: experts keep the groups that they were trained with on another data set.
    - ``INPUT.READING``: pictures are read as the run was told to read them.
    - What the learned tensors were made with: the method's settings, backbone, input, precision, seed and shots. Where the
      command or one of its files says otherwise, it is refused.
    - How they were trained (``OPTIM``, ``TRAIN``, ``DATALOADER``): as it was, whatever is said now.

    Args:
        cfg: a merged config tree, not frozen.
        model_dir: output folder of the run whose learned tensors are evaluated.

    Raises:
        ConfigError: a setting contradicts the run.
    """
    path = Path(model_dir, results.FILE_NAME)
    if not model_dir or not path.is_file():
        return
    old = results.load(path)
    found: dict[str, object] = {}
    groups = old.vocabulary.get("template_groups")
    if groups and old.learned_parameters and old.dataset != cfg.DATASET.NAME and not cfg.DATASET.TEMPLATE_GROUPS:
        found["DATASET.TEMPLATE_GROUPS"] = tuple(groups)
    reading = old.config.get("INPUT", {}).get("READING", "auto")
    if reading != "auto" and cfg.INPUT.READING == "auto" and config.source_of(cfg, "INPUT.READING") is None:
        found["INPUT.READING"] = reading
    if old.trainer == cfg.TRAINER.NAME and config.sources(cfg):  # another program's tree doesn't say who set what
        found |= _settings_of(old, cfg, model_dir)
    for key, value in found.items():
        config.merge_opts(cfg, [key, value], source=f"--model-dir {model_dir}")
        get_logger().info("%s is that of %s", key, model_dir)


#: What says how a run was trained; an evaluation has no say in it.
_TRAINING = ("OPTIM.", "TRAIN.", "DATALOADER.TRAIN_X.", "DATALOADER.TRAIN_U.", "DATALOADER.K_TRANSFORMS", "INPUT.CACHED_VIEWS")
#: What belongs to the evaluation alone. Weights are taken from a file only when the caller names it.
_OWN = ("DATASET.", "TEST.", "DATALOADER.", "INPUT.READING", "MODEL.INIT_WEIGHTS", "MODEL.BACKBONE.WEIGHTS")
#: What tells runs apart besides settings.
_IDENTITY = ("SEED", "DATASET.NUM_SHOTS", "MODEL.BACKBONE.NAME")


def _settings_of(old: RunResult, cfg: CfgNode, model_dir: str) -> dict[str, object]:
    """Return the settings of a run that ``cfg`` has otherwise.

    Raises:
        ConfigError: somebody set one of them, and it matters to the evaluation.
    """
    found: dict[str, object] = {}
    for key in (*old.settings(), *_IDENTITY):
        try:
            theirs, ours = _value(old.config, key), config.get_key(cfg, key)
        except KeyError:  # of another version
            continue
        if theirs == (list(ours) if isinstance(ours, tuple) else ours) or (key.startswith(_OWN) and not _counts(key)):
            continue
        source = config.source_of(cfg, key)
        if source is not None and not key.startswith(_TRAINING):
            raise ConfigError(
                f"{key} is {ours!r} (set by {source}), but the run in {model_dir} was trained with {theirs!r}; "
                "leave the key out, or give it that value"
            )
        found[key] = tuple(theirs) if isinstance(theirs, list) else theirs
    return found


def _counts(key: str) -> bool:
    return key.startswith(_TRAINING) or key in _IDENTITY


def _value(tree: dict[str, Any], key: str) -> Any:  # noqa: ANN401  (any config value)
    for part in key.split("."):
        tree = tree[part]
    return tree


#: What a training starts or goes on from; an evaluation has a checkpoint.
_STARTS = ("RESUME", "MODEL.INIT_WEIGHTS")


def read_config(
    run: str,
    flags: dict[str, tuple[str, Any]],
    opts: Sequence[Any] = (),
    plugins: Sequence[str] = (),
    *,
    evaluates: bool = False,
    on: str = "",
) -> CfgNode:
    """Return the config of a run, with what the caller says otherwise.

    Args:
        run: its output folder; it is where a training writes unless a flag says otherwise.
        flags: flag to (config key, value); None and "" were not given.
        opts: ``KEY VALUE`` pairs.
        plugins: modules or files that the run loaded.
        evaluates: without what the training started from.
        on: other data: a name of the data set registry, a YAML file, a folder with class folders, or a table; "" = the run's own.

    Raises:
        UserError: the folder holds no run, a name or setting does not fit, or a file is named by the record alone.
    """
    load_plugins(plugins)
    tree, source = _record(Path(run))
    cfg = config.get_cfg()
    data = dict(tree.pop("DATASET", {})) if on else {}
    config.merge_tree(cfg, tree, source)
    if on:
        _take_data(cfg, data, on)
    if evaluates:
        config.reset(cfg, _STARTS, source)
    merge_flags(cfg, {"--from-run": ("OUTPUT_DIR", run)} | flags)
    config.merge_opts(cfg, opts)
    refuse_foreign_places(cfg)
    return cfg


def _record(run: Path) -> tuple[dict[str, Any], str]:
    """Return the config that a run left behind, and the file that holds it.

    Raises:
        DataError: there is none.
    """
    if (run / results.CONFIG_NAME).is_file():
        tree, source = read_yaml(run / results.CONFIG_NAME, "the record"), run / results.CONFIG_NAME
    elif (run / results.FILE_NAME).is_file():
        tree, source = results.load(run / results.FILE_NAME).config, run / results.FILE_NAME
    else:
        raise DataError(f"no {results.CONFIG_NAME} and no {results.FILE_NAME} in {run}; name the output folder of a run")
    if not isinstance(tree, dict) or not isinstance(tree.get("DATASET", {}), dict):
        raise DataError(f"{source} holds no tree of config keys; name the output folder of a run of promptmix")
    return tree, str(source)


def _take_data(cfg: CfgNode, recorded: dict[str, Any], on: str) -> None:
    """Set other data than the run's; own pictures keep its templates, and all of them are tested if they come without parts.

    Raises:
        UserError: no such data set.
    """
    source, path = f"--on {on}", os.path.expanduser(on)
    shots = recorded.get("NUM_SHOTS", cfg.DATASET.NUM_SHOTS)
    config.merge_opts(cfg, ["DATASET.NUM_SHOTS", shots, "DATASET.SKIP_BAD", recorded.get("SKIP_BAD", False)], source=source)
    if os.path.isdir(path) or path.endswith(".csv"):
        name = "ImageFolder" if os.path.isdir(path) else "CSV"
        node = f"DATASET.{name.upper()}"
        before = recorded.get(str(recorded.get("NAME", "")).upper(), {})
        templates = before.get("TEMPLATES") if isinstance(before, dict) else None
        place = ["DATASET.ROOT", path] if name == "ImageFolder" else ["DATASET.ROOT", os.path.dirname(path) or "."]
        table = ["DATASET.CSV.FILE", os.path.basename(path)] if name == "CSV" else []
        words = [f"{node}.TEMPLATES", templates] if templates else []
        groups = recorded.get("TEMPLATE_GROUPS")
        words += ["DATASET.TEMPLATE_GROUPS", groups] if groups else []
        whole = [f"{node}.SPLIT_RATIO", (0.0, 0.0, 1.0)]
        config.merge_opts(cfg, ["DATASET.NAME", name, *place, *table, *whole, *words], source=source)
        return
    if is_file(on):
        config.merge_file(cfg, resolve_config(on))
        return
    DATASET_REGISTRY.get(on)
    if on in dataset_files():
        config.merge_file(cfg, dataset_files()[on])
    config.merge_opts(cfg, ["DATASET.NAME", on, "DATASET.ROOT", recorded.get("ROOT", "")], source=source)


def replay_of(cfg: CfgNode, checkpoint: dict[str, Any] | None, plugins: Sequence[str] = ()) -> list[str]:
    """Return the command that does a run again into a folder beside its own; none for a run without seed.

    Args:
        cfg: its config.
        checkpoint: folder and epoch that it evaluated; None = it trained.
        plugins: modules or files that were loaded.
    """
    if cfg.SEED < 0:
        return []
    command = ["promptmix", "train", "--from-run", cfg.OUTPUT_DIR, "--output-dir", f"{cfg.OUTPUT_DIR.rstrip('/')}-again"]
    command += ["--threads", str(torch.get_num_threads()), *(word for name in plugins for word in ("--plugin", name))]
    if checkpoint:
        epoch = checkpoint.get("epoch")
        command += ["--eval-only", "--model-dir", checkpoint["directory"]]
        command += [] if epoch is None else ["--load-epoch", str(epoch)]
    defaults = all_defaults(cfg)
    pairs: list[str] = []
    for key, word in PLACES.items():
        value = config.get_key(cfg, key)
        if key == "OUTPUT_DIR" or value in ("", defaults.get(key)) or is_own_place(value):
            continue
        (command if word.startswith("--") else pairs).extend([word, value])
    return command + pairs
