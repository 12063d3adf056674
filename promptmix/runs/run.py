"""One run from a merged config to ``results.json``: shared by ``promptmix train``, the quick start and sweeps."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from yacs.config import CfgNode as CN

from promptmix import config
from promptmix.config.yamlfile import read_yaml
from promptmix.cost import memory
from promptmix.cost.estimate import step_gflops
from promptmix.engine import SimpleTrainer, build_trainer, collect_env_info, set_random_seed
from promptmix.engine.league import LABELLED, league_of
from promptmix.engine.log import log_file
from promptmix.engine.run_folder import RunFolder
from promptmix.errors import CheckpointError, ConfigError, UserError
from promptmix.hookspecs import hookimpl
from promptmix.parallel import group
from promptmix.plugin_manager import get_plugin_manager
from promptmix.registry import TRAINER_REGISTRY
from promptmix.runs import results, samples
from promptmix.runs.checked import check_fields
from promptmix.runs.from_run import replay_of, take_from_run
from promptmix.runs.hub import place_of
from promptmix.runs.output import Output
from promptmix.runs.results import CONFIG_NAME, FILE_NAME, RunResult, plain
from promptmix.utils import get_logger


def run(cfg: CN, *, eval_only: bool = False, no_train: bool = False, **options: Any) -> RunResult:
    """Build the trainer, train and test it (or only test); ``OUTPUT_DIR`` gets ``log.txt`` and ``results.json``.

    The output folder appears only once the data set, the weights and the checkpoint were found.

    Args:
        cfg: a merged config tree; it is validated and frozen here.
        eval_only: load ``model_dir`` and test, without training.
        no_train: only build, and leave nothing behind.
        options: what else ``running`` takes.

    Returns:
        The result; with ``no_train`` it has no numbers and is written nowhere.

    Raises:
        UserError: anything the user asked for that can't be done; the message says what and how to mend it.
    """
    with running(cfg, eval_only=eval_only, no_train=no_train, **options) as (trainer, result):
        if no_train:
            pass
        elif eval_only:
            trainer.test()
        else:
            train_or_test(trainer)
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
def running(
    cfg: CN,
    *,
    eval_only: bool = False,
    model_dir: str = "",
    load_epoch: int | None = None,
    no_train: bool = False,
    load: bool = True,
    build: Callable[[CN], Any] | None = None,
    arguments: dict[str, Any] | None = None,
    command: list[str] | None = None,
    on_epoch: Callable[[Any], None] | None = None,
    quiet: bool = False,
    prints: bool = False,
    labels: dict[str, str] | None = None,
    new_classes: bool = False,
    plugins: Sequence[str] = (),
) -> Iterator[tuple[Any, RunResult]]:
    """What stands around training and testing: checks, seed, log, building; the body trains, then ``results.json`` is written.

    Args:
        cfg: a merged config tree; it is validated and frozen here.
        eval_only: the body only tests.
        model_dir: output folder of the run whose learned tensors are evaluated.
        load_epoch: epoch of the checkpoint; None = the best one, as in Dassl.
        no_train: only build, and leave nothing behind.
        load: load ``model_dir``, with ``eval_only``; False leaves it to the body.
        build: makes the trainer from the tree; None = `build_trainer`.
        arguments: parsed flags, printed at the top of the log.
        command: command line, kept in ``results.json``.
        on_epoch: called with the trainer after each epoch.
        quiet: write to the log only, nothing to standard output or error.
        prints: the log is whatever is printed, for programs that know no logger; trainers in Dassl's idiom always print.
        labels: ``protocol``, ``title`` and ``trained_on`` of the result, for tables.
        new_classes: what is trained will be evaluated on other classes too.
        plugins: modules or files that were loaded for it.

    Yields:
        The trainer, and the result, whose numbers are there after the body.

    Raises:
        UserError: see ``run``.
    """
    model_dir = str(place_of(model_dir)) if model_dir else ""
    if eval_only:
        take_from_run(cfg, model_dir)
    config.validate(cfg)
    cfg.freeze()
    result = replace(RunResult.from_config(plain(cfg)), **(labels or {}))  # type: ignore[arg-type]
    # A shipped config is called by its name, not by where this machine keeps it.
    shipped = str(files("promptmix.configs"))
    result.config_sources = {key: who.replace(shipped, "configs") for key, who in config.sources(cfg).items()}
    result.command = command or []
    result.versions = results.collect_versions()
    result.commit = results.git_commit()
    result.checkpoint = {"directory": model_dir, "epoch": load_epoch} if eval_only and model_dir else None
    recorder = _Recorder(on_epoch)
    folder, unknown = RunFolder(cfg.OUTPUT_DIR), False
    prints = prints or build is None and not hasattr(TRAINER_REGISTRY.get(cfg.TRAINER.NAME), "roles")
    writes, passes = group.writes(), no_train or not group.writes()
    with contextlib.nullcontext() if passes else folder.alone(), Output(cfg.OUTPUT_DIR, quiet or not writes, prints) as output:
        if not no_train:
            refuse_other_run(result, folder.path, eval_only)
            if cfg.RESUME and not eval_only:
                unknown = refuse_other_run(result, Path(cfg.RESUME), eval_only, "--resume ")
            folder.refuse_links()
            if writes:
                folder.tidy()
        before = None if no_train else _recorded(cfg)  # of this run: another one was refused
        _seed(cfg)
        _print_header(cfg, arguments or {})
        trainer: Any = (build or build_trainer)(cfg)  # any class with Dassl's interface
        if new_classes and not eval_only:
            _refuse_class_specific(trainer)
        _refuse_open_training(cfg, trainer, eval_only)
        result.learned_parameters = _count_learned(trainer)
        result.vocabulary = _vocabulary(trainer)
        result.league = league_of(cfg, getattr(trainer, "league", LABELLED))
        if eval_only:
            _refuse_other_method(result, model_dir, getattr(trainer, "model", None))
            if load:
                trainer.load_model(model_dir, epoch=load_epoch)
        else:
            _refuse_choice_on_test(cfg, trainer)
        if no_train:
            yield trainer, result
            return
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
        result.approximations = list(getattr(trainer, "approximations", ()))
        if cfg.INPUT.PIPELINE == "fast":
            result.approximations.append("INPUT.PIPELINE fast: training pictures are read and augmented with other numbers")
        if unknown:
            result.approximations.append(f"RESUME: goes on from {cfg.RESUME}, whose settings are not known")
        elif getattr(trainer, "start_epoch", 0) and not getattr(trainer, "resumed_exactly", True):
            result.approximations.append(f"resumed at epoch {trainer.start_epoch} without the random states of that moment")
        result.files = samples.keep(trainer, folder.path, cfg.DATASET.ROOT)
        as_one = all(getattr(trainer, name, True) for name in ("resumed_exactly", "resumed_alike"))
        if load and not unknown and as_one:  # not what a program loads by itself
            result.replay = replay_of(cfg, result.checkpoint, plugins)
        get_logger().info("Results: %s", result.save(cfg.OUTPUT_DIR))
        folder.drop_progress()


def finished(cfg: CN) -> RunResult | None:
    """Return the result in ``OUTPUT_DIR`` if a run with exactly this config finished there, else None."""
    result = _recorded(cfg)
    return result if result is not None and result.config == plain(cfg) and result.metrics else None


def _recorded(cfg: CN) -> RunResult | None:
    """Return what stands in ``OUTPUT_DIR``, such as of the same run with another number of workers, if anything does."""
    path = Path(cfg.OUTPUT_DIR) / FILE_NAME
    return results.load(path) if path.is_file() else None


def refuse_other_run(new: RunResult, folder: Path, eval_only: bool, flag: str = "") -> bool:
    """Refuse a folder with another run: training would resume there and report its numbers as this run's.

    Args:
        new: what is asked for.
        folder: with a run, or with nothing.
        eval_only: only what tells runs apart counts, not every setting.
        flag: that names the folder, where it is not the output folder.

    Returns:
        Whether nothing says with which settings the run in ``folder`` was made.
    """
    if (folder / FILE_NAME).is_file():
        old = results.load(folder / FILE_NAME)
    elif (folder / CONFIG_NAME).is_file() and RunFolder(folder).has_trained():  # cut off, with something to resume
        old = _begun(folder / CONFIG_NAME)
    else:
        return True
    if new.checkpoint and old.checkpoint is None and old.learned_parameters and old.metrics:
        raise UserError(f"{folder} has the record of a training, which an evaluation would replace; choose another --output-dir")
    if not old.config:
        if flag:
            return True
        raise UserError(f"{folder} holds a run whose settings are not known; choose another --output-dir, or remove that folder")
    pairs = [(name, value, new.identity()[name]) for name, value in old.identity().items()]
    if not eval_only:
        # MAX_EPOCH too: schedules and averages follow from it, so that neither fewer nor more epochs are a part of the same run.
        ours = new.settings()
        pairs += [(k, v, ours[k]) for k, v in old.settings().items() if k in ours]
    for name, theirs, mine in pairs:
        if theirs != mine:
            remedy = "resume with the same settings" if flag else "choose another --output-dir, or remove that folder"
            raise UserError(f"{flag}{folder} holds another run ({name} is {theirs} there, {mine} here); {remedy}")
    return False


def _begun(path: Path) -> RunResult:
    """Read what a run that was cut off had been asked to do.

    Raises:
        UserError: the file is damaged.
    """
    try:
        result = RunResult.from_config(plain(read_yaml(path)))
        check_fields(result)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not the config of a run ({type(error).__name__}: {error}); choose another --output-dir, or remove it"
        ) from error
    return result


def _refuse_other_method(new: RunResult, model_dir: str, learner: Any) -> None:  # a Dassl trainer's model
    """Name the trainer in ``model_dir`` where it is another: its tensors would only fit by accident."""
    path = Path(model_dir) / FILE_NAME
    if not model_dir or not path.is_file():
        return
    old = results.load(path)
    for what, theirs, ours in (("trainer", old.trainer, new.trainer), ("backbone", old.backbone, new.backbone)):
        if theirs != ours:
            raise CheckpointError(
                f"--model-dir {model_dir} holds a checkpoint of {what} {theirs}, not {ours}; "
                f"name a folder where {ours} was trained, or evaluate with {theirs}"
            )
    names = old.vocabulary.get("classnames")
    if getattr(learner, "class_specific", False) and names and names != new.vocabulary.get("classnames"):
        raise CheckpointError(
            f"--model-dir {model_dir} learned {learner.per_class} for each of its own {len(names)} classes, which can't serve "
            "other names; evaluate it on those classes, or train a method that learns nothing for each class"
        )


def _refuse_class_specific(trainer: Any) -> None:  # a trainer with Dassl's interface
    """Refuse to train what can't serve the classes that it is to be evaluated on afterwards."""
    learner: Any = getattr(trainer, "model", None)
    if getattr(learner, "class_specific", False):
        name = trainer.cfg.TRAINER.NAME
        raise ConfigError(
            f"TRAINER.NAME is {name}, which learns {learner.per_class} for each class that it trains on, so it has nothing for "
            "new classes; run the protocol few-shot, or choose a method or setting that learns nothing for each class"
        )


