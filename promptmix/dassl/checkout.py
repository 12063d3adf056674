"""``promptmix train --coop-repo PATH``: a checkout of the CoOp family, run as it is on promptmix's engine.

A checkout has a ``train.py`` that imports its data sets and trainers and defines ``setup_cfg`` or ``extend_cfg``, and beside it
the packages ``trainers``, ``datasets`` and ``clip``. Its paths, modules and registrations are there for the run only.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from yacs.config import CfgNode

from promptmix.dassl.config import get_cfg_default
from promptmix.dassl.importing import installed
from promptmix.engine import SimpleTrainer, TrainerBase, choose_device
from promptmix.errors import ConfigError, PluginError, UserError
from promptmix.plugin_manager import get_plugin_manager
from promptmix.registry import DATASET_REGISTRY, EVALUATOR_REGISTRY, TRAINER_REGISTRY
from promptmix.runs.results import RunResult
from promptmix.utils import get_logger

__all__ = ["run_checkout"]


def run_checkout(path: str, args: argparse.Namespace, **options: Any) -> RunResult:
    """Run a trainer of the checkout at ``path``.

    Args:
        path: folder of the checkout.
        args: CoOp's flags, with ``device`` (may be None).
        options: passed to ``promptmix.runs.run.run``.

    Raises:
        UserError: the folder is no such checkout, a package that it needs is missing, or it calls CUDA where there is none.
    """
    from promptmix.runs.run import run

    root = _root(path)
    get_plugin_manager()  # before the layers, so that what promptmix brings lies below them
    with ExitStack() as stack:
        stack.enter_context(installed())
        stack.enter_context(_modules_of(root))
        trainers = stack.enter_context(TRAINER_REGISTRY.layer())
        stack.enter_context(DATASET_REGISTRY.layer())
        stack.enter_context(EVALUATOR_REGISTRY.layer())
        program = _import_program(root)
        cfg = _configure(program, args, root)
        if cfg.TRAINER.NAME not in trainers:
            there = ", ".join(sorted(trainers)) or "none"
            raise ConfigError(f"--trainer {cfg.TRAINER.NAME or '(not given)'}: {root} has no such trainer (it has: {there})")
        _use_weights(cfg)
        if choose_device(cfg.DEVICE, cfg.USE_CUDA).type == "cpu":
            changed = _to_fp32(cfg)
            if changed:  # among the arguments, which the log begins with
                options["arguments"] = {**options.get("arguments", {}), "no_gpu": changed}
            stack.enter_context(_without_cuda(root))
        _report_own_tests(cfg, trainers[cfg.TRAINER.NAME])
        with _explained(root):
            return run(cfg, **options)


def _root(path: str) -> Path:
    root = Path(path).expanduser().resolve()
    if (root / "train.py").is_file():
        return root
    below = sorted(str(file.parent) for file in root.glob("*/train.py")) if root.is_dir() else []
    hint = f"; did you mean {below[0]}?" if below else "; name the folder of a checkout of CoOp or one of its forks"
    raise ConfigError(f"--coop-repo {path}: no train.py there{hint}")


# Modules


@contextmanager
def _modules_of(root: Path) -> Iterator[None]:
    """Let the checkout's top-level modules win over any others of the same names; put everything back afterwards."""
    names = {entry.stem for entry in root.iterdir() if entry.suffix == ".py" or (entry.is_dir() and any(entry.glob("*.py")))}
    names -= {"promptmix", "dassl"}  # the engine is ours
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in names}
    before = list(sys.path)
    sys.path.insert(0, str(root))
    for name in names:
        if (root / name).is_dir() and not (root / name / "__init__.py").is_file():
            # Without __init__.py the import system would prefer a package of this name anywhere else on the path.
            sys.modules[name] = package = ModuleType(name)
            package.__path__ = [str(root / name)]
    try:
        yield
    finally:
        sys.path[:] = before
        for name in [name for name in sys.modules if name.partition(".")[0] in names]:
            del sys.modules[name]
        sys.modules.update(hidden)


