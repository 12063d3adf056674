"""``promptmix bench``: what is saved against the plain way, measured in one process in the order A B A B."""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from promptmix.commands.train import set_threads
from promptmix.config.flags import check_count
from promptmix.errors import UserError
from promptmix.files.text import whole

if TYPE_CHECKING:
    from promptmix.bench.measure import Row

#: Flags that count something, with the smallest number.
_COUNTS = {"classes": 1, "prompts": 1, "pictures": 1, "epochs": 1, "shots": 1, "kills": 1, "context": 1, "gpu_classes": 1}
_COUNTS |= {"repeats": 0, "class_chunk": 0, "experts": 0, "workers": 0, "measure": 0, "minutes": 0}
#: Suite to its module in ``promptmix.bench``.
SUITES = {"text": "text", "step": "step", "eval": "evaluate", "data": "data", "startup": "startup", "run": "wholerun"}
RECORD = "benchmarks/ci_flops.json"
ESTIMATES = "benchmarks/estimate.json"
PAGE = "docs/limits.md"
STEPS = ("CoOp:4:100", "CoOp:32:100", "CoCoOp:4:50", "MaPLe:4:100")
EVALUATIONS = ("CoOp:100:100", "CoCoOp:4:100")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags; sizes carry the suite they belong to in front."""
    add = parser.add_argument
    choices = (*SUITES, "all", "show", "compare", "ci", "scaling", "kill", "gpu", "graphs", "estimate", "scale")
    about = "suite; show, compare: JSON files; ci: count and compare with the record; scaling: time and memory over sizes; "
    about += "graphs: what a compiled step captures, and with --also compiled what the compiler makes of it; "
    about += (
        "kill: runs killed at random moments against unbroken ones; gpu: whether a GPU computes what a CPU does, and how fast; "
        "estimate: what `promptmix estimate` says of a step of every method, against what it took, added to --json; "
        "scale: steps with up to ImageNet-21k's class names, counted, and what limits them"
    )
    add("suite", nargs="?", choices=choices, default="text", help=about)
    add("files", nargs="*", metavar="FILE", help="show: JSON files; compare: the old and the new one")
    add("--backbone", default="ViT-B/16", help="its architecture is used with random weights")
    add("--classes", type=int, default=100, help="text, references, graphs: C, class names of 1 to 4 words and a number")
    add("--threads", type=int, default=1, help="CPU threads; one thread disturbs the ratio least on a busy machine")
    add("--repeats", type=int, default=2, help="timed rounds, plain, ours, plain, ours; the fastest counts; 0 only counts")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    add("--json", metavar="FILE", help="also write the numbers with machine, versions and commit")
    add("--update", action="store_true", help=f"ci: make the record anew instead of comparing with it; scale: {PAGE}")
    add("--record", default=RECORD, metavar="FILE", help=f"ci: the recorded counts; default {RECORD}")
    add("--context", type=int, nargs="+", default=[16, 4], metavar="M", help="text: context vectors; several are run in turn")
    add("--prompts", type=int, default=1, help="text: E, prompts encoded together")
    add("--class-chunk", type=int, default=0, metavar="C", help="text: also with MODEL.CLASS_CHUNK C")
    add("--steps", nargs="*", default=list(STEPS), metavar="METHOD:BATCH:CLASSES", help=f"step: default {' '.join(STEPS)}")
    add("--experts", type=int, default=5, help="step: E, template groups of a mixture; 0 leaves mixtures out")
    shown = f"eval: default {' '.join(EVALUATIONS)}"
    add("--evaluations", nargs="*", default=list(EVALUATIONS), metavar="METHOD:PICTURES:CLASSES", help=shown)
    add("--pictures", type=int, default=100, help="data: JPEGs of 500 x 375 pixels that are read")
    add("--workers", type=int, nargs="*", default=[2], help="data, kill: numbers of worker processes; 0 is always tried")
    add("--measure", type=float, default=0.0, metavar="GFLOP", help="scaling: also measure the steps up to this counted size")
    add(
        "--also",
        nargs="+",
        choices=("bf16", "compiled"),
        default=[],
        help="step: our ways again, under autocast or torch.compile; graphs: compiled",
    )
    shown = "run, kill: methods; those of kill need a tiny.yaml"
    add("--methods", "--trainer", nargs="+", default=["CoOp", "MoCoOp"], metavar="NAME", help=shown)
    add("--epochs", type=int, default=5, help="run, kill: epochs of each run")
    add("--shots", type=int, default=16, help="run, kill: pictures per class")
    shown = "kill: commands that are killed; ray is a sweep there (default: train)"
    add("--through", nargs="+", choices=("train", "run", "sweep", "ray"), default=["train"], help=shown)
    add("--kills", type=int, default=20, metavar="N", help="kill: how many for each method")
    add("--seed", type=int, default=0, help="kill: of the moments and settings")
    add("--minutes", type=float, default=8.0, help="gpu: after which what still runs is cut off, and what is left is named")
    gpu = ("CoOp", "CoCoOp", "MoCoOp", "MaPLe", "PromptSRC")
    add(
        "--gpu-methods",
        nargs="+",
        default=list(gpu),
        metavar="NAME",
        help=f"gpu, graphs: what is measured; default {' '.join(gpu)}",
    )
    add("--gpu-classes", type=int, nargs="*", default=[100, 1000], metavar="C", help="gpu: classes of the timed steps")
    add("--no-others", action="store_true", help="gpu: leave out two steps of every other method")


def run(args: argparse.Namespace) -> int:
    """Measure and print, or compare.

    Returns:
        0, or 1 where ``ci`` found a count that grew, ``kill`` a run that came out differently, or ``gpu`` and ``graphs`` wrong
        numbers.
    """
    if args.suite == "compare":
        return _compare(args)
    if args.suite == "show":
        return _show(args)
    if args.files:
        raise UserError(f"bench {args.suite} takes no file, but got {args.files[0]}; --json FILE writes one")
    for name, least in _COUNTS.items():
        given = getattr(args, name)
        for number in given if isinstance(given, list) else [given]:
            check_count(f"--{name.replace('_', '-')}", number, most=10**6, least=least)
    for flag, cases in {"--steps": args.steps, "--evaluations": args.evaluations}.items():
        _check_cases(flag, cases)
    set_threads(args.threads)
    import torch

    from promptmix.plugin_manager import get_plugin_manager

    torch.manual_seed(0)
    get_plugin_manager()
    with tempfile.TemporaryDirectory(prefix="promptmix-bench-") as folder:
        if args.suite == "kill":
            from promptmix.bench import kill

            return kill.run(args, Path(folder))
        if args.suite == "gpu":
            return _gpu(args, Path(folder))
        if args.suite == "graphs":
            return _graphs(args, Path(folder))
        if args.suite == "estimate":
            return _estimate(args, Path(folder))
        if args.suite == "scale":
            return _scale(args, Path(folder))
        if args.suite in ("ci", "scaling"):
            return _count(args, Path(folder))
        _measure(args, Path(folder))
    return 0


def _check_cases(flag: str, cases: list[str]) -> None:
    """Refuse what is no ``METHOD:BATCH:CLASSES``.

    Raises:
        UserError: one is none.
    """
    for case in cases:
        try:
            sizes = [whole(size) for size in case.split(":")[1:]]
        except ValueError:
            sizes = []
        if len(sizes) != 2 or not all(1 <= size <= 10**6 for size in sizes):
            raise UserError(f"{flag} {case}: give METHOD:BATCH:CLASSES, such as {STEPS[0]}, with numbers from 1 to {10**6}")


def _show(args: argparse.Namespace) -> int:
    from promptmix.bench import report

    if not args.files:
        raise UserError("bench show takes JSON files that `promptmix bench SUITE --json` wrote, such as benchmarks/step.json")
    sys.stdout.write(report.table([row for path in args.files for row in report.read(path)]) + "\n")
    return 0


def _compare(args: argparse.Namespace) -> int:
    from promptmix.bench import report

    if len(args.files) != 2:
        raise UserError(f"bench compare takes two JSON files, the old and the new one, but got {len(args.files)}")
    old, new = (report.read(path) for path in args.files)
    sys.stdout.write(report.compare(old, new) + "\n")
    return 0


def _measure(args: argparse.Namespace, folder: Path) -> None:
    from promptmix.bench import report
    from promptmix.bench.world import World, silenced

    names = list(SUITES) if args.suite == "all" else [args.suite]
    world = World(args.backbone, folder, args.device) if set(names) - {"startup"} else None
    rows: list[Row] = []
    for name in names:
        with silenced():
            found = importlib.import_module(f"promptmix.bench.{SUITES[name]}").run(world, args)
        sys.stdout.write(report.table(found) + "\n\n")
        sys.stdout.flush()
        rows += found
        if args.json:  # after each suite, so that an interrupted measurement keeps what it had
            report.write(args, rows, args.json)


def _gpu(args: argparse.Namespace, folder: Path) -> int:
    from promptmix.bench import gpu, report
    from promptmix.bench.world import silenced

    with silenced():
        result = gpu.run(args, folder)
    sys.stdout.write(gpu.shown(result) + "\n")
    if args.json:
        report.write_record(args, gpu.as_json(result), args.json)
    return int(bool(result.failed))


def _graphs(args: argparse.Namespace, folder: Path) -> int:
    from promptmix.bench import graphs
    from promptmix.bench.world import World, silenced

    with silenced():
        found = graphs.run(World(args.backbone, folder, args.device), args)
    sys.stdout.write(graphs.table(found) + "\n")
    return int(any(graphs.is_wrong(one) for one in found))


def _estimate(args: argparse.Namespace, folder: Path) -> int:
    from promptmix.bench import estimates
    from promptmix.bench.world import silenced

    path, said = args.json or ESTIMATES, sys.stderr
    with silenced():
        found = estimates.record(folder, path, lambda line: said.write(line + "\n"))
    sys.stdout.write(estimates.table(found) + "\n")
    return 0


def _scale(args: argparse.Namespace, folder: Path) -> int:
    from promptmix.bench import scale
    from promptmix.bench.world import World, silenced
    from promptmix.utils import read_json

    machine = read_json(ESTIMATES)["machine"][scale.BACKBONE]
    with silenced():
        tables = scale.study(World(scale.BACKBONE, folder, "meta"), machine)
    if args.update:
        scale.rewrite(Path(PAGE), tables)
    sys.stdout.write("\n\n".join(tables.values()) + "\n")
    return 0


def _count(args: argparse.Namespace, folder: Path) -> int:
    from promptmix.bench import counted, scaling
    from promptmix.bench.world import World, silenced
    from promptmix.utils import read_json, write_json

    if args.suite == "ci" and not args.update:
        read_json(args.record)  # counting takes a minute, so a record that is not there shows first
    with silenced():
        world = World(args.backbone, folder, "meta")
        if args.suite == "scaling":
            here = World(args.backbone, folder, args.device) if args.measure else None
            text = scaling.study(world, scaling.sizes(), here, args.measure, args.repeats)
        else:
            counts = counted.count_cases(world)
    if args.suite == "scaling":
        sys.stdout.write(text)
        return 0
    if args.update:
        write_json(counts, args.record)
        sys.stdout.write(f"recorded {len(counts)} cases in {args.record}\n")
        return 0
    grown = counted.regressions(counts, args.record)
    sys.stdout.write("\n".join(grown or [f"{len(counts)} cases: no count grew by more than 5%"]) + "\n")
    return int(bool(grown))
