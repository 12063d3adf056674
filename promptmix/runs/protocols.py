"""The field's protocols, each in one description: what is trained, and what is evaluated from the same checkpoint.

A ``Job`` is one training with every evaluation that belongs to it; its folder holds one run folder for each. What has
finished with the same config is skipped, and a training that was cut off goes on from its last checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from promptmix.config.flags import load_plugins, make_config, merge_flags, resolve_config
from promptmix.config.yamlfile import read_yaml
from promptmix.errors import ConfigError
from promptmix.files.text import counted
from promptmix.hookspecs import hookimpl
from promptmix.registry import DATASET_REGISTRY, PROTOCOL_REGISTRY, Registry, closest

if TYPE_CHECKING:
    from yacs.config import CfgNode

    from promptmix.runs.results import RunResult


@dataclass(frozen=True)
class Protocol:
    """What is trained, and what is evaluated with the same learned tensors.

    One that does more (rounds) is a subclass.

    Attributes:
        summary: one line for the help.
        part: folder of the run that trains and is tested on the classes it trained on.
        classes: classes that it trains on: all or base.
        new: also evaluate the new classes of the same data set.
        open: also evaluate base and new classes together, by OpenworldAUC.
        shots: training pictures per class if nobody says otherwise; below 1 = all.
        parallel: parts of one wave may run side by side, as pieces of the job.
        targets: source -> what is evaluated beside it if nobody says otherwise; data sets, or domains of the source.
            None = the protocol has no targets.
    """

    summary: str
    part: str
    classes: str
    new: bool = False
    targets: dict[str, tuple[str, ...]] | None = None
    open: bool = False
    shots: int = 16
    parallel: bool = False

    def parts(self, job: Job) -> list[Part]:
        """Return the runs of a job."""
        found = [Part(self.part, job.dataset, self.classes, trains=True, wave=0)]
        if self.new:
            found.append(Part("new", job.dataset, "new"))
        if self.open:
            found.append(Part("open", job.dataset, "open", settings=("TEST.EVALUATOR", "OpenWorld")))
        if self.targets is None:
            if job.targets:
                raise ConfigError(f"--targets {' '.join(job.targets)}: {job.protocol} has no targets; leave them out")
            return found
        source = registry_name(job.dataset)
        targets = job.targets or self.targets.get(source, ())
        if not targets:
            known = ", ".join(self.targets)
            raise ConfigError(f"{job.protocol} from {source}: give --targets; there are defaults for {known} only")
        return [*found, *(_target(job, source, target) for target in targets)]

    def check(self, job: Job) -> None:
        """Refuse a job that can't be done, beyond what the config of each part shows."""

    def counts(self, job: Job, part: Part, result: RunResult, before: Sequence[RunResult]) -> bool:
        """Tell whether a result stands, seen those of the wave before: an evaluation must be younger than its training."""
        return all(result.started >= other.finished for other in before)

    def prepare(self, job: Job, part: Part, cfg: CfgNode, before: Sequence[RunResult]) -> bool:
        """Make what a part needs before it runs; return whether a result that is there stands after all."""
        return False

    def options(self, job: Job, part: Part, before: Sequence[RunResult]) -> dict[str, Any]:
        """Return what else ``promptmix.runs.run.running`` takes for a part."""
        return {}


_TEN = (
    *("Caltech101", "OxfordPets", "StanfordCars", "OxfordFlowers", "Food101", "FGVCAircraft"),
    *("SUN397", "DescribableTextures", "EuroSAT", "UCF101"),
)
_STYLES = ("fluent_3d", "openmoji_black", "fluent_high_contrast")

#: The field's own; a plugin may register more.
PROTOCOLS: dict[str, Protocol] = {
    "few-shot": Protocol("train on all classes, test on them", part="all", classes="all"),
    "base-to-new": Protocol("train on the base classes, test on base and new ones", part="base", classes="base", new=True),
    "open-world": Protocol(
        "base-to-new, then base and new classes together: OpenworldAUC", part="base", classes="base", new=True, open=True
    ),
    "cross-dataset": Protocol(
        "train on all classes of one data set, test on others",
        part="source",
        classes="all",
        targets={"ImageNet": _TEN, "EmojiFamilies": ("EmojiConcepts",), "EmojiConcepts": ("EmojiFamilies",)},
    ),
    "domain-generalization": Protocol(
        "train on all classes of one data set, test on its variants: other data sets, or other domains of the same",
        part="source",
        classes="all",
        targets={
            "ImageNet": ("ImageNetV2", "ImageNetSketch", "ImageNetA", "ImageNetR"),
            "EmojiFamilies": _STYLES,
            "EmojiConcepts": _STYLES,
        },
    ),
}

