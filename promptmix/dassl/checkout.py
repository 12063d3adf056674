"""``promptmix train --coop-repo PATH``: a checkout of the CoOp family, run as it is.

Its ``train.py`` runs as the program that it is, with its own flags, config and ``main``, on promptmix's engine or on the Dassl
that it brings. Its folder, modules and registrations are there for the run only.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

import promptmix.dassl.engine
import promptmix.dassl.utils
from promptmix.dassl import program, vendored
from promptmix.dassl.absent import standing_in
from promptmix.dassl.bridge import fill
from promptmix.dassl.config import get_cfg_default
from promptmix.dassl.data.sets import SETS
from promptmix.dassl.foreign import found_here
from promptmix.dassl.importing import installed
from promptmix.dassl.nogpu import to_fp32, without_cuda
from promptmix.dassl.patches import patched_torch
from promptmix.dassl.reasons import explained
from promptmix.dassl.weights import LocalWeights
from promptmix.engine import SimpleTrainer, build_trainer, choose_device
from promptmix.errors import ConfigError
from promptmix.plugin_manager import get_plugin_manager
from promptmix.registry import DATASET_REGISTRY, EVALUATOR_REGISTRY, TRAINER_REGISTRY
from promptmix.runs import results
from promptmix.runs.results import RunResult
from promptmix.utils import get_logger

__all__ = ["run_checkout"]

_WEIGHTS = "MODEL.BACKBONE.WEIGHTS"


def run_checkout(path: str, args: argparse.Namespace, **options: Any) -> RunResult | None:
    """Run a trainer of the checkout at ``path``.

    Args:
        path: folder of the checkout, with a ``train.py``, or another program in it.
        args: flags of ``promptmix train``, with ``argv`` (the command line), ``opts``, ``device`` and ``dassl`` (may be None).
        options: passed to ``promptmix.runs.run.running``.

    Returns:
        The result, or None where ``train.py`` built no trainer.

    Raises:
        UserError: the folder is no such checkout, or whatever stops its program, with the line of the checkout.
    """
    root, file = _program(path)
    get_plugin_manager()  # before the layers, so that what promptmix brings lies below them
    pairs = dict(zip(args.opts[::2], args.opts[1::2], strict=False))
    weights = LocalWeights(str(Path(pairs[_WEIGHTS]).absolute()), root) if pairs.get(_WEIGHTS) else None
    engine = vendored.choose(root, file, args.dassl or "")
    # The key is promptmix's: a checkout's own tree may lack it.
    places = [at for at in range(0, len(args.opts), 2) if args.opts[at] != _WEIGHTS]
    opts = [word for at in places for word in args.opts[at : at + 2]]
    taken = program.flags_of(file)
    words = program.command_line(args.argv[1 : len(args.argv) - len(args.opts)], opts, root, taken)
    on_cpu = choose_device(args.device or "auto", pairs.get("USE_CUDA", "True") != "False").type == "cpu"
    kind = _Ours if engine.folder is None else _Theirs
    session: _Ours | _Theirs = kind(root, file, engine, args, options, weights, on_cpu, taken)
    with ExitStack() as stack:
        stack.enter_context(explained(root, os.path.expanduser(args.root)))
        stack.enter_context(patched_torch())
        early = stack.enter_context(program.surroundings(root, file, words))
        stack.enter_context(standing_in(root, engine.folder))
        stack.enter_context(found_here(root, os.path.expanduser(args.root)))
        if weights is not None:
            stack.enter_context(weights.opened())
        if on_cpu:
            stack.enter_context(without_cuda(root))
        with session.running(early) as build:
            try:
                if program.has_main_block(file):
                    program.load(file, "__main__")
                else:
                    session.drive(build(_configure(file, args, words, opts, taken)))
            except _DoneError:
                pass
            except SystemExit as error:
                if error.code not in (None, 0):
                    raise
            if weights is not None and session.result is not None:
                weights.check_used()
    if session.result is None and not args.no_train:
        get_logger().warning(
            "%s ended without building a trainer through Dassl's build_trainer: there is no results.json", file.name
        )
    elif session.result is not None and not session.result.metrics and not args.no_train:
        get_logger().warning("No evaluation was reported through Dassl's evaluator: results.json has no numbers, the log may")
    return session.result


def _program(path: str) -> tuple[Path, Path]:
    """Return the folder of a checkout and the program that is run."""
    given = Path(os.path.expanduser(path)).resolve()
    if given.is_file() and given.suffix == ".py":
        # python tools/train.py is called in the folder that has the trainers.
        homes = (folder for folder in given.parents[:2] if any((folder / name).is_dir() for name in ("trainers", "datasets")))
        return next(homes, given.parent), given
    if (given / "train.py").is_file():
        return given, given / "train.py"
    places = [*given.glob("*.py"), *given.glob("*/train.py")] if given.is_dir() else []
    below = sorted(str(file.parent if file.name == "train.py" else file) for file in places if _builds_trainers(file))
    hint = f"; did you mean {below[0]}?" if below else "; name the folder of a checkout of CoOp or one of its forks"
    raise ConfigError(f"--coop-repo {path}: no train.py there{hint}")


def _builds_trainers(file: Path) -> bool:
    return "build_trainer" in file.read_text(encoding="utf-8", errors="replace")


def _configure(file: Path, args: argparse.Namespace, words: list[str], opts: list[str], taken: dict[str, Any]) -> CfgNode:
    """Return the merged tree of a ``train.py`` that only defines ``setup_cfg``."""
    given = {flag[2:].replace("-", "_"): values[0] if values else True for flag, values in program.groups(words)}
    known = {key: value for key, value in vars(args).items() if value is not None}
    defaults = {flag.lstrip("-").replace("-", "_"): default for flag, default in taken.items()}
    flags = argparse.Namespace(**{**defaults, **known, **given, "seed": known.get("seed", -1), "opts": opts})
    module = program.load(file, "train")
    if not hasattr(module, "setup_cfg"):
        raise ConfigError(f"{file} neither runs as a program nor defines setup_cfg; name another folder")
    return module.setup_cfg(flags)


class _DoneError(BaseException):
    """Leaves the checkout's ``main``, where promptmix has done what a flag asks for that its ``train.py`` doesn't know."""


class _Session:
    """What promptmix does around a checkout's program.

    Args:
        root: folder of the checkout.
        file: its program.
        engine: the Dassl that it runs on.
        args: flags of ``promptmix train``.
        options: of ``promptmix.runs.run.running``.
        weights: of the backbone, where given.
        on_cpu: there is no GPU, or it is not wanted.
        taken: flags that it declares.
    """

    def __init__(
        self,
        root: Path,
        file: Path,
        engine: vendored.Engine,
        args: argparse.Namespace,
        options: dict[str, Any],
        weights: LocalWeights | None,
        on_cpu: bool,
        taken: dict[str, Any],
    ) -> None:
        self.root, self.file, self.engine, self.args, self.options = root, file, engine, args, options
        self.weights, self.on_cpu, self.taken = weights, on_cpu, taken
        self.result: RunResult | None = None
        self.frozen = True

    def drive(self, trainer: Any) -> None:  # a trainer with Dassl's interface
        """Do what CoOp's ``main`` does with a trainer."""
        if self.args.eval_only:
            trainer.load_model(self.args.model_dir, epoch=self.args.load_epoch)
            trainer.test()
        elif not self.args.no_train:
            trainer.train()

    def _do_what_main_cannot(self, trainer: Any) -> None:
        """Take over where a flag asks for what the checkout's ``main`` doesn't know."""
        asked = [flag for flag, given in (("--eval-only", self.args.eval_only), ("--no-train", self.args.no_train)) if given]
        if any(flag not in self.taken for flag in asked) and program.has_main_block(self.file):
            self.drive(trainer)
            raise _DoneError

    def _prepare(self, cfg: CfgNode) -> str:
        """Fit the tree to this machine; return what changed, in words."""
        self.frozen = cfg.is_frozen()
        cfg.defrost()
        return to_fp32(cfg) if self.on_cpu else ""

    def _built(self, cfg: CfgNode, build: Callable[[CfgNode], Any] = build_trainer) -> Any:
        """Return the trainer of ``cfg``, with the local weights."""
        if self.weights is not None:
            self.weights.reach(cfg.MODEL.BACKBONE.NAME)
        if not self.frozen:  # some leave that out, and change it in their trainers
            cfg.defrost()
        trainer = build(cfg)
        # A trainer of rounds (active learning) builds its models later.
        if self.weights is not None and getattr(trainer, "get_model_names", list)():
            self.weights.check_used()
        return trainer


