"""The output folder of a run: which checkpoint is meant, what it was made with, and who works in it. Answered here only."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from promptmix.errors import CheckpointError, UserError
from promptmix.files.locks import held, holder
from promptmix.utils import atomic_write

__all__ = ["BEST_FILE", "EXPORT_FILE", "EXPORT_NOTE", "LAST_FILE", "PROGRESS_FILE", "RunFolder", "shorten", "what_is_there"]

#: The text file that names the checkpoint written last.
LAST_FILE = "checkpoint"
BEST_FILE = "model-best.pth.tar"
#: A model as `promptmix convert` writes it: tensors, and what else is known of them.
EXPORT_FILE, EXPORT_NOTE = "model.safetensors", "model.json"
#: Everything that a training needs to go on as if nothing had happened; there until the run has its results.
PROGRESS_FILE = "progress.pth"


class RunFolder:
    """A run's output folder, with a folder for each model that the run learned.

    Args:
        path: the folder; it need not exist yet.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    @property
    def progress(self) -> Path:
        """The file that an interrupted training goes on from."""
        return self.path / PROGRESS_FILE

    def models(self) -> list[str]:
        """Return the names of the models with checkpoints here."""
        if not self.path.is_dir():
            return []
        folders = [entry for entry in sorted(self.path.iterdir()) if entry.is_dir()]
        return [f.name for f in folders if (f / EXPORT_NOTE).is_file() or any(f.glob("*.pth.tar*")) or (f / LAST_FILE).is_file()]

    def can_resume(self, names: list[str]) -> bool:
        """Tell whether every model of ``names`` (one at least) has a checkpoint that was noted as its last."""
        return bool(names) and all((self.path / name / LAST_FILE).is_file() for name in names)

    def has_trained(self) -> bool:
        """Tell whether a training left something here to go on from."""
        return self.progress.is_file() or any(self.path.glob(f"*/{LAST_FILE}"))

    def checkpoint(self, name: str, epoch: int | None = None) -> Path:
        """Return the file of one model: the checkpoint of ``epoch``, else the best one, else the one written last.

        Runs that keep their best model (``TEST.FINAL_MODEL best_val``) are tested with it, the others with their last, so that
        without an epoch this is the one that the run was tested with.

        Raises:
            CheckpointError: there is none, or it can't be told which; the message lists what there is.
        """
        folder = self.path / name
        if epoch is not None:
            return self._existing(folder / f"model.pth.tar-{epoch}")
        best = self.best(name)
        if best is not None:
            return best
        if (folder / EXPORT_NOTE).is_file():
            return folder / EXPORT_FILE
        if (folder / LAST_FILE).is_file():
            return self._existing(self.last(name))
        there = sorted(folder.glob("*.pth.tar*"))
        if len(there) > 1:
            raise CheckpointError(f"{folder} holds {shorten([path.name for path in there])}; say which with --load-epoch N")
        return there[0] if there else self._existing(folder / BEST_FILE)

    def best(self, name: str) -> Path | None:
        """Return the checkpoint of a model with the best validation result, if there is one."""
        path = self.path / name / BEST_FILE
        return path if path.is_file() else None

    def take_best(self, other: RunFolder, name: str) -> None:
        """Copy the best checkpoint of a model from another run's folder, if it has one."""
        best = other.best(name)
        if best is not None and os.path.realpath(best) != os.path.realpath(self.path / name / BEST_FILE):
            atomic_write(self.path / name / BEST_FILE, lambda temporary: shutil.copy(best, temporary))

    def last(self, name: str) -> Path:
        """Return the path that a model's ``checkpoint`` file names, which must lie in the same folder.

        Raises:
            CheckpointError: there is no such file, or it names nothing there.
        """
        folder = self.path / name
        note = folder / LAST_FILE
        if not note.is_file():
            raise CheckpointError(f"no file {note} that names the last checkpoint; {what_is_there(folder)}")
        lines = note.read_text(encoding="utf-8", errors="replace").splitlines()
        file = lines[0].strip() if lines else ""
        path = folder / file
        named = bool(file) and "\0" not in file
        # pathlib raises at a circle of links
        if not named or os.path.dirname(os.path.realpath(path)) != os.path.realpath(folder):
            raise CheckpointError(f"{note} names {file!r}, but must name a file in its own folder; write such a name there")
        return path

    @staticmethod
    def _existing(path: Path) -> Path:
        if not path.is_file() and not (path.parent / EXPORT_NOTE).is_file():
            raise CheckpointError(f"no checkpoint {path}; {what_is_there(path.parent)}")
        return path

    def refuse_unclaimed(self, names: list[str]) -> None:
        """Refuse to leave learned tensors behind without a word.

        Args:
            names: the models that will be loaded.

        Raises:
            CheckpointError: another model has checkpoints here.
        """
        left = [name for name in self.models() if name not in names]
        if left:
            raise CheckpointError(
                f"{self.path} also holds learned tensors of {', '.join(left)}, which this config has no model for "
                f"(it has: {', '.join(names) or 'none'}); use the settings that the run was trained with"
            )

    # Who works here

    def drop_progress(self) -> None:
        """Remove what an interrupted training would go on from: it has ended."""
        self.progress.unlink(missing_ok=True)

    def refuse_links(self) -> None:
        """Refuse to write through links: what looks like a folder of this run may be another one elsewhere.

        Raises:
            UserError: there is one.
        """
        for entry in self.path.glob("*"):
            if entry.is_symlink() and not entry.is_file():
                raise UserError(
                    f"{entry} is a link to another folder, and a run writes into its own only; "
                    "remove the link, or choose another --output-dir"
                )

    def tidy(self) -> None:
        """Remove half-written files that a killed run left; only for who is ``alone`` here."""
        for folder in (self.path, *(entry for entry in self.path.glob("*") if entry.is_dir() and not entry.is_symlink())):
            for left in folder.glob(".*.tmp"):
                if left.is_dir() and not left.is_symlink():
                    shutil.rmtree(left, ignore_errors=True)

    @contextlib.contextmanager
    def alone(self, wait: bool = False) -> Iterator[None]:
        """Hold the folder for this process; the lock goes with the process, however that ends.

        The lock is a file beside the folder, since the folder may not be there yet. Where the system has no such locks, nothing
        is held.

        Args:
            wait: until another process is done, instead of refusing.

        Raises:
            UserError: another process works there, or the lock can't be made.
        """
        target = Path(os.path.abspath(self.path))
        inside = target.is_dir() and not os.access(target.parent, os.W_OK)
        lock = target / ".lock" if inside else target.with_name(f".{target.name}.lock")
        made = [path for path in lock.parents if not path.exists()]
        with contextlib.ExitStack() as stack:
            stack.callback(_remove_empty, made)
            try:
                stack.enter_context(held(lock, wait=wait))
            except BlockingIOError as error:
                raise UserError(
                    f"OUTPUT_DIR {self.path} is in use by another process{holder(lock)}; "
                    "wait until it has ended, or choose another --output-dir"
                ) from error
            except OSError as error:
                what = f"{lock} is a link" if error.errno == errno.ELOOP else error.strerror or error
                raise UserError(f"OUTPUT_DIR {self.path}: {what}; choose another --output-dir") from error
            yield


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):  # not empty
            folder.rmdir()


def what_is_there(folder: Path) -> str:
    """Say in a clause what a folder holds."""
    if not folder.is_dir():
        return f"there is no folder {folder} either; check the directory given"
    names = sorted(entry.name for entry in folder.iterdir())
    return f"the folder holds {shorten(names)}" if names else "the folder is empty"


def shorten(names: list[Any], most: int = 6) -> str:
    """Return the first names of a list in words."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more
