"""Trained prompts as folders that people exchange: learned tensors, the run's record without its machine, a card, and digests.

    NAME/
      hub.json                          format, and the SHA-256 of every other file
      results.json                      what was run and what came out; no paths, no command line
      README.md                         the card
      <model>/model.safetensors, .json  learned tensors
      calibration.json                  where the run has one: the temperature of its probabilities

Such a folder is a run's output folder to every command (`predict`, `interpret`, `--model-dir`), by its path or as ``hub:NAME``
below a folder of the user's, where ``add`` puts one that somebody gave. Nothing is fetched from anywhere: how folders
travel is up to their owners.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from promptmix.config.declare import shown
from promptmix.engine import convert
from promptmix.engine.run_folder import PROGRESS_FILE
from promptmix.errors import CheckpointError, DataError, UserError
from promptmix.files.sums import file_digest
from promptmix.files.text import parse_json
from promptmix.registry import closest
from promptmix.runs import calibration, results
from promptmix.runs.card import card_of
from promptmix.runs.results import RunResult
from promptmix.utils import read_text, write_json

__all__ = ["NOTE", "add", "check", "entries", "hub_folder", "pack", "place_of"]

NOTE = "hub.json"
SCHEME = "hub:"
FORMAT = 1
_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")
#: Places of the machine where a run was made, and what its record says in their stead.
_PLACES = ("OUTPUT_DIR", "RESUME", "DATASET.ROOT", "MODEL.INIT_WEIGHTS", "INPUT.FEATURE_CACHE_DIR")
#: What else the record says; a field that is not named here stays at home.
_TOLD = (
    *("trainer", "dataset", "backbone", "subsample_classes", "source_domains", "target_domains", "shots", "seed", "metrics"),
    *("versions", "commit", "started", "finished", "seconds", "peak_memory_mb", "learned_parameters", "step_gflops", "league"),
    *("vocabulary", "protocol", "part", "title", "variant", "trained_on"),
)
#: What else than folders of models commands read of a run.
_READ = (calibration.FILE, results.CONFIG_NAME, PROGRESS_FILE)
_FILES = ("MODEL.BACKBONE.WEIGHTS", "MODEL.BACKBONE.TOKENIZER", "DATASET.DESCRIPTIONS")


def hub_folder(chosen: str = "") -> Path:
    """Return the user's folder of trained prompts: ``chosen``, or ``PROMPTMIX_HUB``, or a folder among the user's data."""
    own = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(os.path.expanduser(chosen or os.environ.get("PROMPTMIX_HUB") or Path(own, "promptmix", "hub")))


def place_of(run: str | Path) -> Path:
    """Return the folder that ``run`` names, a path or ``hub:NAME``; a folder made by ``pack`` is checked.

    Raises:
        DataError: there is no such name, or a file of the folder is not what was packed.
    """
    text = str(run)
    folder = Path(run) if not text.startswith(SCHEME) else _named(text.removeprefix(SCHEME), hub_folder())
    if (folder / NOTE).is_file():
        check(folder)
    return folder


def _named(name: str, hub: Path) -> Path:
    folder = hub / _checked(name)
    if not (folder / NOTE).is_file() or not folder.resolve().is_relative_to(hub.resolve()):
        known = [entry for entry, _ in entries(hub)]
        there = f"there are: {', '.join(known)}" if known else "it holds none; `promptmix hub add FOLDER` puts one there"
        raise DataError(f"{SCHEME}{name}: no such prompts in {hub}{closest(name, known)} ({there})")
    return folder


def _checked(name: str) -> str:
    """Return a name of the hub: one part, or an owner's and its own.

    Raises:
        UserError: it is none, and so might lead elsewhere.
    """
    parts = name.split("/")
    if not 1 <= len(parts) <= 2 or not all(_PART.fullmatch(part) for part in parts):
        raise UserError(f"the name {name!r} must be NAME or OWNER/NAME, of letters, digits, dots, hyphens and underscores")
    return name


def pack(run: str | Path, name: str, hub: Path, epoch: int | None = None, licence: str = "") -> Path:
    """Make a folder of a finished run that can be given to others.

    Args:
        run: output folder of a run that trained.
        name: ``NAME`` or ``OWNER/NAME``.
        hub: folder that it is put into.
        epoch: which checkpoint; None = the one that the run was tested with.
        licence: of the learned tensors, for the card; "" = the card says that none is stated.

    Returns:
        The folder; it is there whole or not at all.

    Raises:
        UserError: the run is not a training of ours, the name is taken, or it can't be written.
    """
    source, target = Path(run), hub / _checked(name)
    if not (source / results.FILE_NAME).is_file():
        raise DataError(f"no {source / results.FILE_NAME}; name the output folder of a run that finished")
    record = results.load(source / results.FILE_NAME)
    if record.checkpoint is not None:
        raise UserError(f"{source} evaluated the prompts of {record.checkpoint.get('directory')}; pack that run")
    if target.exists():
        raise UserError(f"{target} is there already; choose another --as NAME, or remove it")
    learned = convert.read(source, epoch, record.trainer, record.trainer)
    if not any(learned.models.values()):
        raise CheckpointError(f"{source} learned nothing that could be packed")
    if not learned.sealed:
        raise CheckpointError(
            f"{learned.source}: a checkpoint has no digest, so nothing says that it is what this run learned; "
            "pack a run that this promptmix trained"
        )
    clean = _without_machine(record)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent) as scratch:
            made = Path(scratch, "made")
            convert.write_ours(learned, made)
            clean.save(made)
            measured = calibration.read(source)
            if measured is not None and measured.epoch == epoch:
                write_json(asdict(measured) | {"epoch": None}, made / calibration.FILE)  # one checkpoint is there, the one tested
            text = card_of([clean], name=name, licence=licence, epoch=learned.epoch)
            (made / "README.md").write_text(text, encoding="utf-8")
            files = {path.relative_to(made).as_posix(): file_digest(path) for path in sorted(made.rglob("*")) if path.is_file()}
            note = {"format": FORMAT, "name": name, "trainer": record.trainer, "backbone": record.backbone, "files": files}
            (made / NOTE).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
            made.rename(target)
    except OSError as error:
        raise UserError(f"{target} can't be written: {error.strerror or error}; choose another --hub") from error
    return target


def add(folder: str | Path, name: str, hub: Path) -> tuple[Path, str]:
    """Copy a packed folder that somebody gave into the hub: the files that its note names, and nothing else that lies there.

    Args:
        folder: what ``pack`` made, wherever it is now.
        name: ``NAME`` or ``OWNER/NAME``; "" = the one that it was packed with.
        hub: folder that it is put into.

    Returns:
        The copy, which is there whole or not at all, and its name.

    Raises:
        UserError: it isn't as it was packed, the name is taken, or it can't be written.
    """
    source = Path(folder)
    if source.is_file():
        raise DataError(f"{source} is a file; unpack it, and name the folder that holds {NOTE}")
    note = check(source)
    own = _checked(name or str(note.get("name", "")))
    target = hub / own
    if target.exists():
        raise UserError(f"{target} is there already; choose another name by --as NAME, or remove it")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent) as scratch:
            made = Path(scratch, "made")
            for file in (NOTE, *note["files"]):
                (made / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / file, made / file)
            check(made)  # what was copied, should the source have changed meanwhile
            made.rename(target)
    except OSError as error:
        raise UserError(f"{target} can't be written: {error.strerror or error}; choose another --hub") from error
    return target, own


def _without_machine(record: RunResult) -> RunResult:
    """Return a record that says nothing of the machine it was made on: no folder, no command line, no file's place."""
    config = json.loads(json.dumps(record.config))
    for key in (*_PLACES, *_FILES):
        *nodes, leaf = key.split(".")
        node: Any = config
        for part in nodes:
            node = node.get(part, {}) if isinstance(node, dict) else {}
        if isinstance(node, dict) and node.get(leaf):
            node[leaf] = "" if key in _PLACES else Path(str(node[leaf])).name
    kept = {key: who if who.startswith("configs/") or "/" not in who else "a file" for key, who in record.config_sources.items()}
    said = [line if "/" not in line else line.partition(":")[0] for line in record.approximations]
    told = {name: getattr(record, name) for name in _TOLD}
    return RunResult(**told, config=config, config_sources=kept, approximations=said)


