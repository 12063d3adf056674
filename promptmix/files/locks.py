"""Locks between processes: a file that one of them holds, and that goes free with its process, however that ends."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["held", "holder"]

#: Errors of a file system that has no locks.
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)

_handles: set[int] = set()


def _forget_locks() -> None:
    """Close the locks' files in a forked worker, which may outlive this process by seconds and would hold them."""
    for handle in _handles:
        with contextlib.suppress(OSError):
            os.close(handle)
    _handles.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)


@contextlib.contextmanager
def held(lock: Path, *, wait: bool) -> Iterator[None]:
    """Hold ``lock``, which is removed afterwards; where the system has no such locks, nothing is held.

    Args:
        lock: a file; it and its folder are made.
        wait: until another process is done, instead of refusing.

    Raises:
        BlockingIOError: another process holds it, and ``wait`` is False.
        OSError: it can't be made, or is a link.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = None
    try:
        handle = _locked(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    if handle is None:
        yield
        return
    _handles.add(handle)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        _handles.discard(handle)
        os.close(handle)


def holder(lock: Path) -> str:
    """Say in brackets which process holds ``lock``; "" where that is not known."""
    with contextlib.suppress(OSError, ValueError):
        return f" (pid {int(lock.read_text())})"
    return ""


def _locked(lock: Path, how: int) -> int:
    """Return the handle of ``lock``, which this process now holds."""
    import fcntl

    vanished = 0
    while True:
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:
            # Another process removed the folder, which was empty; where it happens again and again, nothing can be made there.
            vanished += 1
            if vanished > 100:
                raise
            continue
        try:
            fcntl.flock(handle, how)
            if lock.exists() and os.path.samestat(os.fstat(handle), lock.stat()):
                if os.fstat(handle).st_nlink > 1:
                    raise OSError(errno.EMLINK, f"{lock} is the same file as another elsewhere")
                os.ftruncate(handle, 0)
                os.write(handle, f"{os.getpid()}\n".encode())
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # the one before us removed the file that we waited for
