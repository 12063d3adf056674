"""How the jobs of a sweep run, and one place where: processes on this machine; ``clusters`` has the others.

Each backend takes jobs and yields (index, outcome) as they end, in whatever order. What a job leaves behind is its results
tree, which is all that a later sweep looks at.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing import connection, forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from promptmix.errors import UserError, words_of
from promptmix.files.links import open_own
from promptmix.files.text import counted
from promptmix.parallel import launch
from promptmix.runs.protocols import Job

if TYPE_CHECKING:
    from promptmix.data.features.reuse import Reuse

#: Imported once by the process that local jobs are forked from: a job then starts in a fraction of a second.
_PRELOAD = ["torch.utils.tensorboard", "promptmix.runs.execute", "promptmix.runs.warm"]


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        error: one line, where it failed.
        numbers: accuracy of each part, in percent.
        seconds: how long it took.
        reuse: what the cache of features did.
    """

    error: str = ""
    numbers: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    reuse: Reuse | None = None


@dataclass(frozen=True)
class Options:
    """How jobs are spread.

    Attributes:
        jobs: how many run at a time.
        threads: CPU threads of each process.
        gpus: GPUs of this machine to spread local jobs over; 0 = none.
        address: of a Ray cluster; "" starts Ray on this machine.
        slurm: parameters of submitit's executor (``timeout_min``, ``slurm_partition``, ...).
        folder: where a backend keeps its own files.
        command: command line, kept in every ``results.json``.
        share: of a GPU that each process of a job asks for, on Ray and Slurm; None = one where the jobs may use it.
        devices: processes that each job is divided into (``promptmix.parallel``), each with a GPU of its own where there are any.
    """

    jobs: int = 1
    threads: int = 1
    gpus: int = 0
    address: str = ""
    slurm: dict[str, Any] = field(default_factory=dict)
    folder: str = "."
    command: tuple[str, ...] = ()
    share: float | None = None
    devices: int = 1


Started = Callable[[int], None]
#: Runs jobs; a generator, so that closing it ends what still runs.
Backend = Callable[[Sequence[Job], Options, Started], Generator[tuple[int, Outcome], None, None]]


def share_of(jobs: Sequence[Job], options: Options) -> float:
    """Return how much of a GPU each job asks for."""
    may = 0.0 if all(job.device == "cpu" for job in jobs) else 1.0
    return options.devices * (may if options.share is None else options.share)


