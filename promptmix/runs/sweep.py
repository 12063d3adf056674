"""A sweep: methods x data sets x shots x seeds x protocols x variants, written down in one YAML file.

```yaml
output: output/emoji                  # results tree
protocols: [base-to-new]
trainers: [ZeroshotCLIP, CoOp, {name: MoCoOp, set: {OPTIM.LR: 0.004}}]
datasets: [EmojiFamilies, my_pictures.yaml]
seeds: [1, 2, 3]
shots: [16]                           # default 16; protocols in rounds: all (-1)
config: configs/trainers/{trainer}/tiny.yaml
targets: {cross-dataset: [...]}       # default: those of the papers
set: {OPTIM.MAX_EPOCH: 10}            # for every run
variants: {short: {OPTIM.MAX_EPOCH: 2}, long: {}}
root: data                            # also: device, plugins, slurm, search (see promptmix.runs.search)
task: {cpus: 4, gpus: 0.5}            # what each run asks Ray or Slurm for; Slurm gives whole GPUs
```
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from promptmix.config.declare import shown
from promptmix.config.yamlfile import read_yaml
from promptmix.errors import ConfigError
from promptmix.registry import PROTOCOL_REGISTRY, closest
from promptmix.runs.protocols import Job, default_config, folder_of

#: Key to the type of its value, in the order of the documentation.
_KEYS: dict[str, type | tuple[type, ...]] = {
    "output": str,
    "protocols": list,
    "trainers": list,
    "datasets": list,
    "seeds": list,
    "shots": list,
    "config": str,
    "targets": dict,
    "set": dict,
    "variants": dict,
    "root": str,
    "device": str,
    "plugins": list,
    "slurm": dict,
    "search": dict,
    "task": dict,
}
_TASK_KEYS: dict[str, type | tuple[type, ...]] = {"cpus": int, "gpus": (int, float)}
_FOLDER_NAME = re.compile(r"[\w.+= -]{1,100}")
_NEEDED = ("output", "protocols", "trainers", "datasets", "seeds")
_TRAINER_KEYS: dict[str, type | tuple[type, ...]] = {
    "name": str,
    "config": str,
    "set": dict,
    "label": str,
    "trials": dict,
}
_DATASET_KEYS: dict[str, type | tuple[type, ...]] = {"name": str, "set": dict}


@dataclass(frozen=True)
class Sweep:
    """What a sweep file says.

    Attributes:
        output: results tree.
        jobs: every job, neighbours on the same data set.
        slurm: parameters for submitit.
        task: ``cpus`` and ``gpus`` that each run asks for.
    """

    output: str
    jobs: list[Job]
    slurm: dict[str, Any] = field(default_factory=dict)
    task: dict[str, Any] = field(default_factory=dict)


def read(path: str) -> Sweep:
    """Read a sweep file.

    Paths in it start from its own folder where they exist there, else from the current one; configs may also be shipped ones.

    Raises:
        ConfigError: the file can't be read, or has a key or value that no sweep has.
        UserError: a plugin that can't be loaded, or an unknown data set.
    """
    file, tree, plugins = read_tree(path)
    if "search" in tree:
        raise ConfigError(
            f"{file} has a `search`: run it with --search, which writes the sweep of each method's best trial, then that one"
        )
    for method in tree["trainers"]:
        if isinstance(method, dict) and "trials" in method:
            raise ConfigError(f"{file}: trials of {method.get('name')} would be ignored; add a `search`, or leave them out")
    jobs = list(jobs_of(tree, file, plugins))
    refuse_shared_folders(jobs, str(file))
    refuse_twins(jobs, str(file))
    return plan_of(tree["output"], jobs, tree, file)


def refuse_shared_folders(jobs: Iterable[Job], where: str) -> None:
    """Refuse runs that would share a folder, also where a file system ignores case.

    Raises:
        ConfigError: there are two; the message names them.
    """
    places: dict[str, Job] = {}
    for job in jobs:
        other = places.setdefault(job.folder.casefold(), job)
        if other is not job and other.folder == job.folder:
            raise ConfigError(f"{where}: {job.name} ({job.protocol}) appears twice; give one of the trainers a `label`")
        if other is not job:
            raise ConfigError(f"{where}: {other.folder} and {job.folder} differ in case alone; choose another name for one")


def refuse_twins(jobs: Iterable[Job], where: str) -> None:
    """Refuse one run under two names, which a table would take for two methods.

    Raises:
        ConfigError: there is one; the message gives both names.
    """
    runs: dict[str, Job] = {}
    for job in jobs:
        asked = dict(zip(job.settings[::2], job.settings[1::2], strict=True))
        plain = replace(job, folder="", variant="", settings=tuple(sorted(asked.items())), shots=max(job.shots or 0, 0))
        other = runs.setdefault(repr(plain), job)
        if other is not job:
            twice = f"{job.name} is there" if job.name == other.name else f"{other.name} and {job.name} are one run"
            raise ConfigError(f"{where}: {twice} twice ({job.protocol}); leave one out")


def plan_of(output: str, jobs: list[Job], tree: dict[str, Any], file: Path) -> Sweep:
    """Return the sweep of ``jobs`` that asks for what the tree of a sweep file says."""
    return Sweep(output, jobs, tree.get("slurm", {}), _task(tree.get("task", {}), f"{file}: task"))


def _task(task: dict[str, Any], where: str) -> dict[str, Any]:
    """Return what each run asks for.

    Raises:
        ConfigError: a number that no run can have.
    """
    check_keys(task, _TASK_KEYS, (), where)
    cpus, gpus = task.get("cpus", 1), task.get("gpus", 0)
    if isinstance(cpus, bool) or cpus < 1:
        raise ConfigError(f"{where}: cpus is {cpus}, but must be 1 or more")
    if isinstance(gpus, bool) or not 0 <= gpus <= 1:
        raise ConfigError(f"{where}: gpus is {gpus}, but must be from 0 to 1, for each process of a run (--devices)")
    return task


def read_tree(path: str) -> tuple[Path, dict[str, Any], tuple[str, ...]]:
    """Return a sweep file, what it holds, and its plugins, which are loaded.

    Raises:
        ConfigError: the file can't be read, or has a key that no sweep has.
    """
    from promptmix.config.flags import load_plugins, resolve_config

    file = resolve_config(path)
    tree = read_yaml(file, "sweep file")
    check_keys(tree, _KEYS, _NEEDED, str(file))
    plugins = tuple(_located(str(name), file) for name in tree.get("plugins", []))
    load_plugins(plugins)
    return file, tree, plugins


def jobs_of(tree: dict[str, Any], file: Path, plugins: tuple[str, ...]) -> Iterable[Job]:
    """Yield every job of what a sweep file holds."""
    where = str(file)
    for name in _list(tree["protocols"], f"{where}: protocols"):
        if name not in PROTOCOL_REGISTRY:
            known = list(PROTOCOL_REGISTRY)
            raise ConfigError(f"{where}: protocols: unknown {name!r}{closest(str(name), known)} (choices: {', '.join(known)})")
    targets = {name: _list(value, f"{where}: targets.{name}") for name, value in tree.get("targets", {}).items()}
    for name in targets:
        if name not in tree["protocols"]:
            raise ConfigError(f"{where}: targets.{name} would be ignored; protocols: {', '.join(tree['protocols'])}")
    seeds, shots = (_integers(tree.get(key, []), f"{where}: {key}") for key in ("seeds", "shots"))
    trainers = [method_entry(value, where) for value in tree["trainers"]]
    datasets = [_entry(value, _DATASET_KEYS, f"{where}: datasets") for value in tree["datasets"]]
    variants = _variants(tree, [method["label"] for method in trainers if "label" in method], where)
    shared = flat(tree.get("set", {}), f"{where}: set")
    root = _root(tree.get("root", ""), file)
    for protocol, data, method, (variant, values) in product(tree["protocols"], datasets, trainers, variants.items()):
        dataset = _located(data["name"], file)
        chosen = method.get("config") or tree.get("config") or default_config(method["name"], dataset)
        label = "-".join(filter(None, (method.get("label", ""), variant)))
        own = (flat(entry.get("set", {}), f"{where}: set of {entry['name']}") for entry in (data, method))
        every = [pair for pairs in (shared, *own, values) for pair in pairs.items()]
        settings = tuple(item for key, value in every if _is_read(key, protocol, tree) for item in (key, value))
        for shot, seed in product(shots or [PROTOCOL_REGISTRY.get(protocol).shots], seeds):
            yield Job(
                protocol=protocol,
                trainer=method["name"],
                dataset=dataset,
                folder=folder_of(tree["output"], protocol, dataset, method["name"], label, shot, seed),
                seed=seed,
                shots=shot,
                targets=tuple(_located(target, file) for target in targets.get(protocol, ())),
                config_file=_located(chosen, file),
                settings=settings,
                variant=label,
                plugins=plugins,
                root=root,
                device=tree.get("device", ""),
            )


def _variants(tree: dict[str, Any], labels: Sequence[str], where: str) -> dict[str, dict[str, Any]]:
    """Return the overrides of each variant, by name; without variants those of one without a name."""
    named = tree.get("variants", {})
    if "variants" in tree and not named:
        raise ConfigError(f"{where}: variants is empty, so that nothing would run; name one or more, or leave the key out")
    if not all(isinstance(name, str) for name in named):
        raise ConfigError(f"{where}: variants: names must be text, not {', '.join(map(shown, named))}")
    for name in (*named, *labels):
        if not _FOLDER_NAME.fullmatch(name) or not name.strip(".") or name != name.strip():
            raise ConfigError(
                f"{where}: {shown(name)} names a variant or label, which becomes part of a folder's name; "
                "write it with letters, numbers, '.', '_', '-', '+', '=' and spaces between them"
            )
    return {name: flat(values, f"{where}: variants.{name}") for name, values in named.items()} or {"": {}}


def _root(root: str, file: Path) -> str:
    """Return the folder of the data sets, which may be given from the sweep file's folder."""
    if root and not Path(root).is_absolute() and (file.parent / root).is_dir():
        root = str(file.parent / root)
    if root and not Path(root).is_dir():
        raise ConfigError(f"{file}: root {root} is not a folder; name the folder of the data sets, or leave the key out")
    return root