def _refuse_open_training(cfg: CN, trainer: Any, eval_only: bool) -> None:  # a trainer with Dassl's interface
    """Refuse to train on the new classes that the trained model is to be told apart from."""
    if cfg.DATASET.SUBSAMPLE_CLASSES == "open" and not eval_only and _count_learned(trainer):
        raise ConfigError(
            "DATASET.SUBSAMPLE_CLASSES is 'open', which tests what was trained on the base classes; train with base, then "
            "evaluate with --eval-only --model-dir, or use `promptmix run open-world`"
        )


def _refuse_choice_on_test(cfg: CN, trainer: Any) -> None:  # a trainer with Dassl's interface
    """Refuse to choose the best epoch on test pictures; where a benchmark's val part is its test part (ImageNet), say so.

    Own pictures of which all are tested can't be trained on either.
    """
    own = getattr(getattr(trainer, "dm", None), "dataset", None)
    if _count_learned(trainer) and getattr(own, "all_tested", False):
        raise ConfigError(
            f"DATASET.{cfg.DATASET.NAME.upper()}.SPLIT_RATIO is (0, 0, 1): all pictures are tested, so none are there to learn "
            "from; give the shares of train, val and test, such as (0.5, 0.2, 0.3)"
        )
    if cfg.TEST.FINAL_MODEL != "best_val" or cfg.TEST.NO_TEST or not _count_learned(trainer):
        return
    dataset = getattr(getattr(trainer, "dm", None), "dataset", None)
    if getattr(trainer, "val_loader", None) is None:
        raise ConfigError(
            f"TEST.FINAL_MODEL is 'best_val', but {cfg.DATASET.NAME} has no val part here, so the best epoch would be chosen on "
            "the test pictures; add val pictures, or leave it at 'last_step'"
        )
    tested = {item.impath for item in getattr(dataset, "test", None) or ()}
    both = sum(item.impath in tested for item in getattr(dataset, "val", None) or ())
    if both:
        get_logger().warning(
            "TEST.FINAL_MODEL is 'best_val', and %d val pictures of %s are test pictures: the epoch is chosen on what is tested",
            both,
            cfg.DATASET.NAME,
        )


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