#: Keys that the protocol sets, with the flag that sets them.
_FIXED = {
    "TRAINER.NAME": "--trainer",
    "DATASET.NAME": "--datasets",
    "DATASET.NUM_SHOTS": "--shots",
    "DATASET.SUBSAMPLE_CLASSES": "the protocol",
    "SEED": "--seeds",
    "OUTPUT_DIR": "--output-dir",
    "RESUME": "the output folder",
    "PROTOCOL.NAME": "the protocol",
    "DATASET.SUBSET": "the protocol",
}


@dataclass(frozen=True)
class Job:
    """One training and what is evaluated from it; plain values only, so that it can be sent to another machine.

    Attributes:
        protocol: a name of the protocol registry.
        trainer: a name of the trainer registry.
        dataset: a name of the data set registry, or a YAML file; "" = the one that ``config_file`` names.
        folder: where the run folders go.
        seed: random seed.
        shots: training pictures per class; None = as configured.
        targets: for protocols with targets; empty = their defaults.
        config_file: the method's config; ``{trainer}`` and ``{dataset}`` (its file's name) are filled in.
        settings: ``KEY VALUE`` pairs.
        variant: name of a set of overrides, for people.
        plugins: modules or files to load.
        root: folder of the data sets.
        device: auto, cpu or cuda; "" = as configured.
        piece: the one part to run, where a protocol's parts don't wait for each other; "" = all.
    """

    protocol: str
    trainer: str
    dataset: str
    folder: str
    seed: int
    shots: int | None = None
    targets: tuple[str, ...] = ()
    config_file: str = ""
    settings: tuple[Any, ...] = ()
    variant: str = ""
    plugins: tuple[str, ...] = ()
    root: str = ""
    device: str = ""
    piece: str = ""

    @property
    def place(self) -> Path:
        """Folder that is this job's alone."""
        return Path(self.folder, self.piece)

    @property
    def name(self) -> str:
        """Return a line that tells this job from its neighbours."""
        shots = "" if self.shots is None else counted(self.shots, "shot")
        data = title(self.dataset) if self.dataset else ""
        return " ".join(filter(None, (self.trainer, self.variant, data, shots, f"seed {self.seed}", self.piece)))


@dataclass(frozen=True)
class Part:
    """One run of a job: the training, or one evaluation.

    Attributes:
        name: its folder in the job's folder.
        dataset: as in ``Job``.
        classes: all, base, new or open.
        domains: domains to test on; empty = as configured.
        settings: ``KEY VALUE`` pairs that make it this part.
        trains: it trains, and is not an evaluation of what was trained.
        wave: it waits for the parts of all smaller waves.
    """

    name: str
    dataset: str
    classes: str
    domains: tuple[str, ...] = ()
    settings: tuple[Any, ...] = ()
    trains: bool = False
    wave: int = 1


@cache
def dataset_files() -> dict[str, str]:
    """Return the shipped config of each data set, by the name in the registry."""
    shipped = Path(str(files("promptmix.configs")), "datasets")
    found = {path: yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(shipped.glob("*.yaml"))}
    return {tree["DATASET"]["NAME"]: str(path) for path, tree in found.items()}


def is_file(dataset: str) -> bool:
    """Tell whether ``dataset`` is a YAML file rather than a name."""
    return dataset.endswith((".yaml", ".yml"))


def title(dataset: str) -> str:
    """Return what tables call a data set: its name, or the name of the file that describes it."""
    return Path(dataset).stem if is_file(dataset) else dataset