def _is_read(key: str, protocol: str, tree: dict[str, Any]) -> bool:
    """Tell whether a setting is not one of another protocol of the same sweep."""
    others = tuple(f"PROTOCOL.{name.upper()}." for name in tree["protocols"] if name != protocol)
    return not key.startswith(others)


def check_keys(tree: Any, keys: Mapping[str, Any], needed: Iterable[str], where: str) -> None:
    """Refuse a tree with unknown or missing keys, or with values of another type.

    Raises:
        ConfigError: it has some.
    """
    if not isinstance(tree, dict):
        raise ConfigError(f"{where} must hold keys and values ({', '.join(keys)}), not {type(tree).__name__}")
    for key, value in tree.items():
        if key not in keys:
            raise ConfigError(f"{where}: unknown key {key!r}{closest(str(key), list(keys))} (keys: {', '.join(keys)})")
        if not isinstance(value, keys[key]) or value in ([], ""):
            shown = "empty" if value in (None, [], "") else repr(value)
            kind = keys[key]
            wanted = kind.__name__ if isinstance(kind, type) else "number"
            raise ConfigError(f"{where}: {key} is {shown}, but must be a {wanted}")
    for key in needed:
        if key not in tree:
            raise ConfigError(f"{where}: {key} is missing (needed: {', '.join(needed)})")


