"""Files and folders that only a run's record names: a record may be somebody else's, so the caller says them himself."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from yacs.config import CfgNode

from promptmix.config.declare import all_declared, all_defaults, shown
from promptmix.config.tree import RECORDS, get_key, source_of
from promptmix.errors import ConfigError
from promptmix.files.places import is_own_place

__all__ = ["PLACES", "RECORDS", "places_of_parts", "refuse_foreign_places"]

#: Keys that name files to open and folders to write to, and how a command line names each.
PLACES = {
    "MODEL.BACKBONE.WEIGHTS": "MODEL.BACKBONE.WEIGHTS",
    "MODEL.INIT_WEIGHTS": "MODEL.INIT_WEIGHTS",
    "RESUME": "--resume",
    "OUTPUT_DIR": "--output-dir",
    "DATASET.DESCRIPTIONS": "DATASET.DESCRIPTIONS",
    "DATASET.SUBSET": "DATASET.SUBSET",
    "INPUT.FEATURE_CACHE_DIR": "INPUT.FEATURE_CACHE_DIR",
}


def places_of_parts(cfg: CfgNode) -> list[str]:
    """Return the keys of methods and parts that name files or folders (``Setting.place``)."""
    return [key for key, setting in all_declared(cfg).items() if setting.place]


def refuse_foreign_places(cfg: CfgNode) -> None:
    """Refuse files and folders that a run's record names and the caller does not.

    What a record says of a method is wanted; which files are opened, and where is written, is for the caller to say. A record
    may name its own folder as the output and a list of pictures in it, so that a run can be repeated, and weights that
    promptmix ships or downloaded.

    Raises:
        ConfigError: there is such a key; the message says what to type.
    """
    defaults = all_defaults(cfg)
    for key, word in (PLACES | {key: key for key in places_of_parts(cfg)}).items():
        value, source = get_key(cfg, key), source_of(cfg, key) or ""
        if value in ("", defaults.get(key)) or Path(source).name not in RECORDS:
            continue
        own, there = os.path.dirname(os.path.realpath(source)), os.path.realpath(value)
        repeated = key == "OUTPUT_DIR" and there == own
        repeated |= key == "DATASET.SUBSET" and os.path.dirname(there) == own
        if not repeated and not ("WEIGHTS" in key and is_own_place(value)):
            raise ConfigError(
                f"{key} is {shown(value)}, which only the record of a run names ({source}); it may be somebody else's, so name "
                f"the place yourself: {word} {shlex.quote(str(value))}, or another"
            )