def registry_name(dataset: str) -> str:
    """Return the name in the data set registry.

    Raises:
        ConfigError: a file that can't be read, or that names no data set.
        RegistryError: no such data set.
    """
    name = dataset
    if is_file(dataset):
        path = resolve_config(dataset)
        try:
            name = str(read_yaml(path, "data set file")["DATASET"]["NAME"])
        except (KeyError, TypeError) as error:
            raise ConfigError(f"data set file {path} must be YAML that sets DATASET.NAME (`promptmix list datasets`)") from error
    DATASET_REGISTRY.get(name)
    return name


def parts(job: Job) -> list[Part]:
    """Return the runs of a job: those that train first, then what is evaluated from them.

    Raises:
        UserError: targets for a protocol that has none, no targets for one that needs some, or an unknown one.
    """
    protocol: Protocol = PROTOCOL_REGISTRY.get(job.protocol)
    return protocol.parts(job)


def _target(job: Job, source: str, target: str) -> Part:
    """Return the evaluation of a data set, or of a domain of the source."""
    name = f"to-{title(target)}"
    if is_file(target) or target in DATASET_REGISTRY:
        if registry_name(target) == source and title(target) == title(job.dataset):
            raise ConfigError(f"--targets {target} is the source itself, which is evaluated anyway; leave it out")
        return Part(name, target, "all")
    domains = tuple(getattr(DATASET_REGISTRY.get(source), "domains", ()))
    if job.protocol != "domain-generalization" or (domains and target not in domains):
        known = [*DATASET_REGISTRY, *(domains if job.protocol == "domain-generalization" else ())]
        raise ConfigError(
            f"--targets {target}: no data set{closest(target, known)}"
            + (f", and no domain of {source} (domains: {', '.join(domains)})" if domains else "")
        )
    return Part(name, job.dataset, "all", (target,))


def make_part_config(job: Job, part: Part, more: Sequence[Any] = ()) -> CfgNode:
    """Return the config of one run: the method's file, then the data set's, which says what it is, then the job's settings.

    Args:
        job: the job.
        part: one of its parts.
        more: ``KEY VALUE`` pairs of the protocol itself.

    Raises:
        UserError: a file, key or value that does not fit, or a key that the protocol sets.
    """
    from promptmix import config

    fixed = _FIXED | dict.fromkeys(part.settings[::2], "the protocol")
    for key in job.settings[::2]:
        if key in fixed:
            raise ConfigError(f"{key} is set by {fixed[key]} in `{job.protocol}`; remove it from the overrides")
    name = registry_name(part.dataset) if part.dataset else ""
    data_file = part.dataset if is_file(part.dataset) else dataset_files().get(name, "")
    method_file = job.config_file.replace("{trainer}", job.trainer).replace("{dataset}", Path(data_file).stem or name)
    cfg = make_config([method_file], {}, [], job.plugins)
    if name and cfg.DATASET.NAME not in ("", name):  # then its domains are another data set's
        config.merge_opts(cfg, ["DATASET.SOURCE_DOMAINS", "()", "DATASET.TARGET_DOMAINS", "()"], source="--datasets")
    if data_file:
        config.merge_file(cfg, resolve_config(data_file))
    flags: dict[str, tuple[str, Any]] = {
        "--trainer": ("TRAINER.NAME", job.trainer),
        "--datasets": ("DATASET.NAME", name),
        "--root": ("DATASET.ROOT", job.root),
        "--seeds": ("SEED", job.seed),
        "--shots": ("DATASET.NUM_SHOTS", job.shots),
        "--device": ("DEVICE", job.device),
        job.protocol: ("DATASET.SUBSAMPLE_CLASSES", part.classes),
        "run": ("PROTOCOL.NAME", job.protocol),
        "--targets": ("DATASET.TARGET_DOMAINS", part.domains or None),
        "--output-dir": ("OUTPUT_DIR", str(Path(job.folder, part.name))),
    }
    merge_flags(cfg, flags)
    config.merge_opts(cfg, [*job.settings, *part.settings, *more])
    return cfg


def check(job: Job) -> None:
    """Build and validate the config of every run of a job, so that mistakes show before anything runs.

    Raises:
        UserError: there is one.
    """
    from promptmix import config

    load_plugins(job.plugins)
    protocol: Protocol = PROTOCOL_REGISTRY.get(job.protocol)
    protocol.check(job)
    seen: set[tuple[Any, ...]] = set()
    for part in parts(job):
        kind = (part.dataset, part.classes, part.domains, part.settings[::2])
        if kind not in seen:  # rounds differ in the path of their notes alone
            config.validate(make_part_config(job, part))
        seen.add(kind)


