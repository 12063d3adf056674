"""A search with the same budget for every method: each gets as many trials, the val part chooses, a sweep file says what won.

```yaml
search:                         # in a sweep file
  seeds: [11, 12, 13]           # none of those of the sweep
  trials:                       # by name; `x3` multiplies what the method's config says
    low: {OPTIM.LR: x0.3}
    written: {}
    high: {OPTIM.LR: x3}
  metric: accuracy              # default; the training part's, on val
  protocols: [base-to-new]      # default: those of the sweep; also: datasets
trainers:
  - CoOp
  - {name: LinearProbe, trials: {weak: {TRAINER.LINEARPROBE.C: x0.1}, written: {}, strong: {TRAINER.LINEARPROBE.C: x10}}}
```

The test pictures are never looked at: every trial runs with ``TEST.SPLIT: val``, and where a protocol has new classes, only the
classes that were trained on count.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from tabulate import tabulate

from promptmix.config.declare import shown
from promptmix.config.tree import get_key
from promptmix.errors import ConfigError, OutputError, UserError
from promptmix.files.text import csv_cell, json_text, table_cell
from promptmix.runs import results, sweep
from promptmix.runs.protocols import Job, make_part_config, parts
from promptmix.utils import atomic_write

_KEYS: dict[str, type | tuple[type, ...]] = {
    "seeds": list,
    "trials": dict,
    "metric": str,
    "protocols": list,
    "datasets": list,
}
_METRICS = ("accuracy", "macro_accuracy")
_FACTOR = re.compile(r"x(\d+\.?\d*(?:e[+-]?\d+)?)", re.ASCII)
_MARK = "# Written by `promptmix sweep --search`"


@dataclass(frozen=True)
class Trial:
    """What one method tries.

    Attributes:
        method: its entry in the sweep file, without ``trials``.
        name: of the trial.
        settings: what it adds to the entry's ``set``.
        jobs: its runs.
    """

    method: dict[str, Any]
    name: str
    settings: dict[str, Any]
    jobs: tuple[Job, ...]


@dataclass(frozen=True)
class Search:
    """What the ``search`` of a sweep file says.

    Attributes:
        file: the sweep file.
        tree: what it holds.
        metric: what chooses.
        output: results tree of the trials.
        methods: the trials of each method.
    """

    file: Path
    tree: dict[str, Any]
    metric: str
    output: str
    methods: list[list[Trial]]

    @property
    def jobs(self) -> list[Job]:
        """Return every job."""
        return [job for trials in self.methods for trial in trials for job in trial.jobs]

    @property
    def chosen_file(self) -> Path:
        """Return where the sweep of what won goes: beside the sweep file, so that its relative paths hold."""
        return self.file.with_name(f"{self.file.stem}-chosen.yaml")


def read(path: str) -> Search:
    """Read a sweep file with a ``search``.

    Raises:
        ConfigError: there is none, or it has a key or value that no search has, or methods with different numbers of trials.
    """
    file, tree, plugins = sweep.read_tree(path)
    node = tree.get("search")
    if node is None:
        raise ConfigError(f"{file} has no `search`; add one (docs/protocols.md), or leave out --search")
    where = f"{file}: search"
    sweep.check_keys(node, _KEYS, ("seeds", "trials"), where)
    if not node["trials"]:
        raise ConfigError(f"{where}: trials is empty, so that nothing could win; name one or more")
    metric = node.get("metric", _METRICS[0])
    if metric not in _METRICS:
        raise ConfigError(f"{where}: metric is {shown(metric)}, but must be one of: {', '.join(_METRICS)}")
    both = sorted(set(map(str, node["seeds"])) & set(map(str, tree["seeds"])))
    if both:
        raise ConfigError(f"{where}: seeds {', '.join(both)} are also those of the sweep; choose on others than you report")
    if "variants" in tree:
        raise ConfigError(f"{where}: there are `variants` too, which would all get one method's choice; write them as trainers")
    output = f"{tree['output']}-search"
    replaced = {key: node[key] for key in ("seeds", "protocols", "datasets") if key in node} | {"output": output}
    replaced["set"] = tree.get("set", {}) | {"TEST.SPLIT": "val"}
    kept = {key: value for key, value in tree.items() if key not in ("search", "targets")}
    found = []
    for method in tree["trainers"]:
        entry = sweep.method_entry(method, str(file))
        named = entry.pop("trials", node["trials"])
        if len(named) != len(node["trials"]):
            raise ConfigError(
                f"{file}: {entry['name']} has {len(named)} trials, the others {len(node['trials'])}; give each method as many"
            )
        found.append([_trial(entry, name, values, kept | replaced, file, plugins) for name, values in named.items()])
    search = Search(file, tree, metric, output, found)
    sweep.refuse_shared_folders(search.jobs, where)
    return search


def _trial(entry: dict[str, Any], name: Any, values: Any, tree: dict[str, Any], file: Path, plugins: tuple[str, ...]) -> Trial:
    """Return a trial, with numbers for its factors."""
    if not isinstance(name, str):
        raise ConfigError(f"{file}: trials: names must be text, not {shown(name)}")
    label = "-".join(filter(None, (entry.get("label", ""), name)))
    own = sweep.flat(entry.get("set", {}), f"{file}: set of {entry['name']}")

    def jobs(settings: dict[str, Any]) -> tuple[Job, ...]:
        return tuple(sweep.jobs_of(tree | {"trainers": [entry | {"label": label, "set": own | settings}]}, file, plugins))

    settings = sweep.flat(values, f"{file}: trials.{name}")
    if any(_factor(value) for value in settings.values()):
        first = jobs({key: value for key, value in settings.items() if not _factor(value)})[0]
        written = make_part_config(first, parts(first)[0])
        settings = {key: _times(written, key, value, f"{file}: trials.{name}") for key, value in settings.items()}
    return Trial(entry, name, settings, jobs(settings))


def _factor(value: Any) -> re.Match[str] | None:
    return _FACTOR.fullmatch(value) if isinstance(value, str) else None


def _times(cfg: Any, key: str, value: Any, where: str) -> Any:  # a config tree; any value of it
    """Return what a factor makes of the configured value, or a value that is not a factor as it is."""
    factor = _factor(value)
    if factor is None:
        return value
    try:
        old = get_key(cfg, key)
    except (KeyError, AttributeError) as error:
        raise ConfigError(f"{where}: unknown key {shown(key)} (`promptmix list keys` names them)") from error
    if isinstance(old, bool) or not isinstance(old, (int, float)):
        raise ConfigError(f"{where}: {key} is {value}, which multiplies a number, but the config has {shown(old)}; give a value")
    product = old * float(factor[1])
    return max(1, round(product)) if isinstance(old, int) else float(f"{product:.12g}")


def scores(search: Search) -> list[list[float]]:
    """Return the mean of each method's trials on the val part, in percent.

    Raises:
        UserError: a run that isn't there, or has no val part.
    """
    return [[fmean(_numbers(trial, search.metric)) for trial in trials] for trials in search.methods]


def _numbers(trial: Trial, metric: str) -> Iterator[float]:
    for job in trial.jobs:
        path = Path(job.folder, next(part.name for part in parts(job) if part.trains), results.FILE_NAME)
        found = results.load(path).metrics.get("val", {})
        if metric not in found:
            raise UserError(f"{path} has no {metric} on val; search on a data set with a val part (search.datasets)")
        yield found[metric]


def best(numbers: list[float]) -> int:
    """Return which trial won; of several that did, the first."""
    return numbers.index(max(numbers))


def render(search: Search, numbers: list[list[float]], form: str) -> str:
    """Return a table with a line for each trial, in one of the formats of `promptmix parse`."""
    head = ("Method", "Label", "Trial", f"{search.metric} on val", "Chosen")
    lines: list[tuple[Any, ...]] = []
    for trials, reached in zip(search.methods, numbers, strict=True):
        won = best(reached)
        for index, (trial, number) in enumerate(zip(trials, reached, strict=True)):
            method = trial.method
            lines.append((method["name"], method.get("label", ""), trial.name, round(number, 2), index == won))
    if form == "json":
        return json_text(json.dumps([dict(zip(head, line, strict=True)) for line in lines], indent=2))
    if form == "csv":
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([[csv_cell(cell) for cell in line] for line in (head, *lines)])
        return text.getvalue().rstrip("\n")
    cells = [[*(table_cell(cell, form) for cell in line[:3]), f"{line[3]:.2f}", "yes" if line[4] else ""] for line in lines]
    return tabulate(cells, head, tablefmt=form, disable_numparse=True)


def write(search: Search, numbers: list[list[float]]) -> Path:
    """Write the sweep of what won, an ordinary sweep file, and return its path.

    Raises:
        OutputError: it can't be written, or a file of that name is there that no search wrote.
    """
    path = search.chosen_file
    try:
        if path.exists() and not path.read_text(encoding="utf-8").startswith(_MARK):
            raise OutputError(f"{path} is there and no search wrote it; move it away")
        atomic_write(path, lambda target: target.write_text(_chosen(search, numbers), encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OutputError(f"{path} can't be written ({error}); copy the sweep file to a folder of yours") from error
    return path


def _chosen(search: Search, numbers: list[list[float]]) -> str:
    """Return the text of the sweep of what won: a line for each method, with what its trials reached."""
    tree = {key: value for key, value in search.tree.items() if key not in ("search", "trainers")}
    seeds = ", ".join(map(str, search.tree["search"]["seeds"]))
    lines = [
        f"{_MARK} from {search.file.name}: of {len(search.methods[0])} trials a method,",
        f"# the one with the best {search.metric} on the val part, mean over seeds {seeds}; of several the first.",
        yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, allow_unicode=True, width=120).rstrip("\n"),
        "trainers:",
    ]
    for trials, reached in zip(search.methods, numbers, strict=True):
        trial = trials[best(reached)]
        own = sweep.flat(trial.method.get("set", {}), "set") | trial.settings
        entry = trial.method | ({"set": own} if own else {})
        text = yaml.safe_dump(entry, sort_keys=False, default_flow_style=True, allow_unicode=True, width=10**6).strip()
        tried = ", ".join(f"{other.name} {number:.1f}" for other, number in zip(trials, reached, strict=True))
        lines.append(f"- {text} # {trial.name} of {tried}")
    return "\n".join(lines) + "\n"
