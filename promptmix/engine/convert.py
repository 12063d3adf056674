"""Checkpoints of the CoOp family in their authors' layout and in ours: each method states one layout, read both ways.

The authors' trainers save either the prompt learner alone (``ctx``) or the whole model with the frozen CLIP in it
(``prompt_learner.ctx``, ``image_encoder.VPT``, ...), always with buffers of the class names. What is learned is renamed, what is
listed as not learned is dropped, and anything else is an error that names it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from promptmix.engine.checkpoint import DIGEST, export_model, load_checkpoint, read_export, refuse_broken, save_checkpoint
from promptmix.engine.layout import Layout, rename, today
from promptmix.engine.run_folder import EXPORT_FILE, EXPORT_NOTE, RunFolder
from promptmix.errors import CheckpointError
from promptmix.plugin_manager import get_plugin_manager
from promptmix.registry import TRAINER_REGISTRY

__all__ = [
    "Learned",
    "layouts",
    "check_backbone",
    "find_theirs",
    "is_frozen",
    "read",
    "to_ours",
    "to_theirs",
    "write_ours",
    "write_theirs",
]

#: Our name of the model that holds a method's learned tensors.
LEARNER = "prompt_learner"


#: What every method saves for the class names it was trained with.
_BUFFERS = re.compile(r"token_(prefix|suffix|middle)\w*|tokenized_prompts\w*|name_lens")
_FROZEN = re.compile(r"(image_encoder|text_encoder)\..+|logit_scale")


@dataclass
class Learned:
    """What a checkpoint holds, by our names.

    Attributes:
        trainer: name of the method.
        models: registered model -> its tensors.
        source: file that it was read from.
        epoch: epochs of training done, if known.
        val_result: validation result, if any.
        frozen: the frozen image tower that came along, by CLIP's names; empty where only the learner was saved.
        sealed: every file had the digest of what promptmix wrote, so that its tensors fit the run's record.
    """

    trainer: str
    models: dict[str, dict[str, Tensor]]
    source: str
    epoch: int | None = None
    val_result: float | None = None
    frozen: dict[str, Tensor] = field(default_factory=dict)
    sealed: bool = False

    def __post_init__(self) -> None:
        """Refuse numbers that are none, which nobody could load."""
        for tensors in (*self.models.values(), self.frozen):
            refuse_broken(tensors, self.source)


def layouts() -> dict[str, Layout]:
    """Return the layout of each registered method that states one in its class."""
    get_plugin_manager()
    found = {name: getattr(TRAINER_REGISTRY.get(name), "layout", None) for name in TRAINER_REGISTRY}
    return {name: layout for name, layout in found.items() if layout is not None}


def to_ours(trainer: str, state: Mapping[str, Tensor], source: str) -> Learned:
    """Rename a state dict of the authors' code.

    Args:
        trainer: name of the method, whose class states a layout.
        state: their names -> tensors.
        source: where it comes from, for messages.

    Raises:
        CheckpointError: no layout of the method is known, or a name is neither learned nor known to be of no use.
    """
    layout = layout_of(trainer)
    models: dict[str, dict[str, Tensor]] = {LEARNER: {}}
    frozen: dict[str, Tensor] = {}
    strange: list[str] = []
    for key, tensor in state.items():
        name = key.removeprefix("module.").removeprefix("prompt_learner.")
        is_frozen = layout.whole and _FROZEN.fullmatch(name)
        found = rename(layout.rules, name)
        if found:
            model, _, ours = found[0].rpartition("/")
            models.setdefault(model or LEARNER, {})[ours] = tensor.unsqueeze(0) if found[1] else tensor
        elif not (is_frozen or _BUFFERS.fullmatch(name) or any(re.fullmatch(unused, name) for unused in layout.unused)):
            strange.append(key)
        learned = found is not None and "/" not in found[0]
        if is_frozen and name.startswith("image_encoder.") and not learned:
            frozen[name.removeprefix("image_encoder.")] = tensor
    if strange:
        more = f" and {len(strange) - 4} more" if len(strange) > 4 else ""
        raise CheckpointError(
            f"{source}: {', '.join(strange[:4])}{more} does not belong to {trainer} as its authors saved it; "
            "name the trainer that wrote the checkpoint"
        )
    return Learned(trainer, models, source, frozen=frozen)


def to_theirs(learned: Learned) -> dict[str, Tensor]:
    """Return the learned tensors by the authors' names.

    Raises:
        CheckpointError: no layout of the method is known, or the authors' code has no place for a tensor.
    """
    layout = layout_of(learned.trainer)
    state: dict[str, Tensor] = {}
    extras = {rule.ours.partition("/")[0] for rule in layout.rules if "/" in rule.ours}
    for model, tensors in learned.models.items():
        if model != LEARNER and model not in extras:
            continue  # such as PromptSRC's running average, which the authors do not save
        for name, tensor in tensors.items():
            ours = name if model == LEARNER else f"{model}/{name}"
            if re.fullmatch(layout.ours_alone, ours):
                continue
            found = rename(layout.rules, ours, backwards=True)
            if found is None or found[1] and tensor.shape[0] != 1:
                shape = tuple(tensor.shape)
                raise CheckpointError(f"{learned.source}: {name} {shape} has no name in the authors' code of {learned.trainer}")
            theirs = found[0]
            inside = layout.whole and not (_FROZEN.fullmatch(theirs) or re.fullmatch(layout.beside, theirs))
            prefix = "prompt_learner." if inside else ""
            state[prefix + theirs] = tensor.squeeze(0) if found[1] else tensor
    return state


def layout_of(trainer: str) -> Layout:
    """Return the authors' layout of a method.

    Raises:
        CheckpointError: none is known.
    """
    known = layouts()
    if trainer not in known:
        raise CheckpointError(f"no layout of the authors' checkpoints is known for {trainer!r} (known: {', '.join(known)})")
    return known[trainer]


# Folders


def find_theirs(directory: str | Path, trainer: str, epoch: int | None = None) -> Learned | None:
    """Read what the authors' code of ``trainer`` left in ``directory``.

    Args:
        directory: output folder of a run.
        trainer: name of the method.
        epoch: which checkpoint; None = the best, as in Dassl.

    Returns:
        None where the folder is not in the authors' layout (or no layout of the method is known).

    Raises:
        CheckpointError: it is, but the file can't be read or holds something unknown.
    """
    if trainer not in layouts():
        return None
    name = layouts()[trainer].folder
    if name not in RunFolder(directory).models():
        return None
    path = RunFolder(directory).checkpoint(name, epoch)
    if path.name == EXPORT_FILE or not path.is_file():
        return None
    checkpoint = load_checkpoint(path)
    return _theirs(trainer, checkpoint, path) if _is_theirs(trainer, checkpoint) else None


def _is_theirs(trainer: str, checkpoint: Mapping[str, Any]) -> bool:
    """Tell the authors' names from ours, which never overlap; their trainers also run on our engine (``--coop-repo``)."""
    rules, state = layouts()[trainer].rules, checkpoint.get("state_dict", {})
    return any(rename(rules, key.removeprefix("module.").removeprefix("prompt_learner.")) for key in state)