def cpus() -> int:
    """Return the number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def perform(job: Job, options: Options, directory: str = "") -> Outcome:
    """Run one job from a queue that gave this process what all processes of the job need, as ``local`` runs it.

    So a process that gets one job after another, as Ray's do, imports everything once and keeps nothing of any.

    Args:
        job: what to run.
        options: how.
        directory: folder that the job's relative paths start from; "" = the current one.
    """
    asks, visible = share_of([job], options) > 0, _visible()
    if asks and 0 < len(visible) < options.devices:
        return Outcome(f"--devices {options.devices}, but this task was given {counted(len(visible), 'GPU')}; ask for as many")
    os.chdir(directory or ".")
    alone = replace(options, jobs=1, gpus=options.devices if asks and options.devices > 1 else 0)
    ((_, outcome),) = local([job], alone, lambda _: None)
    return outcome


def work(job: Job, threads: int, command: Sequence[str] = (), divided: bool = False) -> Outcome:
    """Run one job in this process; whatever goes wrong is in the outcome.

    Args:
        job: what to run.
        threads: CPU threads.
        command: command line, kept in ``results.json``.
        divided: this process is one of those that share the job (``launch.environment``).
    """
    import torch

    from promptmix.data.features.reuse import reused
    from promptmix.engine.precision import choose_device
    from promptmix.parallel import group
    from promptmix.runs.execute import execute

    begin, before = time.monotonic(), reused()
    try:
        torch.set_num_threads(threads)
        with group.joined(choose_device(job.device or "auto"), job.trainer) if divided else contextlib.nullcontext():
            parts = execute(job, command=command)
    except UserError as error:
        return Outcome(" ".join(str(error).split()), seconds=time.monotonic() - begin)
    except Exception as error:
        report = job.place / "error.txt"
        with contextlib.suppress(OSError):
            report.parent.mkdir(parents=True, exist_ok=True)
            with open_own(report) as file:
                file.write(traceback.format_exc())
        text = " ".join(f"{type(error).__name__}: {words_of(error)}".split())
        return Outcome(f"{text[:2000]} (traceback in {report})", seconds=time.monotonic() - begin)
    (job.place / "error.txt").unlink(missing_ok=True)
    numbers = {
        Path(run.config["OUTPUT_DIR"]).name: run.metrics.get(run.config["TEST"]["SPLIT"], {}).get("accuracy", float("nan"))
        for run in parts
    }
    return Outcome(numbers=numbers, seconds=time.monotonic() - begin, reuse=reused() - before)


# What shares features


def _data(job: Job) -> tuple[str, str]:
    """Return what jobs have in common that read the same pictures."""
    return job.dataset, job.root


def _kind(job: Job) -> tuple[object, ...]:
    """Return what jobs have in common that take about as long."""
    return job.protocol, job.trainer, job.variant, job.shots, *_data(job)


class Turns:
    """Which job starts next: of a kind that nobody has tried, else the longest, and none that would wait for another's features.

    So a mistake in any method shows early, and no long job begins last, while the other places stand idle.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs = jobs
        self._waiting = list(range(len(jobs)))
        self._seconds: dict[tuple[object, ...], float] = {}
        self._made, self._led = set[tuple[str, str]](), set[tuple[str, str]]()

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def take(self) -> int:
        """Return a job that waits, and have it wait no longer."""
        ready = [index for index in self._waiting if _data(self._jobs[index]) not in self._led]
        # Where all would wait for features, the last is the least like those that make them.
        index = max(ready or self._waiting[-1:], key=lambda one: self._seconds.get(_kind(self._jobs[one]), float("inf")))
        self._waiting.remove(index)
        self._led |= {_data(self._jobs[index])} - self._made
        self._seconds.setdefault(_kind(self._jobs[index]), 0.0)
        return index

    def ended(self, index: int, outcome: Outcome) -> None:
        """Note that a job has ended."""
        job = self._jobs[index]
        self._made.add(_data(job))
        self._led -= self._made
        encoding = 0.0 if outcome.reuse is None else outcome.reuse.seconds
        self._seconds[_kind(job)] = max(outcome.seconds - encoding, 0.0)


def leaders_first(jobs: Sequence[Job]) -> list[int]:
    """Return the order for a queue: the first job of each data set, which makes features, then the others."""
    first = {_data(job): index for index, job in reversed(list(enumerate(jobs)))}
    return sorted(range(len(jobs)), key=lambda index: first[_data(jobs[index])] != index)


# This machine


def begin(threads: int) -> None:
    """Start the process that local jobs are forked from, so that it imports what they need beside what this one imports."""
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    if _context().get_start_method() == "forkserver":
        forkserver.ensure_running()


@dataclass
class _Running:
    index: int
    slot: int
    processes: list[BaseProcess] = field(default_factory=list)
    receivers: list[connection.Connection] = field(default_factory=list)
    #: Those that have not ended.
    left: list[BaseProcess] = field(default_factory=list)
    #: Ends those that go on after another one has failed, and who they were.
    timer: threading.Timer | None = None
    late: list[BaseProcess] = field(default_factory=list)


def local(jobs: Sequence[Job], options: Options, started: Started) -> Generator[tuple[int, Outcome], None, None]:
    """Run each job in processes of its own, so that a crash takes one job and not the sweep; they end when the driver dies."""
    begin(options.threads)
    turns, running, free = Turns(jobs), dict[Any, _Running](), deque(range(options.jobs))
    with tempfile.TemporaryDirectory(prefix="promptmix-") as folder:
        try:
            while turns or running:
                while turns and free:
                    index = turns.take()
                    one = _Running(index, free.popleft())
                    for rank in range(options.devices):
                        running[_begin(one, jobs[index], options, rank, folder)] = one
                    started(index)
                for sentinel in connection.wait(list(running)):
                    one = running.pop(sentinel)
                    if _goes_on(one, sentinel):
                        continue
                    free.append(one.slot)
                    outcome = _received(one)
                    turns.ended(one.index, outcome)
                    yield one.index, outcome
        finally:
            left = [process for one in running.values() for process in one.left]
            for process in left:
                process.terminate()
            for process in left:
                process.join(launch.GRACE)
                process.kill()  # one that was stopped takes no other signal
                process.join()


