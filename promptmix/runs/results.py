"""What a run leaves behind: ``results.json``, written whole or not at all, and how to read it back (or Dassl's log)."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from promptmix.engine.league import LABELLED
from promptmix.errors import DataError, UserError, said
from promptmix.files.text import parse_json
from promptmix.runs.checked import check_fields
from promptmix.version import __version__

SCHEMA_VERSION = 1
FILE_NAME = "results.json"
#: The whole config of a run, written before it trains; ``--config-file`` takes it.
CONFIG_NAME = "run_config.yaml"
_MOST_BYTES = 256 * 2**20  # of a results.json or a log; a run's are a thousandth of it
#: What tells one run from another: two runs that differ in any of these never share an output folder.
IDENTITY = (
    "trainer",
    "dataset",
    "backbone",
    "subsample_classes",
    "source_domains",
    "target_domains",
    "shots",
    "seed",
)

#: Keys that make no other setting of a method: where it ran, what it printed, and what `IDENTITY` holds.
NOT_A_SETTING = {
    "DATALOADER.NUM_WORKERS",
    "DATALOADER.PERSISTENT_WORKERS",
    "DATALOADER.TEST.BATCH_SIZE",
    "DATASET.NAME",
    "DATASET.NUM_SHOTS",
    "DATASET.ROOT",
    "DATASET.SOURCE_DOMAINS",
    "DATASET.SUBSAMPLE_CLASSES",
    "DATASET.SUBSET",
    "DATASET.TARGET_DOMAINS",
    "DEVICE",
    "INPUT.FEATURE_CACHE",
    "INPUT.FEATURE_CACHE_DIR",
    "INPUT.FEATURE_CACHE_GB",
    "INPUT.PICTURE_CACHE",
    "INPUT.PICTURE_CACHE_GB",
    "MODEL.ATTENTION",
    "MODEL.BACKBONE.NAME",
    "MODEL.CLASS_CHUNK",
    "MODEL.COMPILE",
    "MODEL.PLAIN_TOWERS",
    "MODEL.SPARSE_EXPERTS",
    "OUTPUT_DIR",
    "PROTOCOL.NAME",
    "RESUME",
    "SEED",
    "TEST.COMPUTE_CMAT",
    "TEST.EVALUATOR",
    "TEST.PER_CLASS_RESULT",
    "TEST.PREDICTIONS",
    "TEST.SPLIT",
    "TRAIN.CHECKPOINT_FREQ",
    "TRAIN.PRINT_FREQ",
    "TRAIN.STEP",
    "TRAINER.NAME",
    "USE_CUDA",
    "VERBOSE",
    "VERSION",
}


@dataclass
class RunResult:
    """One run: what was run, on what, with which settings, and what came out.

    Attributes:
        trainer: name in the trainer registry.
        dataset: name in the data set registry.
        backbone: name in the backbone registry.
        subsample_classes: ``all``, ``base``, ``new``, or ``open`` (all, by a model trained on base).
        source_domains: training domains; empty where the data set has none.
        target_domains: test domains; empty where the data set has none.
        shots: training pictures per class; below 1 = all.
        seed: random seed; negative = not seeded.
        metrics: per split (``test``, ``val``) the evaluator's numbers, in percent.
        config: the whole config tree.
        config_sources: per dotted key that is not at its default, who set it (a file, a flag, the command line).
        versions: python and the libraries that decide the numbers.
        commit: git commit of the checkout that the package lies in, with ``-dirty`` where files differ from it.
        command: the command line, without the interpreter.
        replay: the command that does it again, bit for bit on the same machine with the same versions; empty where none can.
        checkpoint: folder and epoch that were evaluated, for evaluation-only runs.
        started: start of the run, ISO 8601 in UTC.
        finished: end of the run, ISO 8601 in UTC.
        seconds: ``total``, ``train`` (with validation after each epoch) and ``test``.
        peak_memory_mb: largest resident memory (``rss``) and CUDA allocation (``cuda``), in MiB; None where unknown.
        vocabulary: the data set's words: ``classnames``, ``all_classnames``, ``templates``, ``template_groups``.
        approximations: what this run did otherwise than the method says, to save time; empty = nothing.
        learned_parameters: number of scalars that the optimisers may change.
        step_gflops: operations of a training step in 10^9, by shapes or, of small models, by one more step; None where unknown.
        league: what the method sees beside labelled pictures, see ``promptmix.engine.league``.
        files: what else the run left of its test, by file name: SHA-256 of its bytes.
        protocol: the protocol of ``promptmix run`` that this run is part of; "" = by itself.
        part: which part of that protocol (``new``, ``round3/client0``).
        title: what tables call the data set; "" = ``dataset``.
        variant: the sweep's name for these settings; "" = none.
        trained_on: what tables call the data set that the evaluated prompts come from, where it is another one.
        source: file that this was read from (not written).
    """

    trainer: str
    dataset: str
    backbone: str = ""
    subsample_classes: str = "all"
    source_domains: list[str] = field(default_factory=list)
    target_domains: list[str] = field(default_factory=list)
    shots: int = -1
    seed: int = -1
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    config_sources: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    commit: str | None = None
    command: list[str] = field(default_factory=list)
    replay: list[str] = field(default_factory=list)
    checkpoint: dict[str, Any] | None = None
    started: str = ""
    finished: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_mb: dict[str, float | None] = field(default_factory=dict)
    approximations: list[str] = field(default_factory=list)
    learned_parameters: int | None = None
    step_gflops: float | None = None
    league: str = LABELLED
    vocabulary: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    protocol: str = ""
    part: str = ""
    title: str = ""
    variant: str = ""
    trained_on: str = ""
    source: str = ""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> RunResult:
        """Return a result without numbers for a config tree given as plain dicts and lists."""
        data = config["DATASET"]
        return cls(
            trainer=config["TRAINER"]["NAME"],
            dataset=data["NAME"],
            backbone=config["MODEL"]["BACKBONE"]["NAME"],
            subsample_classes=data.get("SUBSAMPLE_CLASSES", "all"),
            source_domains=list(data["SOURCE_DOMAINS"]),
            target_domains=list(data["TARGET_DOMAINS"]),
            shots=data["NUM_SHOTS"],
            seed=config["SEED"],
            config=config,
        )

    def identity(self) -> dict[str, Any]:
        """Return the fields that tell this run from others (see ``IDENTITY``)."""
        return {name: getattr(self, name) for name in IDENTITY}

    def settings(self) -> dict[str, str]:
        """Return every config value that could move a number, by dotted key, as JSON text."""
        nodes = self.config.get("TRAINER", {})
        # Other methods' nodes are in the tree with whatever defaults the program that ran has; nobody read them. A method
        # without a node of its own reads another's, as the authors' KgCoOp reads CoOp's.
        names = [name for name, node in nodes.items() if isinstance(node, dict)]
        own = [name for name in names if name.upper() == self.trainer.upper()]
        others = tuple(f"TRAINER.{name}." for name in names if own and name not in own)
        return {
            key: json.dumps(value)
            for key, value in _leaves(self.config)
            if key not in NOT_A_SETTING and not key.startswith(("LOGGER.", *others))
        }

    def save(self, directory: str | Path) -> Path:
        """Write ``results.json`` into ``directory`` and return its path; a reader never sees half of it."""
        from promptmix.utils import write_json  # here, so that reading results needs no torch

        path = Path(directory) / FILE_NAME
        tree = {key: value for key, value in asdict(self).items() if key != "source"}
        write_json({"schema_version": SCHEMA_VERSION} | tree, path)
        return path


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def plain(node: Any) -> Any:  # any config value
    """Return a config tree as JSON would give it back: dicts, lists, strings and numbers."""
    if isinstance(node, dict):
        return {key: plain(value) for key, value in node.items()}
    return [plain(value) for value in node] if isinstance(node, (list, tuple)) else node


def load(path: str | Path) -> RunResult:
    """Read a ``results.json``.

    Raises:
        DataError: the file is not a results file, or a newer promptmix wrote it; remove it or upgrade.
    """
    try:
        if not Path(path).is_file() or Path(path).stat().st_size > _MOST_BYTES:
            raise ValueError(f"no file, or more than {_MOST_BYTES:,} bytes")
        tree = parse_json(Path(path).read_text(encoding="utf-8"))
        schema = tree["schema_version"]
        if type(schema) is not int:
            raise TypeError(f"schema_version is a {type(schema).__name__}, not a number")
        if schema > SCHEMA_VERSION:
            raise DataError(f"{path} has schema version {schema}, this promptmix reads up to {SCHEMA_VERSION}; upgrade it")
        known = {entry.name for entry in fields(RunResult)}
        result = RunResult(**{key: value for key, value in tree.items() if key in known} | {"source": str(path)})
        check_fields(result)
        return result
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{path} can't be read: {said(error, 'name another folder')}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{path} is not a results file of promptmix ({type(error).__name__}: {error}); remove it or name another folder"
        ) from error


def find(directory: str | Path, test_log: bool = False) -> tuple[list[RunResult], list[str]]:
    """Read every run below ``directory``: ``results.json`` where there is one, else a log of Dassl (``log.txt``).

    Args:
        directory: folder of runs, at any depth.
        test_log: only runs that evaluated an earlier run's checkpoint, without training.

    Returns:
        The runs in order of their paths, and a note for each log or ``results.json`` that holds no result of a run.

    Raises:
        UserError: no such folder, or no run below it.
    """
    root = Path(directory)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; name the output folder of one or more runs")
    runs: list[RunResult] = []
    notes: list[str] = []
    unreadable: list[DataError] = []

    def blocked(error: OSError) -> None:
        unreadable.append(DataError(f"{error.filename} can't be listed: {said(error, 'name another folder')}"))
        notes.append(f"{unreadable[-1]}; left out")

    for folder in sorted(_folders(root, blocked)):
        try:
            run = read_run(folder)
        except DataError as error:
            notes.append(f"{error}; left out")
            unreadable.append(error)
            continue
        if run is None:
            notes.append(f"{newest_log(folder)}: no finished result with its config, left out")
        else:
            runs.append(run)
    if not runs and unreadable:
        raise unreadable[0]
    if not runs:
        shown = f" ({notes[0]})" if notes else ""
        raise UserError(f"{root}: no {FILE_NAME} and no log.txt with a result below it{shown}; train into it first")
    if test_log:
        runs = [run for run in runs if run.checkpoint is not None]
        if not runs:
            raise UserError(f"{root}: no run below it evaluated without training; leave out --test-log to read those that did")
    return runs, notes


def read_run(folder: str | Path) -> RunResult | None:
    """Read the run in ``folder`` from its ``results.json``, or from its newest log; None where there is no result.

    Raises:
        DataError: there is a ``results.json``, but it can't be read.
    """
    log = newest_log(Path(folder))
    if Path(folder, FILE_NAME).exists():
        try:
            return load(Path(folder, FILE_NAME))
        except DataError as error:
            # Another program's file of that name may lie beside a log.
            found = None if log is None or isinstance(error.__cause__, OSError) else from_log(log)
            if found is None:
                raise
            return found
    return None if log is None else from_log(log)


def _folders(root: Path, blocked: Callable[[OSError], object]) -> Iterator[Path]:
    for name, _, files in os.walk(root, onerror=blocked):
        if any(file == FILE_NAME or file.startswith("log.txt") for file in files):
            yield Path(name)


def newest_log(folder: Path) -> Path | None:
    """Return the log that was written last in ``folder``, or None."""
    # Dassl never overwrites a log: later runs in a folder write log.txt-<date>.
    logs = [path for path in folder.glob("log.txt*") if path.is_file()]
    return max(logs, key=lambda path: (path.stat().st_mtime, path.name), default=None)


_METRIC = re.compile(r"^\* ([\w-]+): ([\d.eE+-]+)%?\s*$")
LOG_NAMES = {"error": "error_rate", "macro_acc": "macro_accuracy"}  # what a log line is called in results.json
_SPLIT = re.compile(r"^(?:Evaluate on the \*|Do evaluation on )(\w+)\*? set")  # the second is that of older Dassl
_ARGUMENT = re.compile(r"^(eval_only|load_epoch|model_dir): (.*)$", re.M)
_BANNER = re.compile(r"^\*+\n\*\* Config \*\*\n\*+\n(.*?)(?=^(?:Collecting env info|\*\*)|\Z)", re.M | re.S)


def from_log(path: str | Path) -> RunResult | None:
    """Read a run from a log in Dassl's wording: the printed config, and the last ``=> result`` block of each split.

    Numbers have one decimal there, and only what was printed is known. Returns None for a log without config or result.
    """
    try:
        if Path(path).stat().st_size > _MOST_BYTES:
            return None
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    banner = _BANNER.search(text)
    metrics = metrics_of_log(text)
    if banner is None or not metrics:
        return None
    try:
        run = RunResult.from_config(_printed_config(banner.group(1)))
        check_fields(run)
    except (KeyError, TypeError, ValueError, IndexError):
        return None
    run.metrics = metrics
    run.source = str(path)
    arguments = dict(_ARGUMENT.findall(text[: banner.start()]))
    if arguments.get("eval_only") == "True":
        epoch = arguments.get("load_epoch", "")
        run.checkpoint = {"directory": arguments.get("model_dir", ""), "epoch": int(epoch) if epoch.isdigit() else None}
    written = datetime.fromtimestamp(Path(path).stat().st_mtime, timezone.utc)
    run.started = run.finished = written.isoformat(timespec="milliseconds")
    return run


def metrics_of_log(text: str) -> dict[str, dict[str, float]]:
    """Return the numbers of the last ``=> result`` block of each split, in a log of Dassl's wording."""
    metrics: dict[str, dict[str, float]] = {}
    split, inside = "test", False
    for line in text.splitlines():
        started = _SPLIT.match(line)
        if started:
            split = started.group(1)
        if line.strip() == "=> result":
            metrics[split], inside = {}, True
            continue
        found = _METRIC.match(line) if inside else None
        if found and found.group(1) not in ("total", "correct"):
            with contextlib.suppress(ValueError):  # "1.2.3"
                metrics[split][LOG_NAMES.get(found.group(1), found.group(1))] = float(found.group(2))
    return metrics


