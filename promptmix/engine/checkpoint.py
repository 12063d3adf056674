"""Checkpoints: learned tensors and plain numbers only, written whole or not at all, read without running code."""

from __future__ import annotations

import os
import shutil
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from promptmix.engine.optim import EpochSchedule, load_optimizer
from promptmix.engine.run_folder import BEST_FILE, EXPORT_FILE, EXPORT_NOTE, LAST_FILE, RunFolder, shorten, what_is_there
from promptmix.engine.unpickle import Refused, read_pickled
from promptmix.errors import CheckpointError
from promptmix.files.digests import digest_of
from promptmix.parallel import group
from promptmix.utils import atomic_write, get_logger, mkdir_if_missing, read_json, write_json

__all__ = [
    "export_model",
    "load_checkpoint",
    "load_pretrained_weights",
    "load_state_dict_strict",
    "read_export",
    "read_model",
    "refuse_broken",
    "resume_from_checkpoint",
    "save_checkpoint",
    "save_plain",
]

StrPath = str | os.PathLike[str]

_EXPORT_VERSION = 1
_NOTE_TYPES: dict[str, tuple[type, ...]] = {"schema_version": (int,), "trainer": (str,)}
_NOTE_TYPES |= {"epoch": (int, type(None)), "val_result": (int, float, type(None))}
#: Where a file keeps the digest of everything else in it.
DIGEST = "digest"


def save_checkpoint(
    state: dict[str, Any],
    save_dir: StrPath,
    is_best: bool = False,
    remove_module_from_keys: bool = True,
    model_name: str = "",
) -> None:
    """Write a checkpoint and note its name in the folder's ``checkpoint`` file.

    Args:
        state: at least ``state_dict`` and ``epoch`` (epochs done); otherwise tensors and plain values.
        save_dir: folder of one model; made where missing.
        is_best: keep a copy as ``model-best.pth.tar``.
        remove_module_from_keys: drop ``module.``, which DataParallel puts before names.
        model_name: file name; default ``model.pth.tar-<epoch>``.

    Raises:
        CheckpointError: ``state`` holds something else than tensors and plain values; the message names the key.
    """
    if not group.writes():
        return
    folder = Path(save_dir)
    mkdir_if_missing(folder)
    if remove_module_from_keys:
        state = {**state, "state_dict": _without_module(state["state_dict"])}
    path = folder / (model_name or f"model.pth.tar-{state['epoch']}")
    save_plain(state, path)
    get_logger().info("Checkpoint saved to %s", path)
    atomic_write(folder / LAST_FILE, lambda temporary: temporary.write_text(f"{path.name}\n"))
    if is_best:
        best = folder / BEST_FILE
        atomic_write(best, lambda temporary: shutil.copy(path, temporary))
        get_logger().info('Best checkpoint saved to "%s"', best)


def save_plain(state: Mapping[str, Any], path: Path) -> None:
    """Write tensors and plain values, whole or not at all.

    Raises:
        CheckpointError: there is something else in ``state``; the message names the key.
    """
    payload = _plain({key: value for key, value in state.items() if key != DIGEST}, "checkpoint")
    payload[DIGEST] = digest_of(payload)
    atomic_write(path, lambda temporary: torch.save(payload, temporary))


def load_checkpoint(fpath: StrPath) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Nothing in the file is executed. Schedulers that Dassl's trainers pickle come as inert placeholders; a file that needs
    any other object is refused.

    Raises:
        CheckpointError: no such file, not a checkpoint, one that holds objects, or one that was changed after it was written.
    """
    path = Path(fpath)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint {path}; {what_is_there(path.parent)}")
    try:
        checkpoint = read_pickled(path)
    except Refused as error:
        # Only a file that is well-formed names what it wants to build.
        objects = "GLOBAL" in str(error)
        reason = (
            f"it holds objects besides tensors and numbers: {error}" if objects else f"it is damaged or no checkpoint: {error}"
        )
        raise CheckpointError(
            f"can't read {path} ({reason}); promptmix never runs code from a file. "
            "Write it again with promptmix, or save its state_dict alone"
        ) from error
    except (OSError, MemoryError) as error:
        raise CheckpointError(
            f"can't read {path} ({error or type(error).__name__}); check the disk and who may read it"
        ) from error
    if not isinstance(checkpoint, dict):
        kind = type(checkpoint).__name__
        raise CheckpointError(f"{path} is not a checkpoint: it holds a {kind}, not a dict with 'state_dict'; name another file")
    _check_digest(checkpoint, {key: value for key, value in checkpoint.items() if key != DIGEST}, path)
    state, epoch = checkpoint.get("state_dict", {}), checkpoint.get("epoch", 0)
    if not isinstance(state, Mapping) or not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()):
        raise CheckpointError(f"the 'state_dict' in {path} is not a dict of named tensors; take another copy or epoch")
    if type(epoch) is not int or epoch < 0:
        raise CheckpointError(f"the 'epoch' in {path} is {str(epoch)[:40]!r}, not a number of epochs; take another copy or epoch")
    for key, kinds, what in (("trainer", str, "a name"), ("backbone", str, "a name"), ("val_result", int | float, "a number")):
        found = checkpoint.get(key)
        if found is not None and not isinstance(found, kinds):
            raise CheckpointError(f"the {key!r} in {path} is {str(found)[:40]!r}, not {what}; take another copy or epoch")
    return checkpoint


def _check_digest(note: Mapping[str, Any], content: Any, path: Path) -> None:
    """Refuse a file whose content is not what its digest was taken of; older files and other programs' have none."""
    if DIGEST in note and note[DIGEST] != digest_of(content):
        raise CheckpointError(
            f"{path} is not what was written (its digest differs): it was damaged or changed; take another copy or epoch, "
            f"or train again. Whoever changed it on purpose removes its entry {DIGEST!r}"
        )


