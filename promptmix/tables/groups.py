"""Which runs stand in one row of a table, and in which of its columns."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import PurePath
from statistics import fmean

from promptmix.runs.results import RunResult

#: Columns of each kind of table.
PARTS = {
    "base to new": ("base", "new", "h"),
    "open world": ("base", "new", "h"),
    "all classes": ("test",),
    "cross data set": ("test",),
    "domain generalization": ("test",),
    "active": (),  # a column for each round
    "federated": ("last", "best"),
}
#: What columns are called that no capital letter makes.
TITLES = {"h": "H", "last": "Last rounds", "best": "Best round"}
#: How many rounds pFedMoAP's authors average at the end.
_LAST = 5
#: Numbers that a kind of table shows besides the default metrics: (metric, part, title).
MORE = {"open world": (("openworld_auc", "open", "OpenworldAUC"), ("auroc", "open", "AUROC"))}
#: Protocols of `promptmix run` whose tables are not told by the classes alone.
TRANSFER = {"cross-dataset": "cross data set", "domain-generalization": "domain generalization"}
_ROUNDS = ("active", "federated")
_ROUND = re.compile(r"round(\d{1,9})/")


def part_of(run: RunResult) -> str:
    """Return the column that a run's numbers stand in."""
    if run.protocol in _ROUNDS:
        return run.part
    return "test" if run.subsample_classes == "all" else run.subsample_classes


def columns_of(protocol: str, parts: Iterable[str]) -> tuple[str, ...]:
    """Return the columns of a kind of table, of whose rows ``parts`` are all that have numbers."""
    return PARTS[protocol] or tuple(sorted(set(parts), key=lambda part: (len(part), part)))


def title_of(part: str) -> str:
    """Return what a column is called."""
    return TITLES.get(part) or part.capitalize().replace("Round", "Round ")


def joined(runs: Iterable[RunResult]) -> list[RunResult]:
    """Return runs, with those of federated clients joined: the mean over clients, of the last rounds and of the best round."""
    found: list[RunResult] = []
    clients: dict[tuple[str, ...], dict[int, list[RunResult]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        number = _ROUND.match(run.part)
        if run.protocol == "federated" and number:
            folder = PurePath(run.config["OUTPUT_DIR"]).parts[:-2]
            clients[folder][int(number[1])].append(run)
        else:  # a record of no round that there is stands by itself
            found.append(replace(run, protocol="", part="") if run.protocol == "federated" else run)
    for rounds in clients.values():
        each = [_mean([run.metrics for run in rounds[number]]) for number in sorted(rounds)]
        best = max(each, key=lambda metrics: metrics.get("test", {}).get("accuracy", 0.0))
        every = [run for number in sorted(rounds) for run in rounds[number]]
        seconds = {"train": sum(run.seconds.get("train", 0.0) for run in every)}
        last = replace(every[-1], part="last", metrics=_mean(each[-_LAST:]), seconds=seconds, started=every[0].started)
        found += [last, replace(last, part="best", metrics=best, seconds={})]
    return found


def _mean(each: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Return the mean of every number that all have."""
    splits = set.intersection(*(set(metrics) for metrics in each))
    shared = {split: set.intersection(*(set(metrics[split]) for metrics in each)) for split in splits}
    return {split: {name: fmean(m[split][name] for m in each) for name in sorted(names)} for split, names in shared.items()}


def group_of(run: RunResult) -> tuple[str, ...]:
    """Return protocol, data set, shots, method and backbone, as a row of a table has them."""
    protocol = TRANSFER.get(run.protocol, "all classes" if run.subsample_classes == "all" else "base to new")
    if run.protocol in _ROUNDS:
        protocol = run.protocol
    if run.protocol == "open-world" or run.subsample_classes == "open":
        protocol = "open world"
    shots = str(run.shots) if run.shots > 0 else "all"
    name = run.title or run.dataset
    other = run.trained_on not in ("", name)  # the domains it was trained on are not those of this data set
    domains = [", ".join(names) for names in ([] if other else run.source_domains, run.target_domains) if names]
    dataset = (f"{run.trained_on} → " if other else "") + name
    if domains:
        dataset += f" ({' → '.join(dict.fromkeys(domains))})"
    if run.config.get("DATASET", {}).get("CLASS_ORDER") == "seeded":  # its base and new classes are not the papers'
        dataset += ", seeded classes"
    return protocol, dataset, shots, run.trainer, _weights(run)


def _weights(run: RunResult) -> str:
    """Return the backbone's name, with what it was loaded from where that is not its usual weights."""
    node = run.config.get("MODEL", {}).get("BACKBONE", {})
    if not node.get("PRETRAINED", True):
        return f"{run.backbone} (random)"
    tag = node.get("TAG", "")
    return f"{run.backbone} ({tag})" if tag not in ("", "openai") else run.backbone