def _begin(one: _Running, job: Job, options: Options, rank: int, folder: str) -> Any:
    """Start one of a job's processes, and return what tells of its end."""
    context = _context()
    alone = options.devices == 1
    environ = dict(os.environ) if alone else launch.environment(rank, options.devices, Path(folder, str(one.index)))
    if options.gpus:  # CUDA starts later
        place = (one.slot * options.devices + rank) % options.gpus
        environ["CUDA_VISIBLE_DEVICES"] = (_visible() or [str(gpu) for gpu in range(options.gpus)])[place]
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(job, options, rank, environ, sender))
    process.start()
    sender.close()
    one.processes.append(process)
    one.left.append(process)
    one.receivers.append(receiver)
    return process.sentinel


def _visible() -> list[str]:
    """Return the GPUs that this process was given, if somebody said which."""
    return [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]


def _goes_on(one: _Running, sentinel: Any) -> bool:
    """Tell whether processes of a job still run after one has ended; once one has failed, the others get some seconds."""
    ended = next(process for process in one.left if process.sentinel == sentinel)
    ended.join()
    one.left.remove(ended)
    if one.left and one.timer is None and ended.exitcode:
        one.timer = threading.Timer(launch.GRACE, _end_late, [one])
        one.timer.daemon = True
        one.timer.start()
    if not one.left and one.timer is not None:
        one.timer.cancel()
    return bool(one.left)


def _end_late(one: _Running) -> None:
    one.late = list(one.left)
    for process in one.late:
        process.kill()


def _context() -> Any:  # multiprocessing's contexts share no useful type
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


def _child(job: Job, options: Options, rank: int, environ: dict[str, str], sender: connection.Connection) -> None:
    """Run a job, or its part of one, in a process of its own and send the outcome."""
    be_fresh(environ)
    multiprocessing.set_start_method(None, force=True)  # workers that read pictures start as usual, not through another server
    gc.freeze()  # what was imported before the fork stays shared, and no collection walks through it
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the driver, which ends its jobs
    threading.Thread(target=_follow_parent, daemon=True).start()
    # What a run prints is in its log; what libraries print around it, or while they crash, is kept beside it.
    console = job.place / (f"console{rank + 1}.txt" if rank else "console.txt")
    try:
        console.parent.mkdir(parents=True, exist_ok=True)
        with open_own(console) as file:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
    except OSError as error:
        sender.send(Outcome(f"{console}: {error.strerror or error}; make room, or choose another folder"))
        sys.exit(1)
    outcome = work(job, options.threads, options.command, divided=options.devices > 1)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if not outcome.error:
        console.unlink(missing_ok=True)
    sender.send(outcome)
    sender.close()
    sys.exit(1 if outcome.error else 0)


def be_fresh(environ: dict[str, str]) -> None:
    """Make a forked process what a new one would be: the driver's environment, and random numbers that no other job has.

    Python draws anew by itself after a fork, and torch begins with the same number in every process.
    """
    import numpy as np

    os.environ.clear()
    os.environ.update(environ)
    np.random.seed()


def _follow_parent() -> None:
    """End this process when the driver ends, however that happens."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _received(one: _Running) -> Outcome:
    """Return how a job ended: what its first process says, or else what another one met, or which was killed."""
    said = [found for found in map(_said, one.receivers) if found is not None]
    codes = [None if process in one.late else process.exitcode for process in one.processes]
    if said:
        return said[0] if codes[0] == 0 else next((outcome for outcome in said if outcome.error), said[0])
    if len(codes) > 1:
        return Outcome(launch.lost(codes))
    code = codes[0] or 0
    how = launch.killed_by(-code) if code < 0 else f"exited with {code}"
    return Outcome(f"its process {how}; see console.txt in its folder")


def _said(receiver: connection.Connection) -> Outcome | None:
    with receiver, contextlib.suppress(EOFError):
        outcome: Outcome = receiver.recv()
        return outcome
    return None