class _Ours(_Session):
    """A program on promptmix's engine."""

    @contextmanager
    def running(self, early: program.Early) -> Iterator[Callable[[CfgNode], Any]]:
        """Stand in for ``build_trainer`` and ``setup_logger`` inside the context; ``results.json`` is written at its end."""
        from promptmix.runs.run import has_nothing_to_train, running

        with ExitStack() as stack:
            stack.enter_context(installed())
            trainers = stack.enter_context(TRAINER_REGISTRY.layer())
            # Below the checkout's own, which may have the same names.
            stack.enter_context(DATASET_REGISTRY.layer()).update(SETS)
            stack.enter_context(DATASET_REGISTRY.layer())
            stack.enter_context(EVALUATOR_REGISTRY.layer())

            def build(cfg: CfgNode) -> Any:
                if self.result is not None:  # a program that tests in a second one
                    self._prepare(cfg)
                    cfg.freeze()
                    return self._built(cfg)
                if cfg.TRAINER.NAME not in trainers:
                    there = ", ".join(sorted(trainers)) or "none"
                    raise ConfigError(
                        f"--trainer {cfg.TRAINER.NAME or '(not given)'}: {self.root} has no such trainer (it has: {there})"
                    )
                changed = self._prepare(cfg)
                fill(cfg, get_cfg_default())  # some make a tree of their own
                cfg.MODEL.BACKBONE.WEIGHTS = str(self.weights.path) if self.weights is not None else ""
                cfg.DEVICE = "cpu" if self.on_cpu else "cuda"
                options = dict(self.options)
                if changed:  # among the arguments, which the log begins with
                    options["arguments"] = {**options.get("arguments", {}), "no_gpu": changed}
                stack.enter_context(_own_tests_reported(cfg))
                before_the_log = early.take()
                options |= {"load": False, "build": self._built, "declared": False, "prints": True}
                trainer, self.result = stack.enter_context(running(cfg, **options))
                log = getattr(sys.stdout, "file", None)
                if log is not None:
                    log.write(before_the_log)
                if has_nothing_to_train(trainer):
                    trainer.train = trainer.test
                self._do_what_main_cannot(trainer)
                return trainer

            stack.enter_context(_replaced(promptmix.dassl.engine, "build_trainer", build))
            with _making_folder() as make_folder, _replaced(promptmix.dassl.utils, "setup_logger", make_folder):
                yield build