def _printed_config(text: str) -> dict[str, Any]:
    """Read back what ``print(cfg)`` shows: ``KEY: value`` for a leaf, ``KEY:`` for a node, two spaces a level."""
    root: dict[str, Any] = {}
    open_nodes = [root]
    for line in text.splitlines():
        found = re.match(r"^( *)([A-Z]\w*):( ?)(.*)$", line)
        if not found:
            continue
        indent, key, leaf, value = found.groups()
        del open_nodes[len(indent) // 2 + 1 :]
        if leaf:
            open_nodes[-1][key] = _literal(value)
        else:
            open_nodes[-1][key] = {}
            open_nodes.append(open_nodes[-1][key])
    return root


def _literal(text: str) -> Any:  # any value of a config
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text
    return list(value) if isinstance(value, tuple) else value


def collect_versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that decide the numbers."""
    return {"promptmix": __version__, "python": platform.python_version()} | _libraries()


@cache
def _libraries() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "torchvision", "open_clip_torch")}


@cache  # the code that runs is what was there when the first run of this process began
def git_commit() -> str | None:
    """Return the commit of the checkout that this package lies in, or None for an installed package."""
    checkout = Path(__file__).resolve().parent.parent.parent
    if not (checkout / ".git").exists():
        return None
    try:
        commit = _git(checkout, "rev-parse", "HEAD")
        changed = _git(checkout, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}-dirty" if changed else commit


def _git(checkout: Path, *command: str) -> str:
    done = subprocess.run(["git", *command], cwd=checkout, capture_output=True, text=True, timeout=20, check=True)
    return done.stdout.strip()
