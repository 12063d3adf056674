"""Resume is the same run: all that a training needs to go on after any epoch with the numbers it would have had unbroken.

After each epoch one file is replaced as a whole: learned tensors, optimizers, schedules, loss scaling, the best result so far,
and every random stream. Checkpoints by epoch, which others read, are written as before; they don't say how far the training is.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from promptmix.data.reading.streams import get_streams, set_streams
from promptmix.engine.checkpoint import load_checkpoint, load_state_dict_strict, save_plain
from promptmix.engine.optim import load_optimizer
from promptmix.engine.run_folder import RunFolder
from promptmix.errors import CheckpointError
from promptmix.parallel import group
from promptmix.utils import get_logger

#: A ``TrainerBase``, which knows this module.
Trainer = Any

__all__ = ["from_streams", "get_random_states", "load_progress", "save_progress", "set_random_states"]

#: Raised when the file's meaning changes; a training goes on with the promptmix that it began with.
_VERSION = 1
_NO_STATE = object()


def save_progress(trainer: Trainer, folder: RunFolder) -> None:
    """Write what ``trainer`` needs to go on after the present epoch; a killed process leaves the old file or the new one.

    A trainer whose state can't be stored without pickling code trains on, and says that it can't be resumed.
    """
    if not group.writes():
        return
    models = {}
    for name in trainer.get_model_names():
        optim, sched = trainer._optims[name], trainer._scheds[name]
        models[name] = {
            "state_dict": trainer._models[name].state_dict(),
            "optimizer": None if optim is None else optim.state_dict(),
            # A checkout's may be a mere function of the step.
            "scheduler": None if sched is None else getattr(sched, "state_dict", lambda: _NO_STATE)(),
        }
    state = {
        "version": _VERSION,
        "trainer": type(trainer).__name__,
        "backbone": trainer.backbone_name,
        "epoch": trainer.epoch + 1,
        "processes": group.size(),
        "models": models,
        "own": trainer.progress_state(),
        "data": data_digest(trainer),
        "random": get_random_states(trainer),
    }
    try:
        if any(model["scheduler"] is _NO_STATE for model in models.values()):
            raise CheckpointError("its learning-rate schedule keeps no state")
        save_plain(state, folder.progress)
    except CheckpointError as error:
        if not trainer.__dict__.get("_told_no_resume"):
            get_logger().warning("This training can't be resumed exactly: %s", error)
        trainer.__dict__["_told_no_resume"] = True


def load_progress(trainer: Trainer, folder: RunFolder) -> dict[str, Any] | None:
    """Give ``trainer`` the state that an interrupted training left in ``folder``, all but the random states.

    Returns:
        The random states, for ``set_random_states`` just before the next epoch; None where there is nothing to go on from.

    Raises:
        CheckpointError: the file is damaged, or it is of another method, backbone, config or version.
    """
    path = folder.progress
    if not path.is_file():
        return None
    log = get_logger()
    log.info("Found checkpoint at %s (will resume training)", folder.path)
    log.info('Loading checkpoint from "%s"', path)
    state = load_checkpoint(path)
    _refuse_other(state, trainer, path)
    try:
        for name in trainer.get_model_names():
            saved = state["models"][name]
            load_state_dict_strict(trainer._models[name], saved["state_dict"], f"{path} ({name})")
            optim, sched = trainer._optims[name], trainer._scheds[name]
            if optim is not None:
                load_optimizer(optim, saved["optimizer"], f"{path} ({name})")
            if sched is not None:
                sched.load_state_dict(saved["scheduler"])
        trainer.load_progress_state(state["own"])
        trainer.start_epoch = int(state["epoch"])
        now = get_random_states(trainer)
        set_random_states(trainer, state["random"])  # tried here, where a file that doesn't fit can be told
        set_random_states(trainer, now)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, IndexError) as error:
        raise CheckpointError(
            f"{path} doesn't fit this run ({type(error).__name__}: {error}); resume with the config that began, or remove "
            "the file to train again from the start"
        ) from error
    trainer.resumed_alike = state.get("processes", 1) == group.size()
    trainer.epoch = trainer.start_epoch - 1
    log.info("Previous epoch: %s", state["epoch"])
    return dict(state["random"])


def _refuse_other(state: Mapping[str, Any], trainer: Trainer, path: Path) -> None:
    """Refuse the state of another version, method, backbone or set of pictures."""
    if state.get("version") != _VERSION or not isinstance(state.get("models"), Mapping):
        raise CheckpointError(
            f"{path} is of another form than this promptmix writes; go on with the promptmix that began, or remove the file"
        )
    writer, there, names = state.get("trainer"), list(state["models"]), trainer.get_model_names()
    if writer != type(trainer).__name__ or sorted(there) != sorted(names):
        raise CheckpointError(
            f"{path} is of {writer} with {', '.join(there) or 'no model'}, not of {type(trainer).__name__} with "
            f"{', '.join(names) or 'no model'}; resume with the config that began"
        )
    trainer.refuse_foreign(state, path)
    data = data_digest(trainer)
    if data and state.get("data", data) != data:
        raise CheckpointError(
            f"{path} was learned on other training pictures than the data set has now; put them back as they were, choose "
            "another --output-dir, or remove the file to train again from the start"
        )


def data_digest(trainer: Trainer) -> str:
    """Return a digest of the training pictures' names, labels and order, wherever they lie; "" for a trainer without a list."""
    items = getattr(getattr(getattr(trainer, "dm", None), "dataset", None), "train_x", None)
    if not items:
        return ""
    if "_data_digest" not in trainer.__dict__:
        digest = hashlib.sha256()
        for item in items:
            digest.update(f"{os.path.basename(item.impath)}\0{item.label}\0{item.classname}\n".encode(errors="surrogateescape"))
        trainer.__dict__["_data_digest"] = digest.hexdigest()
    return str(trainer.__dict__["_data_digest"])


