"""Opening files of our own in folders that others may fill: a link there is never followed to another file."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import TextIO

__all__ = ["open_own"]


def open_own(path: str | os.PathLike[str], append: bool = False, buffering: int = -1) -> TextIO:
    """Open a text file for writing, made where missing, without following a link in its place.

    Args:
        path: the file (logs, locks); links above it are the user's own.
        append: keep what is there.
        buffering: as for ``open``.

    Raises:
        OSError: it is a link, another name of a file that lies elsewhere too, or no regular file; or it can't be written.
    """
    name = Path(path).name

    def opener(given: str, _: int) -> int:
        # Without blocking, a named pipe is told at once from a file instead of waiting for its reader.
        extra = sum(getattr(os, flag, 0) for flag in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC"))
        try:
            if os.path.islink(given):  # where the system has no such flag
                raise OSError(errno.ELOOP, "")
            handle = os.open(given, os.O_WRONLY | os.O_CREAT | extra | (os.O_APPEND if append else 0), 0o666)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO):
                raise OSError(error.errno, f"{name} is a link or no file; remove it", given) from error
            raise
        state = os.fstat(handle)
        if not stat.S_ISREG(state.st_mode) or state.st_nlink > 1:
            os.close(handle)
            raise OSError(errno.EMLINK, f"{name} is not a file, or the same file as another elsewhere; remove it", given)
        if not append:
            os.ftruncate(handle, 0)
        return handle

    return open(path, "a" if append else "w", encoding="utf-8", buffering=buffering, opener=opener)
