"""Merging into the config tree, which refuses what it doesn't understand, and the check of the merged tree."""

from __future__ import annotations

import ast
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from yacs.config import CfgNode as CN

from promptmix.config.core import get_cfg_default
from promptmix.config.declare import (
    Setting,
    a_kind,
    all_declared,
    all_defaults,
    all_values,
    declare,
    parse_sum,
    retired_from,
    shown,
)
from promptmix.config.names import named_tree
from promptmix.config.published import translated
from promptmix.config.yamlfile import read_yaml
from promptmix.errors import ConfigError, PluginError
from promptmix.files.text import real
from promptmix.plugin_manager import TRIALS, get_plugin_manager
from promptmix.registry import Registry, closest

#: What a run leaves behind that holds its config. It states every key, so that a key at its default says nothing.
RECORDS = ("run_config.yaml", "results.json")
#: Files that build on each other; longer chains are circles.
_MOST_BASES = 32


def get_cfg() -> CN:
    """Return a new config tree with the nodes of every registered trainer and component, and of plugins' ``extend_config``."""
    from promptmix.registry import PROTOCOL_REGISTRY, ROLES, TRAINER_REGISTRY

    plugins = get_plugin_manager()
    cfg = get_cfg_default()
    for role, registry in ROLES.items():
        cfg[role] = CN()
        declare(cfg[role], "NAME", "", Setting('a component; "" = the trainer\'s own choice; none = do without'))
        _add_nodes(cfg[role], registry)
    _add_nodes(cfg.TRAINER, TRAINER_REGISTRY)
    cfg.PROTOCOL = CN()
    declare(cfg.PROTOCOL, "NAME", "", Setting("protocol that the run is part of; the protocol sets it"))
    for name in PROTOCOL_REGISTRY:
        if hasattr(PROTOCOL_REGISTRY.get(name), "add_config"):  # those with settings
            _add_node(cfg.PROTOCOL, PROTOCOL_REGISTRY, name)
    before = dict(all_values(cfg))
    plugins.hook.extend_config(cfg=cfg)
    _refuse_changes(before, cfg, "extend_config", "add keys of its own alone")
    return cfg


def _refuse_changes(before: dict[str, Any], cfg: CN, hook: str, remedy: str) -> None:
    """Refuse a hook that changed or removed keys which others made."""
    now = dict(all_values(cfg))
    changed = [key for key, value in before.items() if key not in now or now[key] != value]
    if changed:
        raise PluginError(f"a plugin's {hook} changed {changed[0]}; it must {remedy}")


TRIALS.append(get_cfg)  # a plugin whose settings fail says so when it is loaded


def _add_nodes(parent: CN, registry: Registry) -> None:
    for name in registry:
        _add_node(parent, registry, name)


def _add_node(parent: CN, registry: Registry, name: str) -> None:
    parent[name.upper()] = node = CN()
    getattr(registry.get(name), "add_config", lambda node: None)(node)


def merge_file(cfg: CN, path: str | Path) -> None:
    """Merge a YAML file into ``cfg``; a ``_BASE_`` key names a file, relative to it, that is merged first.

    Raises:
        ConfigError: the file is missing or not YAML, or holds an unknown key, a wrong type or an empty value.
    """
    for tree, source in file_trees(path):
        merge_tree(cfg, tree, source)


def file_trees(path: str | Path) -> list[tuple[dict[str, Any], str]]:
    """Return what a YAML file holds, after what it builds on: trees to merge in this order, each with the path of its file.

    Raises:
        ConfigError: a file is missing, not YAML, or builds on itself.
    """
    if not isinstance(path, (str, Path)):
        raise ConfigError(f"config file {shown(path)}: give the path of a YAML file")
    return _file_trees(Path(path), [])


def _file_trees(path: Path, above: list[Path]) -> list[tuple[dict[str, Any], str]]:
    below: list[tuple[dict[str, Any], str]] = []
    tree = named_tree(path) or read_yaml(path)
    if not isinstance(tree, dict):
        found = "nothing" if tree is None else f"a {type(tree).__name__}"
        raise ConfigError(f"config file {path} holds {found}, but must hold keys, such as OPTIM: {{MAX_EPOCH: 5}}")
    if "_BASE_" in tree:
        base = tree.pop("_BASE_")
        if not isinstance(base, str) or "\0" in base:
            raise ConfigError(f"config file {path}: _BASE_ is {shown(base)}, but must be the path of a config file")
        file = path.parent / base
        chain = [*above, path]
        if len(chain) > _MOST_BASES or os.path.realpath(file) in map(os.path.realpath, chain):
            raise ConfigError(f"config file {path}: _BASE_ {base} leads back to itself; name another file, or leave the key out")
        below = _file_trees(file, chain)
    return [*below, (tree, str(path))]


