"""What an evaluation takes over from the run that it evaluates and may not say otherwise, and the command that replays a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from yacs.config import CfgNode

from promptmix import config
from promptmix.config.declare import all_declared, all_defaults
from promptmix.config.places import PLACES, places_of_parts
from promptmix.errors import ConfigError
from promptmix.files.places import is_own_place
from promptmix.parallel import group
from promptmix.runs import results
from promptmix.runs.results import RunResult
from promptmix.utils import get_logger


def take_from_run(cfg: CfgNode, model_dir: str) -> None:
    """Set what the run in ``model_dir`` says and ``cfg`` leaves open; a folder of somebody else's code says nothing.

    - ``DATASET.TEMPLATE_GROUPS``: experts keep the groups that they were trained with on another data set.
    - ``INPUT.READING``: pictures are read as the run was told to read them.
    - What the learned tensors were made with: the method's settings, backbone, input, precision, seed and shots. Where the
      command or one of its files says otherwise, it is refused, unless the setting may differ at test (``Setting.at_test``).
      Files and folders (``Setting.place``) are the command's to name.
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
    declared = all_declared(cfg)
    for key in (*old.settings(), *_IDENTITY):
        try:
            theirs, ours = _value(old.config, key), config.get_key(cfg, key)
        except (KeyError, TypeError):  # of another version, or a group of keys where we have a value
            continue
        if theirs == (list(ours) if isinstance(ours, tuple) else ours) or (key.startswith(_OWN) and not _counts(key)):
            continue
        source = config.source_of(cfg, key)
        if key in declared and (declared[key].place or source is not None and declared[key].at_test):
            continue
        if source is not None and not key.startswith(_TRAINING):
            raise ConfigError(
                f"{key} is {ours!r} (set by {source}), but the run in {model_dir} was trained with {theirs!r}; "
                "leave the key out, or give it that value"
            )
        found[key] = tuple(theirs) if isinstance(theirs, list) else theirs
    return found


def _counts(key: str) -> bool:
    return key.startswith(_TRAINING) or key in _IDENTITY


def _value(tree: dict[str, Any], key: str) -> Any:  # any config value
    for part in key.split("."):
        tree = tree[part]
    return tree


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
    if group.size() > 1:  # others round otherwise
        command += ["--devices", str(group.size())]
    if checkpoint:
        epoch = checkpoint.get("epoch")
        command += ["--eval-only", "--model-dir", checkpoint["directory"]]
        command += [] if epoch is None else ["--load-epoch", str(epoch)]
    defaults = all_defaults(cfg)
    pairs: list[str] = []
    for key, word in (PLACES | {key: key for key in places_of_parts(cfg)}).items():
        value = config.get_key(cfg, key)
        if key == "OUTPUT_DIR" or value in ("", defaults.get(key)) or is_own_place(value):
            continue
        (command if word.startswith("--") else pairs).extend([word, value])
    return command + pairs
