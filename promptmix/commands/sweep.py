"""``promptmix sweep FILE``: every run that a sweep file asks for, on this machine, Ray or Slurm, then the tables."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from promptmix.commands.train import add_devices
from promptmix.config.flags import check_count
from promptmix.errors import ConfigError, UserError
from promptmix.files.links import open_own
from promptmix.files.places import refuse_unwritable
from promptmix.files.text import counted, one_line
from promptmix.parallel import launch

if TYPE_CHECKING:
    from promptmix.runs.backends import Backend, Options
    from promptmix.runs.protocols import Job
    from promptmix.runs.search import Search
    from promptmix.runs.sweep import Sweep

LOG = "sweep.log"
#: CPUs that each run asks Slurm for, unless it is told.
ASKED = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add = parser.add_argument
    add("file", metavar="FILE.yaml", help="methods, data sets, seeds, protocols, overrides (see configs/sweeps/emoji.yaml)")
    add("--jobs", type=int, metavar="N", help="runs at a time; default: as many as the GPUs are enough for, else the CPUs")
    add_devices(parser)
    add(
        "--threads",
        type=int,
        metavar="N",
        help="CPU threads of each process; default: `task: cpus` of the file, else its share of the CPUs (Slurm: 4)",
    )
    add(
        "--backend",
        default="local",
        metavar="NAME",
        help="where they run: local (default: processes here), ray, slurm, a plugin's",
    )
    add(
        "--address",
        default="",
        metavar="HOST:PORT",
        help="of a Ray cluster (auto: the one that is found); default: start one here",
    )
    add("--dry-run", action="store_true", help="only check everything and show what would run")
    add(
        "--search",
        action="store_true",
        help="run the file's `search`, as many trials for each method, and write the sweep of those that won on val beside it",
    )
    add("--format", default="github", help="format of the tables, as in `promptmix parse`")


def run(args: argparse.Namespace) -> int:
    """Run what has not finished before, then print the tables.

    Returns:
        0, or 1 where some runs failed; they are listed, and the next sweep tries them again.

    Raises:
        UserError: a sweep that can't be run as written; nothing has run then.
    """
    from promptmix.registry import SWEEP_BACKEND_REGISTRY
    from promptmix.runs import search, sweep
    from promptmix.runs.protocols import check, is_done
    from promptmix.tables import tables

    tables.check_choice("--format", args.format, tables.FORMATS)
    if args.address and args.backend != "ray":
        raise UserError(f"--address {args.address} is for --backend ray, not {args.backend}; leave it out")
    found = search.read(args.file) if args.search else None
    plan = sweep.read(args.file) if found is None else sweep.plan_of(found.output, found.jobs, found.tree, found.file)
    backend = SWEEP_BACKEND_REGISTRY.get(args.backend)
    if plan.slurm and args.backend != "slurm":
        plan.slurm.clear()
    options = _options(args, plan)
    if Path(plan.output).exists() and not Path(plan.output).is_dir():
        raise UserError(f"output {plan.output} is not a folder; choose another in the sweep file")
    for job in plan.jobs:
        check(job)
    if args.dry_run:
        refuse_unwritable(plan.output, "output", "choose another in the sweep file")
        for job in plan.jobs:
            sys.stdout.write(f"{'done' if is_done(job) else 'to do'}  {job.protocol} {job.name}: {job.folder}\n")
        return 0
    failed = _run_all(plan.jobs, options, backend, Path(plan.output))
    if found is None and len(failed) < len(plan.jobs):
        _show(plan.output, args.format)
    if failed:
        sys.stderr.write(f"{len(failed)} of {len(plan.jobs)} failed; the same command tries them again:\n")
        sys.stderr.writelines(f"  {job.protocol} {job.name}: {one_line(error)}\n" for job, error in failed)
    elif found is not None:
        _choose(found, args.format)
    return 1 if failed else 0


def _show(output: str, form: str) -> None:
    """Print the tables of a results tree; of the val part where that is what all runs were evaluated on."""
    from promptmix.runs import results
    from promptmix.tables import tables

    runs, _ = results.find(output)
    split = "test" if any("test" in run.metrics for run in runs) else "val"
    rows, metrics, notes = tables.aggregate(runs, split=split)
    sys.stdout.write(f"\n{tables.render(rows + tables.averages(rows, metrics), metrics, form)}\n")
    for note in notes:
        sys.stderr.write(f"note: {one_line(note)}\n")


def _choose(found: Search, form: str) -> None:
    """Print what every trial reached, and write the sweep of those that won."""
    from promptmix.files.text import harmless
    from promptmix.runs import search

    numbers = search.scores(found)
    path = search.write(found, numbers)
    sys.stdout.write(f"\n{search.render(found, numbers, form)}\n")
    sys.stderr.write(f"note: {harmless(path)} holds what won: promptmix sweep {harmless(path)}\n")


def _options(args: argparse.Namespace, plan: Sweep) -> Options:
    """Return how many jobs run at a time, with how many devices and threads.

    Raises:
        ConfigError: runs that can't be divided as ``--devices`` says.
    """
    from promptmix.runs.backends import Options, cpus

    for flag, number in (("--jobs", args.jobs), ("--threads", args.threads), ("--devices", args.devices)):
        check_count(flag, number)
    import torch

    devices = args.devices or 1
    gpus = 0 if all(job.device == "cpu" for job in plan.jobs) else torch.cuda.device_count()
    _refuse_devices(devices, plan, gpus if args.backend == "local" else 0)
    jobs = args.jobs or max(1, (gpus or cpus()) // devices)
    spread = ASKED if args.backend == "slurm" else max(1, cpus() // (jobs * devices))  # not what this login node has
    threads = args.threads or plan.task.get("cpus") or spread
    share = plan.task.get("gpus")
    command = ("promptmix", *args.argv)
    return Options(
        jobs=jobs,
        threads=threads,
        gpus=gpus,
        address=args.address,
        slurm=plan.slurm,
        folder=plan.output,
        command=command,
        share=None if share is None else float(share),
        devices=devices,
    )


def _refuse_devices(devices: int, plan: Sweep, gpus: int) -> None:
    """Refuse to divide runs over ``devices`` where that can't be.

    Args:
        devices: of each run.
        plan: the sweep.
        gpus: of this machine, if runs are to use them; else 0.

    Raises:
        ConfigError: there are fewer, the file wants a part of a GPU, or a run can't be divided.
    """
    from promptmix.commands.run import refuse_undivided_job

    launch.refuse_wrong_place()
    if launch.place()[1] > 1:
        raise ConfigError("a sweep starts its processes itself (--jobs, --devices); run it without torchrun")
    if 0 < gpus < devices:
        raise ConfigError(f"--devices {devices}, but this machine has {counted(gpus, 'GPU')}; lower it, or set `device: cpu`")
    if devices > 1 and not float(plan.task.get("gpus", 1)).is_integer():
        share = plan.task["gpus"]
        raise ConfigError(f"--devices {devices} gives each process a GPU, but `task: gpus` is {share}; set it to 0 or 1")
    for job in plan.jobs:
        refuse_undivided_job(job.protocol, job.trainer, devices)


def _run_all(jobs: list[Job], options: Options, backend: Backend, output: Path) -> list[tuple[Job, str]]:
    """Run the jobs that have not finished before; return those that failed, with the reason."""
    from promptmix.data.features.reuse import Reuse
    from promptmix.runs.backends import Outcome
    from promptmix.runs.progress import Grid
    from promptmix.runs.protocols import is_done
    from promptmix.runs.waves import in_waves

    failed: list[tuple[Job, str]] = []
    reuse = Reuse()
    with _log_in(output) as (log, started), contextlib.closing(Grid(jobs, log)) as grid:
        left = []
        for index, job in enumerate(jobs):
            if is_done(job):
                grid.ended(index, Outcome(), "finished before")
            else:
                left.append(index)
        grid.say(f"{len(left)} of {len(jobs)} to run, {options.jobs} at a time with {options.threads} thread(s) each")

        def begun(place: int) -> None:
            started.add(place)
            grid.started(left[place])

        # Closing the generator ends what still runs when this is interrupted.
        with contextlib.closing(in_waves(backend, [jobs[i] for i in left], options, begun)) as outcomes:
            for place, outcome in outcomes:
                grid.ended(left[place], outcome)
                reuse += outcome.reuse or Reuse()
                if outcome.error:
                    failed.append((jobs[left[place]], outcome.error))
        if str(reuse):
            grid.say(str(reuse))
    return failed


@contextlib.contextmanager
def _log_in(output: Path) -> Iterator[tuple[TextIO, set[int]]]:
    """Open the sweep's log, and yield it with the set of jobs that started: a backend that can't start any leaves nothing."""
    made = [above for above in (output, *output.parents) if not above.exists()]
    fresh, started = not (output / LOG).exists(), set[int]()
    try:
        output.mkdir(parents=True, exist_ok=True)
        log = open_own(output / LOG, append=True)
    except OSError as error:
        raise UserError(f"output {output}: {error.strerror or error}; choose another in the sweep file") from error
    try:
        with log:
            yield log, started
    except UserError:
        if fresh and not started:
            with contextlib.suppress(OSError):
                (output / LOG).unlink()
                for above in made:
                    above.rmdir()
        raise
