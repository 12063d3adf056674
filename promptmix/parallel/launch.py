"""``--devices N``: starts one process for each device and follows them; what one of them must know of its place (no torch here).

A process is told its place by the variables of ``torchrun``, which may start the processes as well.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from promptmix.errors import ConfigError, TrainingError

#: Set for the processes that ``start`` started: the file where they meet.
_OURS = "PROMPTMIX_MEETING"
#: Behind what is wrong with the variables of ``torchrun``.
_REMEDY = "; start the command with torchrun or --devices, or unset WORLD_SIZE"
#: Exit code of a process that saw another one go: who that was is told by ``start``.
_LEFT = 75
#: Seconds that the others get to end by themselves once one of them has failed.
GRACE = 15.0


def place() -> tuple[int, int]:
    """Return this process's rank, counted from 0, and the number of processes."""
    try:
        rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except (KeyError, ValueError):
        return 0, 1
    started = _OURS in os.environ or "MASTER_ADDR" in os.environ
    return (rank, count) if started and count > 1 and 0 <= rank < count else (0, 1)


def refuse_wrong_place() -> None:
    """Refuse variables of ``torchrun`` of which some are missing or wrong, before the processes wait for each other.

    Raises:
        ConfigError: one is; the message names it.
    """
    if _OURS in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
        return
    count = _number("WORLD_SIZE", 1, 4096)
    _number("RANK", 0, count - 1)
    if "LOCAL_RANK" in os.environ:
        _number("LOCAL_RANK", 0, count - 1)
    _number("MASTER_PORT", 1, 65535)
    host = os.environ.get("MASTER_ADDR", "")
    try:
        socket.getaddrinfo(host or "-", None)
    except OSError as error:
        raise ConfigError(f"MASTER_ADDR is {host or 'not set'}, but must be a host that all processes reach{_REMEDY}") from error


def _number(name: str, least: int, most: int) -> int:
    text = os.environ.get(name, "")
    if text.isascii() and text.isdigit() and least <= int(text) <= most:
        return int(text)
    raise ConfigError(f"{name} is {text or 'not set'}, but must be from {least} to {most}{_REMEDY}")


def meeting_point() -> str:
    """Return where the processes find each other, as ``init_process_group`` takes it."""
    return f"file://{os.environ[_OURS]}" if _OURS in os.environ else "env://"


def patience() -> float:
    """Return how many seconds a process waits for the others before the training ends.

    Raises:
        ConfigError: ``PROMPTMIX_TIMEOUT`` is no such number.
    """
    given = os.environ.get("PROMPTMIX_TIMEOUT", "1800")
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds <= 1e6:
        raise ConfigError(f"PROMPTMIX_TIMEOUT is {given!r}, but must be seconds from 1 to a million; fix it, or leave it out")
    return seconds


def take_device() -> None:
    """Have this process see its own GPU only, before CUDA starts.

    Raises:
        ConfigError: ``CUDA_VISIBLE_DEVICES`` names fewer GPUs than this machine has processes.
    """
    rank, count = place()
    if count == 1:
        return
    local = int(os.environ.get("LOCAL_RANK", rank))
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = None if given is None else [name for name in given.split(",") if name.strip()]
    if names and local >= len(names):
        raise ConfigError(f"CUDA_VISIBLE_DEVICES names {len(names)} GPUs, but process {local + 1} needs one; lower --devices")
    if names != []:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(local) if names is None else names[local]


def take_gpu(device: str | None) -> str | None:
    """Have this process see the one GPU that ``cuda:N`` names, before CUDA starts; return the device without the number.

    Raises:
        ConfigError: there are fewer GPUs, or every process has its own.
    """
    kind, colon, number = (device or "").partition(":")
    if not colon:
        return device
    if place()[1] > 1:
        raise ConfigError(f"--device {device} beside --devices, which gives each process a GPU of its own; leave one out")
    names = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    if names and int(number) >= len(names):
        raise ConfigError(f"--device {device}: CUDA_VISIBLE_DEVICES names {len(names)} GPUs, counted from 0; lower the number")
    os.environ["CUDA_VISIBLE_DEVICES"] = names[int(number)] if names else number
    return kind