def method_entry(value: Any, where: str) -> dict[str, Any]:
    """Return a trainer's entry, given as a name or as a mapping with a name."""
    return _entry(value, _TRAINER_KEYS, f"{where}: trainers")


def _entry(value: Any, keys: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return an entry of a list, given as a name or as a mapping with a name."""
    entry = {"name": value} if isinstance(value, str) else value
    check_keys(entry, keys, ("name",), where)
    return dict(entry)


def flat(tree: Any, where: str, prefix: str = "") -> dict[str, Any]:
    """Return overrides by dotted key, however deep they are nested in the file."""
    if not isinstance(tree, dict):
        raise ConfigError(f"{where} is {tree!r}, but must be a mapping of config keys to values")
    found: dict[str, Any] = {}
    for key, value in tree.items():
        inner = flat(value, where, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        twice = sorted(found.keys() & inner.keys())
        if twice:
            raise ConfigError(f"{where}: {twice[0]} appears twice, nested and with dots; leave one out")
        found |= inner
    return found


def _list(value: Any, where: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ConfigError(f"{where} is {value!r}, but must be a list of names")
    return value


def _integers(values: list[Any], where: str) -> list[int]:
    if not all(type(value) is int for value in values):
        raise ConfigError(f"{where} is {values!r}, but must be a list of whole numbers")
    return values


def _located(path: str, file: Path) -> str:
    """Return ``path`` from the sweep file's folder where it exists there, else as it is; a plain name is not a path."""
    named = path and not Path(path).suffix and "/" not in path
    beside = file.parent / path
    return path if named or not path or Path(path).is_absolute() or not beside.exists() else str(beside)
