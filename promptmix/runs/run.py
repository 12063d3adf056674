"""One run from a merged config to ``results.json``: shared by ``promptmix train``, the quick start and sweeps."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from yacs.config import CfgNode as CN

from promptmix import config
from promptmix.cost import memory
from promptmix.cost.estimate import step_gflops
from promptmix.engine import SimpleTrainer, build_trainer, collect_env_info, set_random_seed
from promptmix.engine.league import LABELLED, league_of
from promptmix.engine.log import log_file
from promptmix.engine.precision import use_repeatable_kernels
from promptmix.engine.run_folder import RunFolder
from promptmix.hookspecs import hookimpl
from promptmix.parallel import group
from promptmix.plugin_manager import get_plugin_manager
from promptmix.registry import is_prompt_trainer
from promptmix.runs import refusals, results, samples
from promptmix.runs.from_run import replay_of, take_from_run
from promptmix.runs.hub import place_of
from promptmix.runs.output import Output
from promptmix.runs.results import FILE_NAME, RunResult, plain
from promptmix.utils import get_logger


@dataclass(frozen=True)
class Asked:
    """How a run is asked for, beside its config."""

    eval_only: bool = False
    """The body only tests."""
    model_dir: str = ""
    """Output folder of the run whose learned tensors are evaluated."""
    load_epoch: int | None = None
    """Epoch of the checkpoint; None = the best one, as in Dassl."""
    no_train: bool = False
    """Only build, and leave nothing behind."""
    load: bool = True
    """Load ``model_dir``, with ``eval_only``; False leaves it to the body."""
    build: Callable[[CN], Any] | None = None
    """Makes the trainer from the tree; None = `build_trainer`."""
    declared: bool = True
    """The values are held to what their keys are declared to take; not so those of a program of others."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Parsed flags, printed at the top of the log."""
    command: Sequence[str] = ()
    """Command line, kept in ``results.json``."""
    on_epoch: Callable[[Any], None] | None = None
    """Called with the trainer after each epoch."""
    quiet: bool = False
    """Write to the log only, nothing to standard output or error."""
    prints: bool = False
    """The log is whatever is printed, for programs that know no logger; trainers in Dassl's idiom always print."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """``protocol``, ``title`` and ``trained_on`` of the result, for tables."""
    new_classes: bool = False
    """What is trained will be evaluated on other classes too."""
    plugins: Sequence[str] = ()
    """Modules or files that were loaded for it."""


def run(cfg: CN, **options: Any) -> RunResult:
    """Build the trainer, train and test it (or only test); ``OUTPUT_DIR`` gets ``log.txt`` and ``results.json``.

    The output folder appears only once the data set, the weights and the checkpoint were found.

    Args:
        cfg: a merged config tree; it is validated and frozen here.
        options: fields of `Asked`.

    Returns:
        The result; with ``no_train`` it has no numbers and is written nowhere.

    Raises:
        UserError: anything the user asked for that can't be done; the message says what and how to fix it.
    """
    asked = Asked(**options)
    with running(cfg, **options) as (trainer, result):
        if asked.no_train:
            pass
        elif asked.eval_only:
            trainer.test()
        else:
            train_or_test(trainer)
            result.peak_memory_mb = memory.peak_mb()  # counting is no part of the run
            with group.paused():
                result.step_gflops = step_gflops(trainer) if group.writes() else None
    return result


def train_or_test(trainer: Any) -> None:  # a trainer with Dassl's interface
    """Train and test, or only test where there is nothing to train."""
    if has_nothing_to_train(trainer):
        trainer.test()
    else:
        trainer.train()


@contextlib.contextmanager
def running(cfg: CN, **options: Any) -> Iterator[tuple[Any, RunResult]]:
    """What stands around training and testing: checks, seed, log, building; the body trains, then ``results.json`` is written.

    Args:
        cfg: a merged config tree; it is validated and frozen here.
        options: fields of `Asked`.

    Yields:
        The trainer, and the result, whose numbers are there after the body.

    Raises:
        UserError: see ``run``.
    """
    asked = Asked(**options)
    if asked.model_dir:
        asked = replace(asked, model_dir=str(place_of(asked.model_dir)))
    if asked.eval_only:
        take_from_run(cfg, asked.model_dir)
    config.validate(cfg, values=asked.declared)
    cfg.freeze()
    result, recorder, folder = _new_result(cfg, asked), _Recorder(asked.on_epoch), RunFolder(cfg.OUTPUT_DIR)
    prints = asked.prints or asked.build is None and not is_prompt_trainer(cfg.TRAINER.NAME)
    output = Output(cfg.OUTPUT_DIR, asked.quiet or not group.writes(), prints)
    if asked.no_train:
        with output:
            yield _built(cfg, asked, result), result
        return
    writes = group.writes()
    with folder.alone() if writes else contextlib.nullcontext(), output:
        unknown = _refuse_other_runs(cfg, asked, result)
        folder.refuse_links()
        if writes:
            folder.tidy()
        before = _recorded(cfg)  # of this run: another one was refused
        trainer = _built(cfg, asked, result)
        if before is not None:
            refusals.refuse_other_classes(before, result, folder.path)
        if writes:
            output.open(cfg)
        recorder.ready()
        with _plugged(recorder):
            yield trainer, result
        if not writes:
            return
        recorder.fill(result)
        if before is not None and getattr(trainer, "start_epoch", 0) >= getattr(trainer, "max_epoch", 1) > 0:
            result.metrics = before.metrics | result.metrics  # it had ended, and was only tested again
        result.approximations = _approximations(cfg, trainer, unknown)
        result.files = samples.keep(trainer, folder.path, cfg.DATASET.ROOT)
        as_one = all(getattr(trainer, name, True) for name in ("resumed_exactly", "resumed_alike"))
        if asked.load and not unknown and as_one:  # not what a program loads by itself
            result.replay = replay_of(cfg, result.checkpoint, asked.plugins)
        get_logger().info("Results: %s", result.save(cfg.OUTPUT_DIR))
        folder.drop_progress()


def _new_result(cfg: CN, asked: Asked) -> RunResult:
    """Return the record of a run that begins: what is asked for, and with what it is made."""
    result = replace(RunResult.from_config(plain(cfg)), **asked.labels)  # type: ignore[arg-type]
    # A shipped config is called by its name, not by where this machine keeps it.
    shipped = str(files("promptmix.configs"))
    result.config_sources = {key: who.replace(shipped, "configs") for key, who in config.sources(cfg).items()}
    result.command = list(asked.command)
    result.versions = results.collect_versions()
    result.commit = results.git_commit()
    if asked.eval_only and asked.model_dir:
        result.checkpoint = {"directory": asked.model_dir, "epoch": asked.load_epoch}
    return result


def _refuse_other_runs(cfg: CN, asked: Asked, result: RunResult) -> bool:
    """Refuse another run in the output folder or in the one to resume; return whether the latter's settings are unknown."""
    refusals.refuse_other_run(result, Path(cfg.OUTPUT_DIR), asked.eval_only)
    if not cfg.RESUME or asked.eval_only:
        return False
    return refusals.refuse_other_run(result, Path(cfg.RESUME), asked.eval_only, "--resume ")