def done_parts(job: Job) -> Iterator[tuple[Part, CfgNode, RunResult | None, list[RunResult]]]:
    """Yield each part with its config, where it has finished with that config its result, and the results of the wave before.

    A part counts only if it follows from what the wave before has now, so consume this lazily: a part's result is looked up when
    it is asked for.
    """
    from promptmix.runs import results
    from promptmix.runs.run import finished

    protocol: Protocol = PROTOCOL_REGISTRY.get(job.protocol)
    trained: RunResult | None = None
    waves: dict[int, list[RunResult | None]] = {}
    for part in parts(job):
        last = waves.get(part.wave - 1, [])
        before = [result for result in last if result is not None]
        if job.piece in ("", part.name):
            cfg = make_part_config(job, part, _groups(trained, part, job))
            result = finished(cfg)
            if result is not None and not (len(before) == len(last) and protocol.counts(job, part, result, before)):
                result = None
            yield part, cfg, result, before
        path = Path(job.folder, part.name, results.FILE_NAME)
        now = results.load(path) if path.is_file() else None
        waves.setdefault(part.wave, []).append(now)
        trained = trained or now


def is_done(job: Job) -> bool:
    """Tell whether every part has finished."""
    return all(result is not None for _, _, result, _ in done_parts(job))


def pieces(job: Job) -> list[Job]:
    """Return what of a job can run now, side by side: itself, or the missing parts of its first unfinished wave; [] = done."""
    missing: list[Part] = []
    for part, _, result, _ in done_parts(job):
        if missing and part.wave > missing[0].wave:
            break
        missing += [part] if result is None else []
    if not missing or not PROTOCOL_REGISTRY.get(job.protocol).parallel:
        return [job] if missing else []
    return [replace(job, piece=part.name) for part in missing]


def _groups(trained: RunResult | None, part: Part, job: Job) -> list[Any]:
    """Return the override that lets experts keep the template groups they were trained with on another data set."""
    if trained is None or not trained.learned_parameters or part.dataset == job.dataset:
        return []
    groups = trained.vocabulary.get("template_groups") or []
    return ["DATASET.TEMPLATE_GROUPS", tuple(groups)] if groups else []


@dataclass
class Watcher:
    """What is told about a job while it runs; every method may be left as it is."""

    def begin(self, job: Job, part: Part) -> None:
        """A part begins."""

    def epoch(self, trainer: Any) -> None:  # a trainer with Dassl's interface
        """An epoch of the training is over."""

    def end(self, result: RunResult, skipped: bool) -> None:
        """A part has its result, now or from before."""


def folder_of(output: str, protocol: str, dataset: str, trainer: str, variant: str, shots: int | None, seed: int) -> str:
    """Return where a job's runs go in the results tree."""
    method = f"{trainer}-{variant}" if variant else trainer
    levels = [output, protocol, title(dataset), method, "" if shots is None else f"shots{shots}", f"seed{seed}"]
    return str(Path(*filter(None, levels)))


def default_config(trainer: str, dataset: str) -> str:
    """Return the config that a method runs with on the embedded pictures when none is given.

    Raises:
        ConfigError: the data set is not an embedded one, so the method's config must be named.
    """
    if not registry_name(dataset).startswith("Emoji"):
        raise ConfigError(
            f"--datasets {dataset}: give --config-file, such as configs/trainers/CoOp/vit_b16_ep50_ctxv1.yaml "
            "({trainer} and {dataset} in it are filled in); only the embedded pictures have a default"
        )
    tiny = f"configs/trainers/{trainer}/tiny.yaml"
    try:
        resolve_config(tiny)
    except ConfigError:
        return "configs/quickstart.yaml"  # a plugin's method
    return tiny


@hookimpl
def register_protocols(registry: Registry) -> None:
    """Add the field's protocols."""
    for name, protocol in PROTOCOLS.items():
        registry.register(protocol, name=name)
