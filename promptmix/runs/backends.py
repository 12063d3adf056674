"""Where the jobs of a sweep run: processes on this machine, Ray, or Slurm. None of them schedules anything cleverly.

Each backend takes jobs and yields (index, outcome) as they end, in whatever order. What a job leaves behind is its results
tree, which is all that a later sweep looks at.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection, forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from promptmix.console import signals
from promptmix.errors import UserError
from promptmix.files.links import open_own
from promptmix.hookspecs import hookimpl
from promptmix.registry import Registry
from promptmix.runs.protocols import Job

if TYPE_CHECKING:
    from promptmix.data.features.reuse import Reuse

#: Imported once by the process that local jobs are forked from: a job then starts in a fraction of a second.
_PRELOAD = ["torch.utils.tensorboard", "promptmix.runs.execute", "promptmix.runs.warm"]
_POLL_SECONDS = 2.0  # between two looks at Slurm's queue


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
        threads: CPU threads of each.
        gpus: GPUs of this machine to spread local jobs over; 0 = none.
        address: of a Ray cluster; "" starts Ray on this machine.
        slurm: parameters of submitit's executor (``timeout_min``, ``slurm_partition``, ...).
        folder: where a backend keeps its own files.
        command: command line, kept in every ``results.json``.
        share: of a GPU that each job asks for, on Ray and Slurm; None = one where the jobs may use it.
    """

    jobs: int = 1
    threads: int = 1
    gpus: int = 0
    address: str = ""
    slurm: dict[str, Any] = field(default_factory=dict)
    folder: str = "."
    command: tuple[str, ...] = ()
    share: float | None = None


Started = Callable[[int], None]
#: Runs jobs; a generator, so that closing it ends what still runs.
Backend = Callable[[Sequence[Job], Options, Started], Generator[tuple[int, Outcome], None, None]]


def share_of(jobs: Sequence[Job], options: Options) -> float:
    """Return how much of a GPU each job asks for."""
    if options.share is not None:
        return options.share
    return 0.0 if all(job.device == "cpu" for job in jobs) else 1.0


def cpus() -> int:
    """Return the number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def work(job: Job, threads: int, command: Sequence[str] = (), directory: str = "") -> Outcome:
    """Run one job in this process; whatever goes wrong is in the outcome.

    Args:
        job: what to run.
        threads: CPU threads.
        command: command line, kept in ``results.json``.
        directory: folder that the job's relative paths start from; "" = the current one.
    """
    import torch

    from promptmix.data.features.reuse import reused
    from promptmix.runs.execute import execute

    begin, before = time.monotonic(), reused()
    try:
        if directory:
            os.chdir(directory)
        torch.set_num_threads(threads)
        parts = execute(job, command=command)
    except UserError as error:
        return Outcome(" ".join(str(error).split()), seconds=time.monotonic() - begin)
    except Exception as error:
        report = job.place / "error.txt"
        with contextlib.suppress(OSError):
            report.parent.mkdir(parents=True, exist_ok=True)
            with open_own(report) as file:
                file.write(traceback.format_exc())
        text = " ".join(f"{type(error).__name__}: {error}".split())
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


def next_job(jobs: Sequence[Job], waiting: Sequence[int], led: Collection[tuple[str, str]]) -> int:
    """Return which waiting job to start: the first whose features no running job is the first to make, or else the first.

    Args:
        jobs: all jobs.
        waiting: indices of those that wait.
        led: data whose first job still runs; others would wait for its features.
    """
    return next((index for index in waiting if _data(jobs[index]) not in led), waiting[0])


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
    process: BaseProcess
    receiver: connection.Connection


def local(jobs: Sequence[Job], options: Options, started: Started) -> Generator[tuple[int, Outcome], None, None]:
    """Run each job in a process of its own, so that a crash takes one job and not the sweep; they end when the driver dies."""
    begin(options.threads)
    context = _context()
    waiting, running = deque(range(len(jobs))), dict[Any, _Running]()
    free = deque(range(options.jobs))
    led, ended = set[tuple[str, str]](), set[tuple[str, str]]()
    try:
        while waiting or running:
            while waiting and free:
                index, slot = next_job(jobs, waiting, led), free.popleft()
                waiting.remove(index)
                led |= {_data(jobs[index])} - ended
                gpu = slot % options.gpus if options.gpus else None
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_child, args=(jobs[index], options, gpu, dict(os.environ), sender))
                process.start()
                sender.close()
                running[process.sentinel] = _Running(index, slot, process, receiver)
                started(index)
            for sentinel in connection.wait(list(running)):
                one = running.pop(sentinel)
                free.append(one.slot)
                ended.add(_data(jobs[one.index]))
                led -= ended
                yield one.index, _received(one)
    finally:
        for one in running.values():
            one.process.terminate()
        for one in running.values():
            one.process.join()


def _context() -> Any:  # multiprocessing's contexts share no useful type
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


def _child(job: Job, options: Options, gpu: int | None, environ: dict[str, str], sender: connection.Connection) -> None:
    """Run a job in its own process and send its outcome."""
    be_fresh(environ)
    multiprocessing.set_start_method(None, force=True)  # workers that read pictures start as usual, not through another server
    gc.freeze()  # what was imported before the fork stays shared, and no collection walks through it
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the driver, which ends its jobs
    threading.Thread(target=_follow_parent, daemon=True).start()
    if gpu is not None:
        visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[gpu] if visible else str(gpu)  # CUDA starts later
    # What a run prints is in its log; what libraries print around it, or while they crash, is kept beside it.
    console = job.place / "console.txt"
    try:
        console.parent.mkdir(parents=True, exist_ok=True)
        with open_own(console) as file:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
    except OSError as error:
        sender.send(Outcome(f"{console}: {error.strerror or error}; make room, or choose another folder"))
        return
    outcome = work(job, options.threads, options.command)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if not outcome.error:
        console.unlink(missing_ok=True)
    sender.send(outcome)
    sender.close()


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
    one.process.join()
    try:
        outcome: Outcome = one.receiver.recv()
    except EOFError:
        code = one.process.exitcode or 0
        how = f"was killed by signal {-code}" + (" (out of memory?)" if code == -9 else "") if code < 0 else f"exited with {code}"
        outcome = Outcome(f"its process {how}; see console.txt in its folder")
    one.receiver.close()
    return outcome


# Ray


def on_ray(jobs: Sequence[Job], options: Options, started: Started) -> Generator[tuple[int, Outcome], None, None]:
    """Run each job as a Ray task, on the cluster at ``options.address`` or on one that is started on this machine.

    Workers need this package, and the same paths as the driver.

    Raises:
        UserError: Ray is not installed, or no cluster answers at the address.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError("--backend ray needs Ray; install it with: pip install 'promptmix[ray]'") from error
    here: dict[str, Any] = {} if options.address else {"num_cpus": options.jobs * options.threads, "include_dashboard": False}
    try:
        ray.init(address=options.address or "local", log_to_driver=False, **here)
    except Exception as error:  # of a node that does not start in time Ray raises no kind of its own
        where = f"--address {options.address}" if options.address else "--backend ray"
        remedy = "start Ray there, or leave --address out" if options.address else "try again where less runs, or --backend local"
        raise UserError(f"{where}: {' '.join(str(error).split())}; {remedy}") from error
    signals.take_back()  # Ray ends a process at SIGTERM by itself, with a page of addresses
    try:
        has_gpus = options.share is not None or ray.cluster_resources().get("GPU", 0)
        gpus = share_of(jobs, options) if has_gpus else 0
        # A crashed worker is a failed job, which the next sweep repeats; tasks with a GPU get a process of their own.
        task: Any = ray.remote(num_cpus=options.threads, num_gpus=gpus, max_retries=0)(work)
        pending: dict[Any, int] = {}
        for index in leaders_first(jobs):
            job = jobs[index]
            pending[task.remote(job, options.threads, options.command, str(Path.cwd()))] = index
            started(index)
        while pending:
            (ref,), _ = ray.wait(list(pending), num_returns=1)
            try:
                outcome = ray.get(ref)
            except Exception as error:  # Ray wraps whatever ended the worker
                outcome = Outcome(" ".join(f"{type(error).__name__}: {error}".split())[:2000])
            yield pending.pop(ref), outcome
    finally:
        ray.shutdown()  # also ends tasks that still run