def _print_header(cfg: CN, arguments: dict[str, Any]) -> None:
    """Say what runs; the log also gets all that Dassl's begins with."""
    get_logger().info(
        "%s on %s, %s, %s, seed %s; all settings: %s",
        cfg.TRAINER.NAME,
        cfg.MODEL.BACKBONE.NAME,
        cfg.DATASET.NAME,
        f"{cfg.DATASET.NUM_SHOTS}-shot" if cfg.DATASET.NUM_SHOTS > 0 else "all pictures",
        cfg.SEED,
        log_file(cfg.OUTPUT_DIR),
    )
    line = get_logger().debug
    line("***************\n** Arguments **\n***************")
    for key in sorted(arguments):
        line("%s: %s", key, arguments[key])
    line("************\n** Config **\n************\n%s", cfg)
    line("Collecting env info ...\n** System info **\n%s\n", collect_env_info())


def _count_learned(trainer: Any) -> int:  # a trainer with Dassl's interface
    """Count the scalars that the optimizers may change, or else those taken from the pictures; 0 = there is nothing to train."""
    models = (trainer._models[name] for name in trainer.get_model_names())
    found = [model for model in models if model is not None]
    learned = sum(p.numel() for model in found for p in model.parameters() if p.requires_grad)
    return learned or sum(getattr(model, "taken", 0) for model in found)


def _vocabulary(trainer: Any) -> dict[str, Any]:
    """Return the words of the trainer's data set, with which its prompts can be used without the data set."""
    dataset = getattr(getattr(trainer, "dm", None), "dataset", None)
    names = ("classnames", "all_classnames", "templates", "template_groups")
    words = {name: plain(getattr(dataset, name)) for name in names if hasattr(dataset, name)}
    task: Any = getattr(getattr(trainer, "model", None), "task", None)
    if task is not None and task.descriptions.were_read and not trainer.cfg.DATASET.DESCRIPTIONS:
        words["descriptions"] = task.descriptions.plain(task.all_classnames)  # a file may be large, and is named again
    return words


def has_nothing_to_train(trainer: Any) -> bool:
    """Tell whether the epoch loop would have no parameter to move (CoOp's ZeroshotCLIP); a loop of its own is trusted."""
    return not _count_learned(trainer) and type(trainer).train is SimpleTrainer.train


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
        result.peak_memory_mb = memory.peak_mb()


@contextlib.contextmanager
def _plugged(plugin: object) -> Iterator[None]:
    manager = get_plugin_manager()
    manager.register(plugin)
    try:
        yield
    finally:
        manager.unregister(plugin)