def _built(cfg: CN, asked: Asked, result: RunResult) -> Any:
    """Return the trainer, seeded, checked and loaded; ``result`` gets what only a built one knows."""
    _seed(cfg)
    _print_header(cfg, asked.arguments)
    trainer: Any = (asked.build or build_trainer)(cfg)  # any class with Dassl's interface
    if asked.new_classes and not asked.eval_only:
        refusals.refuse_class_specific(trainer)
    refusals.refuse_open_training(cfg, trainer, asked.eval_only)
    refusals.refuse_absent_val(cfg, trainer)
    result.learned_parameters = refusals.count_learned(trainer)
    result.vocabulary = _vocabulary(trainer)
    result.league = league_of(cfg, getattr(trainer, "league", LABELLED))
    if not asked.eval_only:
        refusals.refuse_choice_on_test(cfg, trainer)
        return trainer
    refusals.refuse_other_method(result, asked.model_dir, getattr(trainer, "model", None))
    if asked.load:
        refusals.refuse_untrained(cfg, trainer, asked.model_dir)
        trainer.load_model(asked.model_dir, epoch=asked.load_epoch)
    return trainer


def _approximations(cfg: CN, trainer: Any, unknown: bool) -> list[str]:
    """Say in what the run is not the one that its settings describe.

    Args:
        cfg: the run's tree.
        trainer: that ended.
        unknown: nothing says with which settings the run that it resumed was made.
    """
    found = list(getattr(trainer, "approximations", ()))
    if cfg.INPUT.PIPELINE == "fast":
        found.append("INPUT.PIPELINE fast: training pictures are read and augmented with other numbers")
    if unknown:
        found.append(f"RESUME: goes on from {cfg.RESUME}, whose settings are not known")
    elif getattr(trainer, "start_epoch", 0) and not getattr(trainer, "resumed_exactly", True):
        found.append(f"resumed at epoch {trainer.start_epoch} without the random states of that moment")
    return found


def finished(cfg: CN) -> RunResult | None:
    """Return the result in ``OUTPUT_DIR`` if a run with exactly this config finished there, else None."""
    result = _recorded(cfg)
    return result if result is not None and result.config == plain(cfg) and result.metrics else None


def written(cfg: CN, result: RunResult) -> RunResult:
    """Return the result of a run that has just ended as the process that writes has it; the others wait for it and read it."""
    group.wait()
    return result if group.writes() else finished(cfg) or result