def _import_program(root: Path) -> ModuleType:
    """Import the checkout's ``train.py``, and with it its trainers and data sets."""
    file = root / "train.py"
    spec = importlib.util.spec_from_file_location("train", file)
    if spec is None or spec.loader is None:
        raise PluginError(f"--coop-repo: {file} is not a Python file")
    program = importlib.util.module_from_spec(spec)
    sys.modules["train"] = program
    try:
        spec.loader.exec_module(program)
    except ModuleNotFoundError as error:
        raise PluginError(
            f"{_where(error, root) or file} needs the package {error.name}, which is not installed ({error}); install it, or "
            "remove that import from the checkout"
        ) from error
    except ImportError as error:
        raise PluginError(f"{_where(error, root) or file} can't be imported: {error}") from error
    return program


def _where(error: BaseException, root: Path) -> str:
    """Return ``file:line`` of the checkout where ``error`` came from, or an empty string."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).is_relative_to(root)]
    return f"{Path(frames[-1].filename).relative_to(root)}:{frames[-1].lineno}" if frames else ""


# Config


def _configure(program: ModuleType, args: argparse.Namespace, root: Path) -> CfgNode:
    """Return the merged tree as the checkout's own ``train.py`` makes it."""
    given = {key: value for key, value in vars(args).items() if value is not None}
    for key in ("config_file", "dataset_config_file"):
        if given.get(key):
            given[key] = str(_config_file(given[key], root))
    flags = argparse.Namespace(**{**_flag_defaults(root / "train.py"), **given})
    try:
        cfg = program.setup_cfg(flags) if hasattr(program, "setup_cfg") else _merge(program, flags)
    except (KeyError, ValueError, AssertionError) as error:  # what yacs raises
        reason = error.args[0] if error.args else type(error).__name__
        raise ConfigError(
            f"the checkout's config can't be merged: {reason}; check its YAML files and the KEY VALUE pairs"
        ) from error
    cfg.defrost()
    if given.get("device"):
        cfg.DEVICE = given["device"]
    return cfg


def _merge(program: ModuleType, flags: argparse.Namespace) -> CfgNode:
    """Do what ``setup_cfg`` does, for a checkout without it."""
    cfg = get_cfg_default()
    for name, arguments in (("extend_cfg", (cfg,)), ("reset_cfg", (cfg, flags))):
        if name == "reset_cfg":
            for file in filter(None, (flags.dataset_config_file, flags.config_file)):
                cfg.merge_from_file(file)
        if hasattr(program, name):
            getattr(program, name)(*arguments)
    cfg.merge_from_list(flags.opts)
    return cfg


def _config_file(path: str, root: Path) -> Path:
    for file in (Path(path), root / path):
        if file.is_file():
            return file
    raise ConfigError(f"config file {path}: neither here nor in {root}; check the path")