def leave_quietly() -> None:
    """End this process at once where ``start`` started it, which says in one line who was lost."""
    if _OURS in os.environ:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(_LEFT)


def environment(rank: int, count: int, meeting: Path) -> dict[str, str]:
    """Return the environment of one of ``count`` processes of this machine that meet in the file ``meeting``."""
    own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), _OURS: str(meeting)}
    # Each gets its share of the CPU, unless told otherwise; processes of one machine meet inside of it.
    usual = {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // count, 1))}
    if sys.platform == "linux":
        usual["GLOO_SOCKET_IFNAME"] = "lo"
    return {**usual, **os.environ, **own}


def start(count: int, argv: Sequence[str]) -> int:
    """Run ``promptmix`` with ``argv`` in ``count`` processes; the first one prints, of the others errors only.

    Returns:
        The exit code: that of the first process, unless another one failed.

    Raises:
        TrainingError: a process was killed; the message says which.
    """
    with tempfile.TemporaryDirectory(prefix="promptmix-") as folder, contextlib.ExitStack() as around:
        errors = [around.enter_context(open(Path(folder, f"{rank}.txt"), "w+b")) for rank in range(1, count)]
        workers: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(count):
                workers.append(_worker(rank, count, argv, folder, errors[rank - 1] if rank else None))
            with _passing_on(workers):
                codes = _follow(workers)
        finally:
            for worker in workers:
                if worker.poll() is None:
                    worker.kill()
                worker.wait()
        return _outcome(codes, errors)


def _worker(rank: int, count: int, argv: Sequence[str], folder: str, errors: IO[bytes] | None) -> subprocess.Popen[bytes]:
    out = None if errors is None else subprocess.DEVNULL
    command = [sys.executable, "-m", "promptmix", *argv]
    return subprocess.Popen(command, env=environment(rank, count, Path(folder, "meeting")), stdout=out, stderr=errors)


def _follow(workers: Sequence[subprocess.Popen[bytes]]) -> list[int | None]:
    """Wait for all; where one fails, the others get some seconds. Return the exit codes, None for who went on nevertheless."""
    end = float("inf")
    while any(worker.poll() is None for worker in workers) and time.monotonic() < end:
        if end == float("inf") and any(worker.poll() for worker in workers):
            end = time.monotonic() + GRACE
        time.sleep(0.05)
    return [worker.poll() for worker in workers]


@contextlib.contextmanager
def _passing_on(workers: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Pass SIGTERM and SIGINT on to the workers, whose first one says what that means."""

    def tell(number: int, _frame: object) -> None:
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(number)

    before = {number: signal.signal(number, tell) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _outcome(codes: Sequence[int | None], errors: Sequence[IO[bytes]]) -> int:
    """Return the exit code of the training; what a process other than the first has to say is printed, or raised."""
    if all(code == 0 for code in codes):
        return 0
    failed = [(rank, code) for rank, code in enumerate(codes) if code is not None and 0 < code != _LEFT]
    for rank, code in failed:
        if rank:
            errors[rank - 1].seek(0)
            said = errors[rank - 1].read().decode(errors="replace").strip().splitlines()
            sys.stderr.write(f"{said[-1] if said else f'promptmix: process {rank + 1} exited with {code}'}\n")
        return code
    raise TrainingError(f"{lost(codes)}, and the others were ended; the same command goes on from the last epoch")


def lost(codes: Sequence[int | None]) -> str:
    """Say which process ended a training: the first that was killed, or else one that did not leave by itself (None)."""
    killed = next((rank for rank, code in enumerate(codes) if code is not None and code < 0), None)
    if killed is None:
        silent = next((rank for rank, code in enumerate(codes) if code != _LEFT), 0)
        return f"process {silent + 1} of {len(codes)} did not answer"
    number = -(codes[killed] or 0)
    return f"process {killed + 1} of {len(codes)} {killed_by(number)}"


def killed_by(number: int) -> str:
    """Say by which signal a process was killed."""
    return f"was killed by signal {number}" + (" (out of memory?)" if number == signal.SIGKILL else "")
