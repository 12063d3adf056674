"""From flags to a merged config, in CoOp's order: defaults, data set file, method file, flags, ``KEY VALUE`` pairs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from promptmix.config.names import named_configs, named_tree
from promptmix.errors import ConfigError, UserError
from promptmix.registry import closest

if TYPE_CHECKING:
    from yacs.config import CfgNode


#: Keys that say something about one data set, which no other inherits from a file.
OF_ONE_DATASET = ("DATASET.SOURCE_DOMAINS", "DATASET.TARGET_DOMAINS", "DATASET.SUBSAMPLE_CLASSES")


def check_count(flag: str, number: float | None, most: int = 4096, least: int = 1) -> None:
    """Refuse a flag's number of threads, jobs, pictures or the like that can't be one.

    Args:
        flag: its name.
        number: what was given; None = nothing.
        most: the largest that makes sense.
        least: the smallest.

    Raises:
        UserError: it is below ``least`` or above ``most``, or no number.
    """
    if number is not None and not least <= number <= most:
        raise UserError(f"{flag} is {number}, but must be from {least} to {most}")


def check_place(flag: str, path: str, kind: str = "folder") -> None:
    """Refuse a flag's folder or file that is not there.

    Raises:
        UserError: it is not; "" = the flag was not given.
    """
    if path and not os.path.exists(os.path.expanduser(path)):
        raise UserError(f"{flag} {path}: no such {kind}; check the path, or leave {flag} out")


def resolve_config(path: str, trainer: str = "") -> Path:
    """Return the file that ``path`` names: as given, else among the shipped configs, as a file or in their table of names.

    Args:
        path: a path, or a shipped config with or without its leading ``configs/`` (``configs/quickstart.yaml``).
        trainer: method that it is for, whose authors may keep their files elsewhere.

    Raises:
        ConfigError: there is no such file in either place.
    """
    given = Path(path)
    if given.is_file():
        return given
    shipped = Path(str(files("promptmix.configs")))
    if not given.is_absolute():
        parts = PurePath(path).parts
        for place in _places(parts[1:] if parts[:1] == ("configs",) else parts, trainer):
            candidate = shipped.joinpath(*place)
            if candidate.is_file() or named_tree(candidate) is not None:
                return candidate
    found = [file.relative_to(shipped).as_posix() for file in shipped.rglob("[!_]*.yaml")]
    names = sorted(f"configs/{name}" for name in (*found, *named_configs(shipped)))
    folders = sorted({str(PurePath(name).parent) for name in names})
    # Settings of another method, or a data set in place of a method, are nobody's misspelling.
    folder = PurePath(path).parent.name
    same = [name for name in names if PurePath(name).parent.name == folder] if folder else names
    raise ConfigError(
        f"config file {path}: no such file here or among the shipped ones{closest(path, same)} "
        f"(folders of shipped files: {', '.join(folders)})"
    )


def _places(parts: tuple[str, ...], trainer: str) -> Iterator[tuple[str, ...]]:
    """Yield where a file may lie among ours: as it is named, else in the folder of the method whose authors name it so."""
    from promptmix.registry import TRAINER_REGISTRY

    yield parts
    if parts and parts[:-1] in ((), ("trainers",)):  # configs/trainers/coprompt.yaml
        yield ("trainers", TRAINER_REGISTRY.own_name(trainer), parts[-1])
    elif parts[:-2] in ((), ("trainers",)):  # configs/MoCoOp/..., configs/trainers/MultiModalAdapter/...
        yield ("trainers", TRAINER_REGISTRY.own_name(parts[-2]), parts[-1])


def load_plugins(names: Iterable[str], lenient: bool = False) -> None:
    """Load the built-in and installed plugins, then those of ``--plugin``.

    Args:
        names: modules or files.
        lenient: do without installed plugins that fail, as commands do that only show what there is.

    Raises:
        PluginError: one of them can't be loaded.
    """
    from promptmix.plugin_manager import check_plugins, get_plugin_manager, load_plugin

    get_plugin_manager()
    if not lenient:
        check_plugins()
    for name in names:
        load_plugin(name)


def make_config(
    config_files: Iterable[str], flags: dict[str, tuple[str, Any]], opts: Sequence[Any], plugins: Iterable[str] = ()
) -> CfgNode:
    """Merge files, flags and overrides onto the defaults, each remembered as the source of what it sets.

    Domains and the choice of classes that a file sets together with ``DATASET.NAME`` belong to that data set: another that is
    named later has the defaults.

    Args:
        config_files: paths in order of merging, empty ones are passed over.
        flags: flag to (config key, value); a value of None or "" was not given.
        opts: ``KEY VALUE`` pairs, as ``merge_opts`` takes them.
        plugins: what ``--plugin`` named.

    Raises:
        UserError: a plugin, file, key or value that does not fit.
    """
    load_plugins(plugins)
    from promptmix import config
    from promptmix.config.places import refuse_foreign_places
    from promptmix.config.published import expect

    cfg = config.get_cfg()
    _, trainer = flags.get("--trainer", ("", ""))
    if trainer:
        expect(cfg, trainer)  # files are merged first, and may have keys of its authors
    paths = [resolve_config(path, trainer) for path in config_files if path]
    names = []
    for path in paths:
        config.merge_file(cfg, path)
        names.append(cfg.DATASET.NAME)
    described, by = cfg.DATASET.NAME, config.source_of(cfg, "DATASET.NAME")
    if names and names[0] not in ("", described):
        config.merge_file(cfg, paths[0])  # a data set's file says which it is, even if the method's (quick start) names another
    merge_flags(cfg, flags)
    config.merge_opts(cfg, opts)
    refuse_foreign_places(cfg)
    if described != cfg.DATASET.NAME:
        config.reset(cfg, OF_ONE_DATASET, by)
    return cfg


def merge_flags(cfg: CfgNode, flags: dict[str, tuple[str, Any]]) -> None:
    """Merge flag -> (config key, value), but for those that were not given (None or "").

    Raises:
        ConfigError: a value of the wrong type.
    """
    from promptmix import config

    for flag, (key, value) in flags.items():
        if value is not None and value != "":
            config.merge_opts(cfg, [key, value], source=flag)