class _Theirs(_Session):
    """A program on the Dassl that it brings: nothing of ours runs, and the result is read from its log."""

    @contextmanager
    def running(self, early: program.Early) -> Iterator[Callable[[CfgNode], Any]]:
        """Wrap that Dassl's ``build_trainer`` inside the context; ``results.json`` is written at its end."""
        from promptmix.runs.refusals import refuse_other_run

        began, start = datetime.now(timezone.utc), time.monotonic()
        # What it lacks and we lend takes the checkout's registrations.
        with DATASET_REGISTRY.layer(), EVALUATOR_REGISTRY.layer(), vendored.theirs(self.engine) as module:
            original = module.build_trainer

            def build(cfg: CfgNode) -> Any:
                changed = self._prepare(cfg)
                if self.engine.borrowed:
                    fill(cfg, get_cfg_default())
                cfg.freeze()
                if self.result is None:
                    self.result = RunResult.from_config(results.plain(cfg))
                    refuse_other_run(self.result, Path(cfg.OUTPUT_DIR), self.args.eval_only)
                    if changed:
                        get_logger().warning("No GPU: %s", changed)
                trainer = self._built(cfg, original)
                self._do_what_main_cannot(trainer)
                return trainer

            stack = [_replaced(owner, "build_trainer", build) for owner in (module, getattr(module, "build", module))]
            with stack[0], stack[1]:
                yield build
        with suppress(ValueError):
            sys.stdout.flush()
        sys.stdout = early  # that Dassl's log may be closed by now
        if self.result is not None and not self.args.no_train:
            self._record(self.result, began, time.monotonic() - start)

    def _record(self, result: RunResult, began: datetime, seconds: float) -> None:
        """Write ``results.json`` beside the log."""
        folder = Path(result.config["OUTPUT_DIR"])
        log = results.newest_log(folder)
        result.metrics = results.metrics_of_log(log.read_text(encoding="utf-8", errors="replace")) if log is not None else {}
        if self.args.eval_only and self.args.model_dir:
            result.checkpoint = {"directory": self.args.model_dir, "epoch": self.args.load_epoch}
        result.command = self.options.get("command") or []
        result.versions = {
            **results.collect_versions(),
            "dassl": f"{self.engine.folder} ({len(self.engine.changed)} files changed)",
        }
        result.commit = results.git_commit()
        result.started = began.isoformat(timespec="milliseconds")
        result.finished = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        result.seconds = {"total": round(seconds, 3)}
        get_logger().info("Results: %s", result.save(folder))


@contextmanager
def _making_folder() -> Iterator[Callable[..., None]]:
    """Yield a stand-in for ``setup_logger`` that makes its folder and no log, since trainers write there while they are built."""
    made: list[Path] = []

    def make_folder(output: str | None = None) -> None:
        folder = Path(output or "")
        if output and not folder.suffix and not folder.exists():
            folder.mkdir(parents=True)
            made.append(folder)

    try:
        yield make_folder
    finally:
        for folder in made:
            with suppress(OSError):  # something was written
                folder.rmdir()


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def _own_tests_reported(cfg: CfgNode) -> Iterator[None]:
    """Let the evaluator report the numbers of a test that is a trainer's own; the engine's ``test`` reports by itself."""
    name, by_engine = cfg.TEST.EVALUATOR, SimpleTrainer.test
    if name not in EVALUATOR_REGISTRY:  # it may have a registry of its own
        yield
        return
    evaluator: Any = EVALUATOR_REGISTRY.get(name)

    class Reporting(evaluator):
        reports = True

        def evaluate(self) -> dict[str, float]:
            results: dict[str, float] = super().evaluate()
            if self.reports:
                get_plugin_manager().hook.after_test(trainer=None, split=cfg.TEST.SPLIT, results=results)
            return results

    def test(self: SimpleTrainer, split: str | None = None) -> float:
        Reporting.reports = False
        return by_engine(self, split)

    EVALUATOR_REGISTRY.register(Reporting, name=name, force=True)
    with _replaced(SimpleTrainer, "test", test):
        yield