def read_model(folder: StrPath, epoch: int | None = None) -> tuple[dict[str, Any], Path]:
    """Read the checkpoint of one model.

    Args:
        folder: the model's own folder in a run's output folder, or one that ``export_model`` wrote.
        epoch: which checkpoint; None = the one that the run was tested with (see ``RunFolder.checkpoint``).

    Returns:
        The checkpoint, and the file that it comes from.

    Raises:
        CheckpointError: there is none, or it can't be read.
    """
    path = RunFolder(Path(folder).parent).checkpoint(Path(folder).name, epoch)
    if path.name == EXPORT_FILE or not path.is_file():
        return read_export(folder, epoch), Path(folder, EXPORT_FILE)
    return load_checkpoint(path), path


def export_model(state_dict: Mapping[str, torch.Tensor], folder: StrPath, note: Mapping[str, Any]) -> Path:
    """Write tensors as ``model.safetensors``, and ``note`` (trainer, epoch, val_result) with their shapes as ``model.json``.

    Returns:
        The file with the tensors.
    """
    path = Path(folder, EXPORT_FILE)
    # Copies, since safetensors takes no two names for one storage.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state_dict.items()}
    atomic_write(path, lambda temporary: save_file(tensors, temporary))
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    whole = {"schema_version": _EXPORT_VERSION, **note, "tensors": shapes, DIGEST: digest_of(dict(sorted(tensors.items())))}
    write_json(whole, Path(folder, EXPORT_NOTE))
    return path


def read_export(folder: StrPath, epoch: int | None = None) -> dict[str, Any]:
    """Read what ``export_model`` wrote, as a checkpoint.

    Args:
        folder: the model's folder.
        epoch: the epoch that is asked for; None takes what there is.

    Raises:
        CheckpointError: it is of another epoch or a newer promptmix, or the tensors are missing or damaged.
    """
    note, path = read_json(Path(folder, EXPORT_NOTE)), Path(folder, EXPORT_FILE)
    if not isinstance(note, dict) or not all(isinstance(note.get(name), kinds) for name, kinds in _NOTE_TYPES.items()):
        raise CheckpointError(f"{Path(folder, EXPORT_NOTE)} is not a note of an export; convert the checkpoint again")
    if note["schema_version"] > _EXPORT_VERSION:
        raise CheckpointError(f"{Path(folder, EXPORT_NOTE)} is of another form than this promptmix writes; upgrade it")
    if epoch is not None and note.get("epoch") != epoch:
        raise CheckpointError(f"{path} is of epoch {note.get('epoch')}, not {epoch}; leave --load-epoch out")
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"can't read {path} ({error}); convert the checkpoint again") from error
    _check_digest(note, dict(sorted(state.items())), path)
    return {**note, "state_dict": state}


def load_state_dict_strict(model: nn.Module, state_dict: Mapping[str, Any], source: str) -> None:
    """Load tensors into ``model``, all of them and no others.

    Args:
        model: takes the tensors.
        state_dict: name -> tensor.
        source: where they come from, for the message.

    Raises:
        CheckpointError: names or shapes don't agree; nothing is loaded then.
    """
    state_dict = getattr(model, "fit_state", lambda state: state)(state_dict)
    own = model.state_dict()
    missing = [key for key in own if key not in state_dict]
    unexpected = [key for key in state_dict if key not in own]
    shapes = [clash for key in own if key in state_dict and (clash := _clash(key, state_dict[key], own[key]))]
    problems = [f"{word} {shorten(keys)}" for word, keys in (("lacks", missing), ("has unknown", unexpected)) if keys]
    problems += [shorten(shapes)] if shapes else []
    if problems:
        raise CheckpointError(
            f"{source} doesn't fit {type(model).__name__}: it {'; '.join(problems)}. "
            "It is of another method or config; use those that wrote it"
        )
    refuse_broken({key: state_dict[key] for key in own}, source)
    model.load_state_dict(dict(state_dict))


def refuse_broken(tensors: Mapping[str, torch.Tensor], source: str) -> None:
    """Refuse tensors with numbers that are none.

    Raises:
        CheckpointError: there are some.
    """
    broken = [key for key, tensor in tensors.items() if not _is_finite(tensor)]
    if broken:
        raise CheckpointError(
            f"{source} holds numbers that are NaN or infinite ({shorten(broken)}): training diverged, or the file is damaged; "
            "take an earlier epoch, or train again with a lower OPTIM.LR"
        )