def merge_tree(cfg: CN, tree: dict[str, Any], source: str) -> None:
    """Merge a tree of plain values, as a YAML file or ``results.json`` holds it, into ``cfg``.

    Raises:
        ConfigError: an unknown key, a wrong type or an empty value.
    """
    if not isinstance(tree, dict):
        raise ConfigError(f"{source} is {shown(tree)}; give a tree of keys")
    leaves = _leaves(tree, cfg)
    twice = next((key for key, count in Counter(key for key, _ in leaves).items() if count > 1), None)
    if twice is not None:
        raise ConfigError(f"{source}: {shown(twice)} is there twice, in its group and by its dotted name; leave one out")
    for key, value in leaves if Path(source).name in RECORDS else translated(cfg, leaves, source):
        _set(cfg, key, value, source)


def merge_opts(cfg: CN, opts: Sequence[Any], source: str = "command line") -> None:
    """Merge ``KEY VALUE`` pairs into ``cfg``; values are text as typed on a command line, or what it stands for.

    Raises:
        ConfigError: a key without a value, an unknown key, or a value of the wrong type.
    """
    if not isinstance(opts, (list, tuple)):
        raise ConfigError(f"{source}: overrides are {shown(opts)}, but must be a list of keys and values in turn")
    refuse_lone(opts, source)
    for key, text in translated(cfg, zip(opts[::2], opts[1::2], strict=True), source):
        _set(cfg, key, text, source)


def refuse_lone(opts: Sequence[Any], source: str = "command line") -> None:
    """Refuse overrides that are no ``KEY VALUE`` pairs.

    Raises:
        ConfigError: one has no value, or is joined with it by ``=``.
    """
    joined = next((word for word in opts[::2] if isinstance(word, str) and re.fullmatch(r"[A-Z_]+(\.\w+)+ *=.*", word)), None)
    if joined is not None or len(opts) % 2 and opts[1::2][:1] == ["="]:
        found = opts[1] if joined is None else joined
        raise ConfigError(f"{source}: overrides are KEY VALUE pairs without =, but there is {shown(found)}; write OPTIM.LR 0.1")
    if len(opts) % 2:
        raise ConfigError(f"{source}: overrides come as KEY VALUE pairs, but {shown(opts[-1])} has no value; give it one")


def source_of(cfg: CN, key: str) -> str | None:
    """Return who set ``key`` (a file or ``command line``), or None where the default stands."""
    return cfg.__dict__.get("_sources", {}).get(key)


def reset(cfg: CN, keys: Sequence[str], source: str | None) -> None:
    """Give each of ``keys`` that ``source`` set its default back."""
    default = get_cfg_default()
    for key in keys:
        if source is not None and source_of(cfg, key) == source:
            node, dot, leaf = key.rpartition(".")
            (get_key(cfg, node) if dot else cfg)[leaf] = get_key(default, key)
            del cfg.__dict__["_sources"][key]


def sources(cfg: CN) -> dict[str, str]:
    """Return every key that was set, with who set it."""
    return dict(cfg.__dict__.get("_sources", {}))


def check_values(cfg: CN) -> None:
    """Check every value of the tree against its declaration, and those that must fit each other.

    Raises:
        ConfigError: one of the wrong type, out of range or not among the choices; the message says who set it.
    """
    from promptmix.config.checks import check_pairs

    declared, defaults, given = all_declared(cfg), all_defaults(cfg), sources(cfg)
    undeclared = Setting("")  # a plugin's key: finite numbers and plain text at least
    for key, value in all_values(cfg):
        source = given.get(key)
        if key in defaults:
            _coerce(key, value, defaults[key], source or "config")
        declared.get(key, undeclared).check(key, value, source)
    check_pairs(cfg, given)