def _recorded(cfg: CN) -> RunResult | None:
    """Return what stands in ``OUTPUT_DIR``, such as of the same run with another number of workers, if anything does."""
    path = Path(cfg.OUTPUT_DIR) / FILE_NAME
    return results.load(path) if path.is_file() else None


def _seed(cfg: CN) -> None:
    deterministic = cfg.SEED >= 0
    if not deterministic and group.size() > 1:
        set_random_seed(group.same_seed())
    if deterministic:
        get_logger().info("Setting fixed seed: %d", cfg.SEED)
        set_random_seed(cfg.SEED)
    torch.backends.cudnn.deterministic = deterministic
    # Benchmarking picks the fastest kernel by timing it, so two seeded runs could use different ones.
    torch.backends.cudnn.benchmark = not deterministic
    use_repeatable_kernels(cfg.TRAIN.DETERMINISTIC)


def _print_header(cfg: CN, arguments: Mapping[str, Any]) -> None:
    """Say what runs; the log also gets all that Dassl's begins with."""
    get_logger().info(
        "%s on %s, %s, %s, seed %s; all settings: %s",
        cfg.TRAINER.NAME,
        cfg.MODEL.BACKBONE.NAME,
        cfg.DATASET.NAME,
        f"{cfg.DATASET.NUM_SHOTS}-shot" if cfg.DATASET.NUM_SHOTS > 0 else "all pictures",
        cfg.SEED,
        log_file(Path(cfg.OUTPUT_DIR) / "log.txt"),
    )
    line = get_logger().debug
    line("***************\n** Arguments **\n***************")
    for key in sorted(arguments):
        line("%s: %s", key, arguments[key])
    line("************\n** Config **\n************\n%s", cfg)
    line("Collecting env info ...\n** System info **\n%s\n", collect_env_info())


def _vocabulary(trainer: Any) -> dict[str, Any]:
    """Return the words of the trainer's data set, with which its prompts can be used without the data set."""
    dataset = getattr(getattr(trainer, "dm", None), "dataset", None)
    names = ("classnames", "all_classnames", "templates", "template_groups")
    words = {name: plain(getattr(dataset, name)) for name in names if hasattr(dataset, name)}
    task: Any = getattr(getattr(trainer, "model", None), "task", None)
    if task is not None and task.descriptions.were_read and not trainer.cfg.DATASET.DESCRIPTIONS:
        words["descriptions"] = task.descriptions.as_lists(task.all_classnames)  # a file may be large, and is named again
    return words


def has_nothing_to_train(trainer: Any) -> bool:
    """Tell whether the epoch loop would have no parameter to move (CoOp's ZeroshotCLIP); a loop of its own is trusted."""
    return not refusals.count_learned(trainer) and type(trainer).train is SimpleTrainer.train


class _Recorder:
    """Listens to the trainer's events: numbers of each evaluation, and how long training and the last test took."""

    def __init__(self, on_epoch: Callable[[Any], None] | None) -> None:
        self._on_epoch = on_epoch
        self._metrics: dict[str, dict[str, float]] = {}
        self._began = datetime.now(timezone.utc)
        self._start = self._trained = self._tested = time.monotonic()
        self._train_seconds = 0.0
        memory.reset_peak()  # so that a run in a longer process, as in the quick start, reports its own

    @hookimpl
    def before_train(self, trainer: Any) -> None:
        """The first epoch begins: what came before was building, or another process."""
        for split, numbers in getattr(trainer, "last_results", {}).items():
            self._metrics[split] = {name: float(value) for name, value in numbers.items()}
        self._trained = time.monotonic()

    @hookimpl
    def after_epoch(self, trainer: Any) -> None:
        """An epoch, with its validation, is over."""
        self._train_seconds += time.monotonic() - self._trained
        self._trained = time.monotonic()
        if self._on_epoch is not None:
            self._on_epoch(trainer)

    @hookimpl(trylast=True)  # after plugins that add numbers of their own
    def after_test(self, split: str, results: dict[str, float]) -> None:
        """An evaluation is over; the last one of a split counts."""
        self._metrics[split] = {name: float(value) for name, value in results.items()}
        self._tested = time.monotonic()

    def ready(self) -> None:
        """The trainer is built and loaded: a test without training begins here."""
        self._trained = time.monotonic()

    def fill(self, result: RunResult) -> None:
        """Write what was heard into ``result``."""
        result.metrics = self._metrics
        result.started = self._began.isoformat(timespec="milliseconds")
        result.finished = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        seconds = {
            "total": time.monotonic() - self._start,
            "train": self._train_seconds,
            "test": max(0.0, self._tested - self._trained),
        }
        result.seconds = {name: round(value, 3) for name, value in seconds.items()}
        result.peak_memory_mb = result.peak_memory_mb or memory.peak_mb()


@contextlib.contextmanager
def _plugged(plugin: object) -> Iterator[None]:
    manager = get_plugin_manager()
    manager.register(plugin)
    try:
        yield
    finally:
        manager.unregister(plugin)