def check(folder: Path) -> dict[str, Any]:
    """Return the note of a packed folder whose files are what was packed.

    Raises:
        DataError: one is missing, changed, or was not packed; or the note can't be read.
    """
    path = folder / NOTE
    if not path.is_file():
        raise DataError(f"{folder} holds no {NOTE}; name a folder that `promptmix hub pack` made, or {SCHEME}NAME")
    remedy = "get the folder again from who gave it to you"
    try:
        note = parse_json(read_text(path, most=2**20))
        if type(note["format"]) is not int:
            raise TypeError("format is a number")
        files, newer = dict(note["files"].items()), note["format"] > FORMAT
        if not newer and not all(isinstance(note[name], str) for name in ("trainer", "backbone")):
            raise TypeError("trainer and backbone are names")
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise DataError(f"{path} is not a note of packed prompts ({type(error).__name__}: {error}); {remedy}") from error
    if newer:
        raise DataError(f"{path} has format {note['format']}, this promptmix reads up to {FORMAT}; upgrade it")
    for name, digest in files.items():
        problem = _problem_of(folder, name, digest)
        if problem:
            raise DataError(f"{path} names {shown(name)}, which {problem}; {remedy}")
    # Whatever a command would read of a run: tensors of any name, a config that comes before the record's, a training to go on.
    there = [file for part in ("*/*", *_READ) for file in folder.glob(part) if not file.is_dir()]
    strange = [file for file in there if file.relative_to(folder).as_posix() not in files]
    if strange or results.FILE_NAME not in files:
        what = f"{strange[0]} was not packed" if strange else f"{path} lacks {results.FILE_NAME}"
        raise DataError(f"{what}; {remedy}")
    return dict(note)


def _problem_of(folder: Path, name: str, digest: object) -> str:
    """Return what is wrong with a file of a packed folder, "" for nothing."""
    file = folder / name
    try:
        if not file.resolve().is_relative_to(folder.resolve()):
            return "leads out of its folder"
        as_packed = file.is_file() and file_digest(file) == digest
    except (OSError, ValueError, RuntimeError) as error:  # too long, with NUL, or a link to itself
        return f"can't be read ({error})"
    return "" if as_packed else "is missing or not what was packed (another SHA-256)"


def entries(hub: Path) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Yield name and note of every packed folder in the hub; None for one that is damaged."""
    for path in sorted([*hub.glob(f"*/{NOTE}"), *hub.glob(f"*/*/{NOTE}")]):
        folder = path.parent
        if any(part.startswith(".") for part in folder.relative_to(hub).parts):
            continue
        try:
            yield folder.relative_to(hub).as_posix(), check(folder)
        except DataError:
            yield folder.relative_to(hub).as_posix(), None