def _flag_defaults(file: Path) -> dict[str, Any]:
    """Return flag -> default of every ``add_argument`` in the checkout's ``train.py``; forks read flags of their own."""
    found: dict[str, Any] = {}
    for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument"):
            continue
        names = [arg.value for arg in call.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        settings = {keyword.arg: keyword.value for keyword in call.keywords}
        try:
            default = ast.literal_eval(settings["default"]) if "default" in settings else None
            action = ast.literal_eval(settings["action"]) if "action" in settings else ""
        except ValueError:
            continue  # computed when the program runs
        for name in names[-1:]:
            found[name.lstrip("-").replace("-", "_")] = {"store_true": False, "store_false": True}.get(action, default)
    return found


def _use_weights(cfg: CfgNode) -> None:
    """Give the checkout's CLIP loader a local file instead of a download, where ``MODEL.BACKBONE.WEIGHTS`` names one."""
    weights = cfg.MODEL.BACKBONE.WEIGHTS
    if not weights:
        return
    loader = sys.modules.get("clip.clip")
    if loader is None or not hasattr(loader, "_download"):
        raise ConfigError(
            f"MODEL.BACKBONE.WEIGHTS {weights} would be ignored: the checkout has no _download in clip/clip.py; leave the key out"
        )
    if not Path(weights).is_file():
        raise ConfigError(f"MODEL.BACKBONE.WEIGHTS {weights}: no such file")
    loader._download = lambda *_args, **_kwargs: str(weights)  # type: ignore[attr-defined]


# Without a GPU


def _to_fp32(cfg: CfgNode) -> str:
    """Turn every trainer's ``PREC`` to fp32, since fp16 and amp need a GPU; return what changed, in words."""
    changed = []
    for name, node in cfg.TRAINER.items():
        if isinstance(node, CfgNode) and node.get("PREC") in ("fp16", "amp"):
            changed.append(f"TRAINER.{name}.PREC is fp32 instead of {node.PREC}")
            node.PREC = "fp32"
    return ", ".join(changed)


@contextmanager
def _without_cuda(root: Path) -> Iterator[None]:
    """Pass over ``.cuda()`` and ``.half()`` inside the context, and say once for each where the checkout calls it."""
    said: set[str] = set()

    def passed_over(method: str) -> Any:  # noqa: ANN401
        def call(self: Any, *_args: Any, **_kwargs: Any) -> Any:  # noqa: ANN401
            if method not in said:
                said.add(method)
                frames = [f for f in traceback.extract_stack() if Path(f.filename).is_relative_to(root)]
                where = f" (first at {Path(frames[-1].filename).relative_to(root)}:{frames[-1].lineno})" if frames else ""
                get_logger().warning("No GPU: calls of .%s() in the checkout are passed over%s", method, where)
            return self

        return call

    places = [(owner, method) for owner in (torch.Tensor, nn.Module) for method in ("cuda", "half")]
    before = [(owner, method, getattr(owner, method)) for owner, method in places]
    for owner, method in places:
        setattr(owner, method, passed_over(method))
    try:
        yield
    finally:
        for owner, method, original in before:
            setattr(owner, method, original)


@contextmanager
def _explained(root: Path) -> Iterator[None]:
    """Say in one line where the checkout asks for a GPU that is not there, or for what only a fork of Dassl has."""
    try:
        yield
    except UserError:
        raise
    except AttributeError as error:
        if not isinstance(error.obj, TrainerBase) or not _where(error, root):
            raise
        raise UserError(
            f"{_where(error, root)} uses {type(error.obj).__name__}.{error.name}, which neither the checkout nor Dassl has; "
            "it may need a fork of Dassl: bring that method into the checkout, or take promptmix's own trainer "
            "(`promptmix list trainers`)"
        ) from error
    except (RuntimeError, AssertionError) as error:
        if torch.cuda.is_available() or not re.search("cuda|nvidia", str(error), re.IGNORECASE):
            raise
        first = str(error).splitlines()[0]
        raise UserError(
            f"{_where(error, root) or root} asks for CUDA, but there is no GPU ({first}); change it to self.device, or use a GPU"
        ) from error


def _report_own_tests(cfg: CfgNode, trainer: type) -> None:
    """Where a trainer has a ``test`` of its own, let its evaluator report the numbers, which the engine's ``test`` would do."""
    if getattr(trainer, "test", None) is SimpleTrainer.test:
        return
    evaluator: Any = EVALUATOR_REGISTRY.get(cfg.TEST.EVALUATOR)

    class Reporting(evaluator):
        def evaluate(self) -> dict[str, float]:
            results: dict[str, float] = super().evaluate()
            get_plugin_manager().hook.after_test(trainer=None, split=cfg.TEST.SPLIT, results=results)
            return results

    EVALUATOR_REGISTRY.register(Reporting, name=cfg.TEST.EVALUATOR, force=True)