def validate(cfg: CN, values: bool = True) -> None:
    """Check the merged tree: values, names, settings that nobody would read, then the trainer's and the plugins' own checks.

    Args:
        cfg: the whole config tree.
        values: False for a program of others, whose own Dassl runs with values that no key of ours takes (no epoch, a word that
            nothing compares); what can't be done stops where it is done.

    Raises:
        RegistryError: no trainer or data set of this name.
        ConfigError: a value that its key does not take, or a setting that the chosen trainer would ignore.
    """
    from promptmix.registry import DATASET_REGISTRY, EVALUATOR_REGISTRY, ROLES, TRAINER_REGISTRY, is_prompt_trainer, name_of

    if values:
        check_values(cfg)
    trainer = TRAINER_REGISTRY.get(cfg.TRAINER.NAME)
    DATASET_REGISTRY.get(cfg.DATASET.NAME)
    if is_prompt_trainer(cfg.TRAINER.NAME):  # another may have evaluators of its own, and asks for one when it is built
        EVALUATOR_REGISTRY.get(cfg.TEST.EVALUATOR)
    _refuse_unread(cfg, getattr(trainer, "ignores", ()))
    _check_views(cfg, getattr(trainer, "views", cfg.DATALOADER.K_TRANSFORMS))
    _refuse_strangers(cfg, "TRAINER", cfg.TRAINER.NAME)
    if "PROTOCOL" in cfg:  # a tree of Dassl's form has none
        if source_of(cfg, "PROTOCOL.NAME") == "command line":
            raise ConfigError(f"PROTOCOL.NAME is {cfg.PROTOCOL.NAME!r}, which a protocol sets by itself; use `promptmix run`")
        _refuse_strangers(cfg, "PROTOCOL", *filter(None, [cfg.PROTOCOL.NAME]))
    own = getattr(trainer, "roles", {})
    for role, registry in ROLES.items():
        if role not in cfg:
            continue  # a tree of Dassl's form, which has no mixtures
        if role not in own and cfg[role].NAME:
            raise ConfigError(f"{role}.NAME is {cfg[role].NAME!r}, but {cfg.TRAINER.NAME} has no such role; remove the key")
        chosen = (cfg[role].NAME or name_of(own[role])) if role in own else "none"
        names = [name for _, name in parse_sum(chosen)] if chosen not in ("", "none") else []
        for name in names:
            getattr(registry.get(name), "check_settings", lambda cfg, node: None)(cfg, f"{role}.{name.upper()}")
        _refuse_strangers(cfg, role, *names)
    getattr(trainer, "validate", lambda cfg: None)(cfg)
    before = dict(all_values(cfg))
    get_plugin_manager().hook.validate_config(cfg=cfg)
    _refuse_changes(before, cfg, "validate_config", "raise ConfigError for what can't work, and change nothing")


def _refuse_unread(cfg: CN, keys: Sequence[str]) -> None:
    """Refuse values other than the default of core keys that this kind of trainer does not read."""
    defaults = all_defaults(cfg)
    for key in keys:
        value = get_key(cfg, key)
        if value != defaults[key]:
            by = source_of(cfg, key) or "config"
            raise ConfigError(f"{key} is {shown(value)} (set by {by}), which {cfg.TRAINER.NAME} does not read; leave it out")


def _check_views(cfg: CN, readable: int) -> None:
    """Refuse more augmented views of a picture than the trainer reads."""
    key, wanted = "DATALOADER.K_TRANSFORMS", cfg.DATALOADER.K_TRANSFORMS
    if wanted > readable:
        by = source_of(cfg, key) or "config"
        reads = "one view of a picture" if readable == 1 else f"at most {readable} views of a picture"
        raise ConfigError(f"{key} is {wanted} (set by {by}), but {cfg.TRAINER.NAME} reads {reads}; set it to {readable}")


def _refuse_strangers(cfg: CN, group: str, *chosen: str) -> None:
    """Refuse keys under ``group`` of another method than ``chosen``, unless the file that sets them serves several methods."""
    for source, written in cfg.__dict__.get("_written", {}).items():
        keys = [key for key in written if key.startswith(f"{group}.") and key.count(".") > 1]
        own = tuple(f"{group}.{name.upper()}." for name in chosen)
        strangers = [key for key in keys if not key.startswith(own)]
        # A role's settings in a file belong to the trainer they are written beside, so any file may carry them.
        methods = {key.split(".")[1] for key in keys}
        serves_several = len(strangers) < len(keys) or len(methods) > 1 or group != "TRAINER" or Path(source).name in RECORDS
        shared = source != "command line" and serves_several
        if strangers and not shared:
            kind = "protocol" if group == "PROTOCOL" else "trainer"
            reader = (cfg.PROTOCOL.NAME or "a run outside of protocols") if group == "PROTOCOL" else cfg.TRAINER.NAME
            raise ConfigError(
                f"{strangers[0]} (set by {source}) would be ignored: {reader} reads "
                + (" and ".join(f"{prefix}*" for prefix in own) if own else f"no key under {group}")
                + f"; remove it or choose the {kind} it belongs to"
            )


