"""Ctrl-C, SIGTERM, which Slurm sends before it kills, and SIGHUP of a closed terminal: one line, and a code that says "again".

A signal raises ``Stopped`` wherever the main thread is, except in loops that ask ``check()`` themselves. There an error in the
wrong line would be dropped (in a finaliser) or leave a lock held that the end then waits for (in a queue to another thread), so
that it comes with the next ``check()``, or after some seconds without one. Nothing has to be saved then: what a run writes is
whole at any moment.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

__all__ = ["Stopped", "check", "end_workers", "listening", "received", "stopping", "take_back"]

#: After a process was stopped, more signals are taken for the same one this long, in seconds: a whole group gets several.
_SAME = 1.0
#: What Python does where nobody says otherwise. SIGHUP comes where the terminal goes away; Windows has none.
_USUAL: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
if hasattr(signal, "SIGHUP"):
    _USUAL[signal.SIGHUP] = signal.SIG_DFL
#: Seconds that a loop may take to its next ``check()``.
_PATIENCE = 5.0


class Stopped(KeyboardInterrupt):
    """The process was asked to end.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class _State:
    """The first signal that came (0 = none), when the main thread was stopped by it, and how many loops ask for it."""

    number = 0
    stopped = 0.0
    listening = 0
    timer: threading.Timer | None = None


def _on_signal(number: int, _frame: FrameType | None) -> None:
    first = not _State.number
    _State.number = _State.number or number
    if _State.stopped:
        if time.monotonic() - _State.stopped > _SAME:
            os._exit(128 + number)  # the user insists, or tidying up hangs
    elif not _State.listening or (_State.timer is not None and _State.timer.finished.is_set()):
        _stop()
    elif first:
        _State.timer = threading.Timer(_PATIENCE, os.kill, (os.getpid(), number))
        _State.timer.daemon = True
        _State.timer.start()


def _stop() -> None:
    _State.stopped = time.monotonic()
    if _State.timer is not None:
        _State.timer.cancel()
    raise Stopped(_State.number)


def _reset() -> None:
    if _State.timer is not None:
        _State.timer.cancel()
    _State.number, _State.stopped, _State.timer = 0, 0.0, None


@contextlib.contextmanager
def stopping() -> Iterator[None]:
    """Have signals that ask a process to end raise ``Stopped`` inside the context, where it would otherwise end at once.

    A process that ignores one of them goes on doing so, as jobs in the background do.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours = [number for number, handler in _USUAL.items() if signal.getsignal(number) is handler]
    _reset()
    for number in ours:
        signal.signal(number, _on_signal)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, _USUAL[number])
        _reset()


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Leave it to ``check()`` inside the context when a signal stops the main thread."""
    _State.listening += 1
    try:
        yield
    finally:
        _State.listening -= 1


def take_back() -> None:
    """Have what Python was told to do at a signal done again, after a library told the system otherwise."""
    if threading.current_thread() is threading.main_thread():
        for number in _USUAL:
            if (handler := signal.getsignal(number)) is not None:
                signal.signal(number, handler)


def received(wait: float = 0.0) -> int:
    """Return the signal that came, 0 for none, after ``wait`` seconds at most."""
    end = time.monotonic() + wait
    while not _State.number and time.monotonic() < end:
        time.sleep(0.01)
    return _State.number


def end_workers() -> None:
    """End the processes that this one started: each would be waited for otherwise, for seconds."""
    from multiprocessing import active_children

    for child in active_children():
        child.terminate()


def check() -> None:
    """Stop here, if a signal came.

    Raises:
        Stopped: one did.
    """
    if _State.number and not _State.stopped:
        _stop()


def _in_worker() -> None:
    """Let a forked worker end as it would without us."""
    for number, handler in _USUAL.items():
        if signal.getsignal(number) is _on_signal:
            signal.signal(number, handler)
    _State.number, _State.stopped, _State.timer = 0, 0.0, None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_worker)