def _theirs(trainer: str, checkpoint: Mapping[str, Any], path: Path) -> Learned:
    if "state_dict" not in checkpoint:
        raise CheckpointError(f"{path} has no 'state_dict'; it was not written by a training run")
    learned = to_ours(trainer, checkpoint["state_dict"], str(path))
    for tensors in learned.models.values():
        _refuse_types(tensors, str(path))
    learned.epoch, learned.val_result = checkpoint.get("epoch"), checkpoint.get("val_result")
    return learned


def read(directory: str | Path, epoch: int | None = None, trainer: str = "", logged: str = "") -> Learned:
    """Read a checkpoint of any form: ours, our export, or the authors'.

    Args:
        directory: output folder of a run, or what ``write_ours`` or ``write_theirs`` made.
        epoch: which checkpoint; None = the best, else the last.
        trainer: name of the method; needed where neither the file nor the folder says it.
        logged: the method that the folder's results or log name, if any; the file itself knows better.

    Raises:
        CheckpointError: there is none, or it can't be told of which method it is.
    """
    root = Path(directory)
    exported = sorted(note.parent for note in root.glob(f"*/{EXPORT_NOTE}"))
    if exported:
        checkpoints = {folder.name: read_export(folder, epoch) for folder in exported}
        return _ours(checkpoints, str(root))
    files = {name: RunFolder(root).checkpoint(name, epoch) for name in RunFolder(root).models()}
    if not files:
        raise CheckpointError(
            f"{root} holds no checkpoint (<name>/model.pth.tar-N, or a converted one); name a run's output folder"
        )
    checkpoints = {name: load_checkpoint(path) for name, path in files.items()}
    writers = {checkpoint.get("trainer", "") for checkpoint in checkpoints.values()}
    if "" not in writers and not any(_is_theirs(name, c) for name in writers & set(layouts()) for c in checkpoints.values()):
        return _ours(checkpoints, str(root))
    if len(files) > 1:
        raise CheckpointError(
            f"{root} holds several models ({', '.join(files)}), none written by promptmix; convert one at a time"
        )
    ((name, path),) = files.items()
    known = "".join(writers & set(layouts())) or (logged if logged in layouts() else "")
    trainer = trainer or known or _guess(checkpoints[name], path)
    return _theirs(trainer, checkpoints[name], path)


def _ours(checkpoints: Mapping[str, Mapping[str, Any]], source: str) -> Learned:
    first = checkpoints.get(LEARNER) or next(iter(checkpoints.values()))
    lacking = [name for name, checkpoint in checkpoints.items() if "state_dict" not in checkpoint]
    if lacking:
        raise CheckpointError(f"{source}: {lacking[0]} has no 'state_dict'; it was not written by a training run")
    models = {name: dict(checkpoint["state_dict"]) for name, checkpoint in checkpoints.items()}
    for name, checkpoint in checkpoints.items():
        if DIGEST not in checkpoint:  # some methods keep names as numbers, in files that are known to be as they were written
            _refuse_types(models[name], source)
    if LEARNER in models and first["trainer"] in layouts():
        models[LEARNER] = {today(name): tensor for name, tensor in models[LEARNER].items()}
    sealed = all(DIGEST in checkpoint for checkpoint in checkpoints.values())
    return Learned(first["trainer"], models, source, first.get("epoch"), first.get("val_result"), sealed=sealed)