def _leaves(tree: dict[str, Any], cfg: CN, prefix: str = "") -> list[tuple[str, Any]]:
    """Return (dotted key, value) of every leaf of ``tree``; a mapping is a node only where ``cfg`` has a node."""
    found: list[tuple[str, Any]] = []
    for name, value in tree.items():
        key = f"{prefix}{name}"
        node = cfg.get(name) if isinstance(cfg, CN) else None
        if isinstance(value, dict) and isinstance(node, CN):
            found += _leaves(value, node, key + ".")
        else:
            found.append((key, value))
    return found


def get_key(cfg: CN, key: str) -> Any:
    """Return the value at a dotted key."""
    node: Any = cfg
    for part in key.split("."):
        node = node[part]
    return node


def _set(cfg: CN, key: str, value: Any, source: str) -> None:
    *parents, leaf = str(key).split(".")
    node: Any = cfg
    for depth, part in enumerate([*parents, leaf]):
        names = list(node) if isinstance(node, CN) else []
        if part not in names:
            instead = retired_from(node).get(part, "") if isinstance(node, CN) else ""
            if instead and not value and Path(source).name in RECORDS:
                return  # at its default, where it said nothing
            if instead:
                raise ConfigError(f"{source}: {key} is gone: {instead}")
            raise ConfigError(f"{source}: unknown config key {shown(str(key))}{_hint(parents, leaf, depth, names)}")
        if depth < len(parents):
            node = node[part]
    old = node[leaf]
    if isinstance(old, CN):
        raise ConfigError(f"{source}: {key} is a group of keys ({', '.join(old)}), not a value; set one of them")
    new = _coerce(key, value, old, source)
    if new == old and Path(source).name in RECORDS:
        return
    node[leaf] = new
    cfg.__dict__.setdefault("_sources", {})[key] = source
    cfg.__dict__.setdefault("_written", {}).setdefault(source, []).append(key)  # also what is overwritten later


def _hint(parents: list[str], leaf: str, depth: int, names: list[str]) -> str:
    """Return what may have been meant by a key whose part at ``depth`` is none of ``names``."""
    if leaf == "PREC" and parents[:1] == ["TRAINER"]:  # each of the authors' methods has a key of its own
        return "; one key serves all methods: TRAINER.PREC (fp32, amp or bf16)"
    where = f"under {'.'.join(parents[:depth])}" if depth else "at the top of the tree"
    keys = f" (keys {where}: {', '.join(names)})" if names else f"; {'.'.join(parents[:depth])} is a value, not a group of keys"
    return f"{closest([*parents, leaf][depth], names)}{keys}"


def _coerce(key: str, value: Any, old: Any, source: str) -> Any:
    """Return ``value`` in the type of ``old``; text is read as Python writes values, ints become floats, lists tuples."""
    given = value
    if isinstance(value, str):
        value = _literal(value)
        if isinstance(old, str) and value is not None and not isinstance(value, (str, list, tuple)):
            value = given  # a folder called 007 or 1e3
    if value is None or isinstance(value, dict):
        what = "empty (None)" if value is None else "a mapping"
        raise ConfigError(f"{source}: {key} is {what}; give {a_kind(type(old))} such as {old!r}, or leave the key out")
    if type(value) is int and abs(value) >= 2**63:  # Python neither makes a float of it nor prints it
        raise ConfigError(f"{source}: {key} is {shown(given)}; give a number of at most 64 bits")
    if type(value) is type(old):
        return value
    if isinstance(old, float) and type(value) is int:
        return float(value)
    if isinstance(old, float) and isinstance(value, str):
        try:
            return real(value)  # YAML 1.1 reads 1e-3 as a string
        except ValueError:
            pass
    if isinstance(old, (list, tuple)) and isinstance(value, (list, tuple)):
        return type(old)(value)
    if isinstance(old, str) and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    raise ConfigError(
        f"{source}: {key} is {shown(given)} ({type(given).__name__}), but must be {a_kind(type(old))} such as {old!r}"
    )


def _literal(text: str) -> Any:
    """Return the Python literal that ``text`` writes (number, tuple, list, True, None), or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text
