"""A run done again: its own config read back, with what the caller says otherwise, on its own or on other data."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from promptmix import config
from promptmix.config.flags import load_plugins, merge_flags, resolve_config
from promptmix.config.places import refuse_foreign_places
from promptmix.config.yamlfile import read_yaml
from promptmix.data.datasets.tables import SUFFIXES, table_of
from promptmix.errors import DataError
from promptmix.registry import DATASET_REGISTRY
from promptmix.runs import results
from promptmix.runs.protocols import dataset_files, is_file
from promptmix.utils import get_logger

__all__ = ["read_config"]

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
        _say_if_trained_on(cfg, data, on)
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


def _say_if_trained_on(cfg: CfgNode, recorded: dict[str, Any], on: str) -> None:
    """Say that other data, all of which is tested, is the run's own, of which it was trained on a part."""
    name = cfg.DATASET.NAME
    own = name in ("ImageFolder", "CSV") and recorded.get("NAME") == name
    same = own and os.path.realpath(str(recorded.get("ROOT"))) == os.path.realpath(cfg.DATASET.ROOT)
    if same and (name == "ImageFolder" or recorded.get("CSV", {}).get("FILE") == cfg.DATASET.CSV.FILE):
        get_logger().warning(
            "%s is what the run was trained on; without --on %s the pictures kept for its test are tested", on, on
        )


def _take_data(cfg: CfgNode, recorded: dict[str, Any], on: str) -> None:
    """Set other data than the run's; own pictures keep its templates, and all of them are tested if they come without parts.

    Raises:
        UserError: no such data set.
    """
    source, path = f"--on {on}", os.path.expanduser(on)
    shots = recorded.get("NUM_SHOTS", cfg.DATASET.NUM_SHOTS)
    config.merge_opts(cfg, ["DATASET.NUM_SHOTS", shots, "DATASET.SKIP_BAD", recorded.get("SKIP_BAD", False)], source=source)
    if os.path.isdir(path) or path.lower().endswith(SUFFIXES):
        found = table_of(path) if os.path.isdir(path) else Path(path)
        name = "ImageFolder" if found is None else "CSV"
        node = f"DATASET.{name.upper()}"
        before = recorded.get(str(recorded.get("NAME", "")).upper(), {})
        templates = before.get("TEMPLATES") if isinstance(before, dict) else None
        place = ["DATASET.ROOT", path if found is None else os.path.dirname(found) or "."]
        table = [] if found is None else ["DATASET.CSV.FILE", found.name]
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