def _clash(key: str, theirs: Any, ours: torch.Tensor) -> str:
    """Say why a value can't stand for a tensor of the model; "" where it can."""
    if not isinstance(theirs, torch.Tensor):
        return f"{key} is a {type(theirs).__name__} there, not a tensor"
    if theirs.shape != ours.shape:
        return f"{key} is {tuple(theirs.shape)} there and {tuple(ours.shape)} here"
    if theirs.dtype != ours.dtype and not (theirs.is_floating_point() and ours.is_floating_point()):
        return f"{key} is of type {theirs.dtype} there and {ours.dtype} here"
    return ""


def _is_finite(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor.float()).all())


def resume_from_checkpoint(
    fdir: StrPath,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: Any = None,
    refuse: Callable[[Mapping[str, Any], Path], None] | None = None,
) -> int:
    """Restore a model, and its optimizer and scheduler, from the checkpoint that was written last.

    Args:
        fdir: folder of one model, with a ``checkpoint`` file.
        model: takes the tensors.
        optimizer: takes its state, if given and saved.
        scheduler: takes its state, if given and saved.
        refuse: raises where the checkpoint, from the file that it is told, is another's.

    Returns:
        The number of epochs done, which is the epoch to go on with.

    Raises:
        CheckpointError: the folder names no checkpoint or one outside itself, or it doesn't fit.
    """
    path = RunFolder(Path(fdir).parent).last(Path(fdir).name)
    log = get_logger()
    log.info('Loading checkpoint from "%s"', path)
    checkpoint = load_checkpoint(path)
    for key in ("state_dict", "epoch"):
        if key not in checkpoint:
            there = shorten(list(checkpoint))
            raise CheckpointError(f"{path} has no {key!r} (keys: {there}); it was not written by a training run")
    if refuse is not None:
        refuse(checkpoint, path)
    load_state_dict_strict(model, checkpoint["state_dict"], str(path))
    log.info("Loaded model weights")
    if optimizer is not None and checkpoint.get("optimizer") is not None:
        load_optimizer(optimizer, checkpoint["optimizer"], str(path))
        log.info("Loaded optimizer")
    state = None if scheduler is None else _schedule_state(scheduler, checkpoint)
    if state is not None:
        scheduler.load_state_dict(state)
        log.info("Loaded scheduler")
    log.info("Previous epoch: %s", checkpoint["epoch"])
    return int(checkpoint["epoch"])


def _schedule_state(scheduler: Any, checkpoint: Mapping[str, Any]) -> Any:
    """Return the state that ``scheduler`` goes on from; ours follows from the epoch, so that Dassl's own state will do."""
    state = checkpoint.get("scheduler")
    if isinstance(scheduler, EpochSchedule) and (state is None or isinstance(state, Mapping) and "last_lr" not in state):
        rates = (state or {}).get("_last_lr", scheduler.base_lrs)
        return {"last_epoch": int(checkpoint["epoch"]), "last_lr": rates}
    return state


def load_pretrained_weights(model: nn.Module, weight_path: StrPath) -> None:
    """Load the tensors of a checkpoint, or of an export, that fit ``model`` in name and shape, and say which don't.

    Raises:
        CheckpointError: the file can't be read, or not one tensor fits.
    """
    path = Path(weight_path)
    checkpoint = read_export(path.parent) if path.name == EXPORT_FILE else load_checkpoint(path)
    found = checkpoint.get("state_dict", checkpoint)
    if not isinstance(found, Mapping) or not all(isinstance(key, str) for key in found):
        raise CheckpointError(f"{weight_path} holds no state_dict of named tensors; name a checkpoint")
    loaded = _without_module(found)
    own = model.state_dict()
    fitting = {
        key: value for key, value in loaded.items() if key in own and not _clash(key, value, own[key]) and _is_finite(value)
    }
    if not fitting:
        raise CheckpointError(
            f"nothing in {weight_path} fits {type(model).__name__}: there are {shorten(list(loaded))}; "
            f"the model has {shorten(list(own))}"
        )
    model.load_state_dict({**own, **fitting})
    log = get_logger()
    log.info("Successfully loaded pretrained weights from %s", weight_path)
    discarded = [key for key in loaded if key not in fitting]
    if discarded:
        log.info("Layers discarded due to unmatched keys or size: %s", discarded)


def _without_module(state_dict: Mapping[str, Any]) -> OrderedDict[str, Any]:
    return OrderedDict((key.removeprefix("module."), value) for key, value in state_dict.items())


def _plain(value: Any, where: str) -> Any:
    """Return ``value`` with numpy scalars as numbers and tensors detached; refuse any other object."""
    if isinstance(value, torch.Tensor):
        return value.detach()
    if value is None or type(value) in (bool, int, float, str, bytes):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Counter):
        return Counter({key: _plain(item, f"{where}.{key}") for key, item in value.items()})
    if isinstance(value, Mapping):
        return {key: _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(item, f"{where}[{i}]") for i, item in enumerate(value))
    raise CheckpointError(
        f"{where} is a {type(value).__name__}, which can't be stored without pickling code; save tensors and plain values only"
    )