# Random states


def get_random_states(trainer: Trainer) -> dict[str, Any]:
    """Return the states of every random stream: the process's own, each GPU's, and generators that the trainer's parts hold."""
    states: dict[str, Any] = {"streams": get_streams(), "generators": {}}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state_all()
    for place, generator in _generators(trainer):
        if isinstance(generator, torch.Generator):
            states["generators"][place] = generator.get_state()
        elif isinstance(generator, random.Random):
            version, words, gauss = generator.getstate()
            states["generators"][place] = {"version": version, "words": list(words), "gauss": gauss}
        elif isinstance(generator, np.random.RandomState):
            states["generators"][place] = _plain(generator.get_state(legacy=False))
        else:
            states["generators"][place] = _plain(generator.bit_generator.state)
    return states


def set_random_states(trainer: Trainer, states: Mapping[str, Any]) -> None:
    """Put back what ``get_random_states`` returned; a GPU that isn't there any more is passed over."""
    set_streams(states["streams"])
    for device, state in enumerate(states.get("cuda", ())):
        if torch.cuda.is_available() and device < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, device)
    saved = states["generators"]
    for place, generator in _generators(trainer):
        if place not in saved:
            continue
        if isinstance(generator, torch.Generator):
            generator.set_state(saved[place])
        elif isinstance(generator, random.Random):
            generator.setstate((saved[place]["version"], tuple(saved[place]["words"]), saved[place]["gauss"]))
        elif isinstance(generator, np.random.RandomState):
            generator.set_state(_arrays(saved[place]))
        else:
            generator.bit_generator.state = _arrays(saved[place])


def _generators(trainer: Trainer) -> Iterator[tuple[str, Any]]:
    """Yield (place, generator) for each that the trainer, its models, loaders, samplers or data sets have as attribute."""
    seen: set[int] = set()
    for place, holder in _holders(trainer):
        for name, value in sorted(getattr(holder, "__dict__", {}).items()):
            kind = (torch.Generator, random.Random, np.random.RandomState, np.random.Generator)
            if isinstance(value, kind) and id(value) not in seen:
                seen.add(id(value))
                yield f"{place}.{name}", value


def _holders(trainer: Trainer) -> Iterator[tuple[str, object]]:
    yield "trainer", trainer
    for name, value in sorted(vars(trainer).items()):
        if isinstance(value, DataLoader):
            parts = {"": value, ".sampler": value.sampler, ".batch_sampler": value.batch_sampler, ".dataset": value.dataset}
            for part, holder in parts.items():
                yield name + part, holder
    for name, model in trainer._models.items():
        for path, module in model.named_modules() if isinstance(model, nn.Module) else ():
            yield f"{name}.{path}", module


def _plain(value: Any) -> Any:  # a tree of a generator's state
    """Return numpy's state with arrays as lists."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return {"array": value.tolist(), "dtype": str(value.dtype)} if isinstance(value, np.ndarray) else value


def _arrays(value: Any) -> Any:
    """Undo ``_plain``."""
    if not isinstance(value, Mapping):
        return value
    if set(value) == {"array", "dtype"}:
        return np.array(value["array"], dtype=value["dtype"])
    return {key: _arrays(item) for key, item in value.items()}


@contextlib.contextmanager
def from_streams(streams: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Have the process's random streams go on from ``streams`` inside the context, and from where they were after it."""
    now = get_streams()
    set_streams(streams)
    try:
        yield
    finally:
        set_streams(now)
