"""``promptmix run PROTOCOL``: a protocol of the field over methods, data sets, shots and seeds, then its table."""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from promptmix.commands.train import add_devices, refuse_undivided, split_arguments, start_devices
from promptmix.errors import ConfigError, UserError
from promptmix.files.places import refuse_unwritable
from promptmix.files.text import counted, one_line
from promptmix.registry import PROTOCOL_REGISTRY
from promptmix.runs.active import ACTIVE
from promptmix.runs.federated import FEDERATED
from promptmix.runs.protocols import PROTOCOLS, Job, Protocol

if TYPE_CHECKING:
    from promptmix.data.features.reuse import Reuse
    from promptmix.runs.results import RunResult

__all__ = ["add_arguments", "run", "run_all", "split_arguments"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add = parser.add_argument
    built_in = PROTOCOLS | {"active": ACTIVE, "federated": FEDERATED}
    about = "; ".join(f"{name}: {protocol.summary}" for name, protocol in built_in.items())
    add("protocol", metavar="PROTOCOL", help=f"{about}; `promptmix list protocols` shows those of plugins too")
    add("--trainer", "--trainers", dest="trainers", nargs="+", required=True, metavar="NAME", help="methods")
    add("--datasets", nargs="+", required=True, metavar="NAME|YAML", help="data sets to train on, by name or config file")
    add("--targets", nargs="+", default=[], metavar="NAME", help="data sets or domains to test on; default: those of the papers")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3], metavar="N", help="default: 1 2 3")
    add("--shots", type=int, nargs="+", metavar="N", help="training pictures per class; default: 16, for protocols in rounds all")
    add(
        "--config-file",
        default="",
        metavar="YAML",
        help="methods' config, with {trainer} and {dataset} filled in; default on the embedded pictures: the method's tiny.yaml",
    )
    add("--root", default="", help="folder of the data sets")
    add("--output-dir", default="output/runs", help="runs go to OUTPUT/PROTOCOL/DATASET/TRAINER/shotsN/seedN/PART")
    add("--device", choices=("auto", "cpu", "cuda"), default="", help="where to compute")
    add_devices(parser)
    add("--plugin", action="append", default=[], metavar="MODULE|FILE", help="load a plugin; may be repeated")
    add("--format", default="github", help="format of the table, as in `promptmix parse`")
    add("opts", nargs="*", metavar="KEY VALUE", help="config overrides at the end (OPTIM.MAX_EPOCH 5)")


def run(args: argparse.Namespace) -> int:
    """Run what has not finished before, then print the table.

    Raises:
        UserError: something that can't be done; nothing has run then, unless a data set or checkpoint turned out bad.
    """
    from promptmix.config import refuse_lone
    from promptmix.config.flags import load_plugins
    from promptmix.runs.protocols import default_config, folder_of

    refuse_lone(args.opts)
    code = start_devices(args)
    if code is not None:
        return code
    load_plugins(args.plugin)
    shots_of_all = args.shots or [PROTOCOL_REGISTRY.get(args.protocol).shots]
    jobs = [
        Job(
            protocol=args.protocol,
            trainer=trainer,
            dataset=dataset,
            folder=folder_of(args.output_dir, args.protocol, dataset, trainer, "", shots, seed),
            seed=seed,
            shots=shots,
            targets=tuple(args.targets),
            config_file=args.config_file or default_config(trainer, dataset),
            settings=tuple(args.opts),
            plugins=tuple(args.plugin),
            root=args.root,
            device=args.device,
        )
        for dataset in args.datasets
        for trainer in args.trainers
        for shots in shots_of_all
        for seed in args.seeds
    ]
    with _on_all_devices(args):
        run_all(jobs, args, sort="name")
    return 0


def _on_all_devices(args: argparse.Namespace) -> contextlib.AbstractContextManager[None]:
    """Join the processes of ``--devices``, which divide the work of every run.

    Raises:
        ConfigError: a protocol or a method whose work can't be divided.
    """
    from promptmix.engine.precision import choose_device
    from promptmix.parallel import group, launch

    for trainer in args.trainers:
        refuse_undivided_job(args.protocol, trainer, launch.place()[1])
    return group.joined(choose_device(args.device or "auto"), " / ".join(args.trainers))