# Slurm


def on_slurm(
    jobs: Sequence[Job], options: Options, started: Started, cluster: str = "slurm"
) -> Generator[tuple[int, Outcome], None, None]:
    """Run the jobs as one Slurm array, ``options.jobs`` at a time; an interrupted driver cancels what has not ended.

    Args:
        jobs: what to run.
        options: how.
        started: told of each job that was queued.
        cluster: submitit's name of the cluster; ``local`` runs processes on this machine through the same calls.

    Raises:
        UserError: submitit is not installed, this machine has no Slurm, or a parameter that submitit does not know.
    """
    try:
        import submitit
    except ImportError as error:
        raise UserError("--backend slurm needs submitit; install it with: pip install 'promptmix[slurm]'") from error
    share = share_of(jobs, options)
    if not share.is_integer():
        raise UserError(f"task: gpus is {share}, and Slurm gives whole GPUs only; set it to 0 or 1 for --backend slurm")
    asked = {"cpus_per_task": options.threads, "slurm_array_parallelism": options.jobs}
    told = (*options.slurm, *options.slurm.get("slurm_additional_parameters", {}))
    if share and not any("gpu" in key or "gres" in key for key in told):
        asked["slurm_gpus_per_task"] = int(share)
    if cluster == "slurm" and shutil.which("sbatch") is None:
        raise UserError("--backend slurm: no sbatch on the PATH; run the sweep on a login node of your cluster")
    try:
        executor = submitit.AutoExecutor(folder=str(Path(options.folder, "slurm")), cluster=cluster)
        executor.update_parameters(**{"name": "promptmix"} | asked | options.slurm)
    except (NameError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"slurm: {' '.join(str(error).split())}; give parameters of submitit's AutoExecutor") from error
    order = leaders_first(jobs)
    with executor.batch():
        queued = [executor.submit(work, jobs[index], options.threads, options.command, str(Path.cwd())) for index in order]
    for index in range(len(jobs)):
        started(index)
    pending = dict(zip(order, queued, strict=True))
    try:
        while pending:
            for index in [index for index, one in pending.items() if one.done()]:
                yield index, _from_slurm(pending.pop(index))
            if pending:
                time.sleep(_POLL_SECONDS)
    finally:
        for one in pending.values():
            one.cancel()


def _from_slurm(queued: Any) -> Outcome:  # a job of submitit
    error = queued.exception()
    if error is None:
        outcome: Outcome = queued.result()
        return outcome
    # submitit's message carries the job's whole standard error, the cause last.
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return Outcome(f"Slurm job {queued.job_id}: {lines[-1] if lines else type(error).__name__} (log: {queued.paths.stderr})")


BACKENDS: dict[str, Backend] = {"local": local, "ray": on_ray, "slurm": on_slurm}


@hookimpl
def register_sweep_backends(registry: Registry) -> None:
    """Add this machine, Ray and Slurm."""
    for name, backend in BACKENDS.items():
        registry.register(backend, name=name)
