"""Sweeps on several machines: Ray, or Slurm through submitit. Neither schedules anything cleverly."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

from promptmix.console import signals
from promptmix.errors import UserError
from promptmix.hookspecs import hookimpl
from promptmix.registry import Registry
from promptmix.runs.backends import Backend, Options, Outcome, Started, leaders_first, local, perform, share_of
from promptmix.runs.protocols import Job

_POLL_SECONDS = 2.0  # between two looks at Slurm's queue

# Ray

#: Shuts Ray down at its end, where several waves of jobs follow each other.
_held: contextlib.ExitStack | None = None


@contextlib.contextmanager
def ray_stays() -> Iterator[None]:
    """Shut Ray down at the end of the context and not of each wave of jobs: starting it anew takes seconds."""
    global _held
    try:
        with contextlib.ExitStack() as _held:
            yield
    finally:
        _held = None


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
    cores = options.threads * options.devices
    here: dict[str, Any] = {} if options.address else {"num_cpus": options.jobs * cores, "include_dashboard": False}
    try:
        if _held is None or not ray.is_initialized():
            ray.init(address=options.address or "local", log_to_driver=False, **here)
            if _held is not None:
                _held.callback(ray.shutdown)
    except Exception as error:  # of a node that does not start in time Ray raises no kind of its own
        where = f"--address {options.address}" if options.address else "--backend ray"
        remedy = "start Ray there, or leave --address out" if options.address else "try again where less runs, or --backend local"
        raise UserError(f"{where}: {' '.join(str(error).split())}; {remedy}") from error
    signals.take_back()  # Ray ends a process at SIGTERM by itself, with a page of addresses
    try:
        has_gpus = options.share is not None or ray.cluster_resources().get("GPU", 0)
        gpus = share_of(jobs, options) if has_gpus else 0
        # A crashed worker is a failed job, which the next sweep repeats. Others stay, also those with a GPU, which jobs' own
        # processes use (`perform`).
        task: Any = ray.remote(num_cpus=cores, num_gpus=gpus, max_retries=0, max_calls=0)(perform)
        pending: dict[Any, int] = {}
        for index in leaders_first(jobs):
            job = jobs[index]
            pending[task.remote(job, options, str(Path.cwd()))] = index
            started(index)
        while pending:
            (ref,), _ = ray.wait(list(pending), num_returns=1)
            try:
                outcome = ray.get(ref)
            except Exception as error:  # Ray wraps whatever ended the worker
                outcome = Outcome(" ".join(f"{type(error).__name__}: {error}".split())[:2000])
            yield pending.pop(ref), outcome
    finally:
        if _held is None:
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
    asked = {"cpus_per_task": options.threads * options.devices, "slurm_array_parallelism": options.jobs}
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
        queued = [executor.submit(perform, jobs[index], options, str(Path.cwd())) for index in order]
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