def refuse_undivided_job(protocol: str, trainer: str, processes: int) -> None:
    """Refuse several processes for a protocol or a method whose work can't be divided.

    Raises:
        ConfigError: it is one; the message names it.
    """
    if processes > 1 and type(PROTOCOL_REGISTRY.get(protocol)).prepare is not Protocol.prepare:
        raise ConfigError(f"{protocol} works in rounds, between which one process writes; leave --devices out")
    refuse_undivided(trainer, processes)


def run_all(jobs: list[Job], args: argparse.Namespace, sort: str, at_once: int = 1) -> list[RunResult]:
    """Check every job, run them, and print the table.

    Args:
        jobs: what to run.
        args: flags ``format``, ``output_dir`` and the command line ``argv``.
        sort: order of the table's rows.
        at_once: how many run side by side, in processes of their own; 1 = one after another in this process.

    Raises:
        UserError: a job that can't be done.
    """
    from promptmix.runs import results
    from promptmix.runs.protocols import check, is_done
    from promptmix.runs.sweep import refuse_twins
    from promptmix.tables import tables

    started = time.monotonic()
    tables.check_choice("--format", args.format, tables.FORMATS)
    refuse_twins(jobs, "command line")
    for job in jobs:  # a wrong name or setting shows now, not after the first methods have run
        check(job)
    refuse_unwritable(args.output_dir, "--output-dir", "choose another")
    several = at_once > 1 and sum(not is_done(job) for job in jobs) > 1
    done, reuse = _side_by_side(jobs, args, at_once) if several else _one_by_one(jobs, args)
    # Rows that are sorted by time stand as the jobs do: side by side, the last ones begin first.
    rows, metrics, notes = tables.aggregate([replace(one, started=f"{place:09}") for place, one in enumerate(done)])
    sys.stdout.write(f"\n{tables.render(rows + tables.averages(rows, metrics), metrics, args.format, sort=sort)}\n")
    for note in notes:
        sys.stderr.write(f"note: {one_line(note)}\n")
    took = f"{counted(len(done), 'run')} in {time.monotonic() - started:.0f} s"
    sys.stdout.write(f"\n{took}; each has its {results.FILE_NAME} and log.txt below {args.output_dir}\n")
    if str(reuse):
        sys.stdout.write(f"{reuse}\n")
    return done


def _one_by_one(jobs: list[Job], args: argparse.Namespace) -> tuple[list[RunResult], Reuse]:
    from promptmix.data.features.reuse import reused
    from promptmix.runs.execute import execute
    from promptmix.runs.progress import Lines
    from promptmix.runs.protocols import parts

    before = reused()
    progress = Lines(total=sum(len(parts(job)) for job in jobs))
    done: list[RunResult] = []
    try:
        for job in jobs:
            done += execute(job, progress, ["promptmix", *args.argv])
    finally:
        progress.close()
    return done, reused() - before


def last_first(jobs: Sequence[Job]) -> list[int]:
    """Return the order in which jobs begin side by side: those of the last method first, since methods are named as they grow.

    A long job that begins last would have the other CPUs wait for it. The first job stands last, which is the one that begins
    beside the first: it comes to the test pictures while the other trains, where two long jobs would wait for each other's
    features.
    """
    place = {trainer: index for index, trainer in enumerate(dict.fromkeys(job.trainer for job in jobs))}
    longest, *others = sorted(range(len(jobs)), key=lambda index: -place[jobs[index].trainer])
    return [longest, *sorted(others, key=lambda index: not index)]


def _side_by_side(jobs: list[Job], args: argparse.Namespace, at_once: int) -> tuple[list[RunResult], Reuse]:
    """Run jobs in processes of their own; the first that fails ends the others, which the same command goes on with.

    Raises:
        UserError: what a job failed with.
    """
    from promptmix.data.features.reuse import Reuse
    from promptmix.runs import backends
    from promptmix.runs.progress import Grid
    from promptmix.runs.protocols import done_parts

    options = backends.Options(jobs=at_once, threads=args.threads, command=("promptmix", *args.argv))
    reuse = Reuse()
    grid = Grid(jobs, io.StringIO())  # each run has a log of its own
    order = last_first(jobs)
    queue = [jobs[index] for index in order]
    try:
        with contextlib.closing(backends.local(queue, options, lambda place: grid.started(order[place]))) as outcomes:
            for place, outcome in outcomes:
                grid.ended(order[place], outcome)
                reuse += outcome.reuse or Reuse()
                if outcome.error:
                    raise UserError(f"{queue[place].name}: {outcome.error}")
    finally:
        grid.close()
    return [result for job in jobs for _, _, result, _ in done_parts(job) if result is not None], reuse
