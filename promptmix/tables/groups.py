"""Which runs stand in one row of a table, and in which of its columns."""

from __future__ import annotations

from promptmix.runs.results import RunResult

#: Columns of each kind of table.
PARTS = {
    "base to new": ("base", "new", "h"),
    "open world": ("base", "new", "h"),
    "all classes": ("test",),
    "cross data set": ("test",),
    "domain generalization": ("test",),
}
#: Numbers that a kind of table shows besides the default metrics: (metric, part, title).
MORE = {"open world": (("openworld_auc", "open", "OpenworldAUC"), ("auroc", "open", "AUROC"))}
#: Protocols of `promptmix run` whose tables are not told by the classes alone.
TRANSFER = {"cross-dataset": "cross data set", "domain-generalization": "domain generalization"}


def part_of(run: RunResult) -> str:
    """Return the column that a run's numbers stand in."""
    return "test" if run.subsample_classes == "all" else run.subsample_classes


def group_of(run: RunResult) -> tuple[str, ...]:
    """Return protocol, data set, shots, method and backbone, as a row of a table has them."""
    protocol = TRANSFER.get(run.protocol, "all classes" if run.subsample_classes == "all" else "base to new")
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