def _refuse_types(tensors: Mapping[str, Tensor], source: str) -> None:
    """Refuse tensors of a type that nothing is learned in, which loading would refuse.

    Raises:
        CheckpointError: there is one.
    """
    counts = "num_batches_tracked"  # of batch norms, whole numbers rightly
    odd = next((name for name, one in tensors.items() if not one.is_floating_point() and not name.endswith(counts)), None)
    if odd is not None:
        raise CheckpointError(
            f"{source}: {odd} is of type {tensors[odd].dtype}, and what is learned are floating-point numbers; "
            "take another copy or epoch, or train again"
        )


def _guess(checkpoint: Mapping[str, Any], path: Path) -> str:
    """Return the only method whose layout has these names.

    Raises:
        CheckpointError: there are several, or none.
    """
    state, fitting = checkpoint.get("state_dict", {}), []
    for trainer, layout in layouts().items():
        try:
            learned = to_ours(trainer, state, str(path))
        except CheckpointError:
            continue
        needed = {rule.ours for rule in layout.rules if "{" not in rule.theirs}
        if layout.folder == path.parent.name and needed <= set(learned.models[LEARNER]):
            fitting.append(trainer)
    # One method's names may be all of another's and more: the one that has every family of names is meant.
    names = [key.removeprefix("module.").removeprefix("prompt_learner.") for key in state]
    whole = [t for t in fitting if all(any(rename([rule], name) for name in names) for rule in layouts()[t].rules)]
    fitting = whole if len(fitting) > 1 and whole else fitting
    if len(fitting) == 1:
        return fitting[0]
    found = (
        f"it could be of {', '.join(fitting)}" if fitting else f"its names ({', '.join(list(state)[:4])}) are of no known method"
    )
    raise CheckpointError(f"{path}: which method wrote it? {found}; say it with --trainer")


def write_ours(learned: Learned, directory: str | Path) -> list[Path]:
    """Write each model as ``<name>/model.safetensors`` with ``model.json`` beside it, which ``--model-dir`` takes.

    Returns:
        The files with tensors.
    """
    note = {"trainer": learned.trainer, "epoch": learned.epoch, "val_result": learned.val_result}
    return [export_model(state, Path(directory, name), note) for name, state in learned.models.items()]


def write_theirs(learned: Learned, directory: str | Path) -> Path:
    """Write the learned tensors as the authors' trainer would have, for its ``--model-dir``: best and by epoch.

    Returns:
        The file. Their loaders ask for no more than the learned tensors; frozen ones come from the backbone.

    Raises:
        CheckpointError: the authors' code has no place for a tensor.
    """
    folder = Path(directory, layout_of(learned.trainer).folder)
    epoch = learned.epoch or 0
    state = {"state_dict": to_theirs(learned), "epoch": epoch, "val_result": learned.val_result}
    save_checkpoint(state, folder, is_best=True)
    return folder / f"model.pth.tar-{epoch}"


def is_frozen(learned: Learned, visual: torch.nn.Module) -> bool:
    """Tell whether every tensor of ``learned`` is one that the frozen image tower has, but for fp16 rounding."""
    own = visual.state_dict()
    state = {name.removeprefix("image_encoder."): tensor for name, tensor in to_theirs(learned).items()}
    return bool(state) and all(
        name in own and own[name].shape == tensor.shape and torch.equal(own[name].cpu().half(), tensor.half())
        for name, tensor in state.items()
    )


def check_backbone(learned: Learned, visual: torch.nn.Module) -> None:
    """Compare the frozen image tower that came with a checkpoint to the one it is to be used with.

    Args:
        learned: from ``find_theirs``.
        visual: the image tower, with CLIP's names.

    Raises:
        CheckpointError: a tensor differs by more than fp16 rounding: another backbone, or layer norms that were trained.
    """
    own = visual.state_dict()
    for name, theirs in learned.frozen.items():
        if "image_norms" in learned.models and re.search(r"\.ln_[12]\.", name):
            continue  # these are trained, and loaded
        mine = own.get(name)
        if mine is None or mine.shape != theirs.shape or not torch.equal(mine.cpu().half(), theirs.half()):
            what = f"{tuple(theirs.shape)} there, {tuple(mine.shape)} here" if mine is not None else "not in the backbone here"
            raise CheckpointError(
                f"{learned.source} came with another image tower: {name} differs ({what}); set MODEL.BACKBONE to the one it was "
                "trained on, or TRAINER.MOCOOP.TUNE_LAYERNORM where layer norms were trained"
            )
