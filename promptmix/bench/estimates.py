"""Suite ``estimate``: what ``promptmix estimate`` says of a step, and what the step took, for every method.

Seconds are the processor's, with one thread, so that others' work on the machine counts little; the fastest of several steps
counts. Memory is the peak of the process's resident memory while they ran. What was recorded stays, and a broken record goes on.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from promptmix.bench.world import World
from promptmix.cost import memory
from promptmix.cost.estimate import peak_of, training_step
from promptmix.cost.machine import Machine, measure_machine
from promptmix.cost.work import Work
from promptmix.errors import UserError
from promptmix.registry import TRAINER_REGISTRY
from promptmix.utils import atomic_write, read_json

#: What is recorded: backbone, classes, batch, and the methods (all of them where there are none).
CASES: tuple[tuple[str, int, int, tuple[str, ...]], ...] = (
    ("tiny-vit", 50, 32, ()),
    ("ViT-B/16", 20, 2, ()),
    ("ViT-B/16", 100, 4, ("CoOp", "CoCoOp", "MoCoOp", "MaPLe", "PromptSRC")),
)
#: How far off an estimate may be.
TOLERANCE = 0.2


@dataclass(frozen=True)
class Measured:
    """One step of one method.

    Attributes:
        case: method, backbone, classes, batch.
        ran: whether the step had to run to be counted.
        seconds: of the fastest step.
        resident_mb: before the steps.
        peak_mb: while they ran.
        live_mb: counted.
        work: rows of the counted work.
        why: why there are no numbers.
    """

    case: str
    ran: bool = False
    seconds: float = 0.0
    resident_mb: float = 0.0
    peak_mb: float = 0.0
    live_mb: float = 0.0
    work: list[list[Any]] | None = None
    why: str = ""


def record(folder: Path, path: str, note: Callable[[str], Any]) -> dict[str, Any]:
    """Measure what ``path`` does not hold yet, and return all of it."""
    origin = "promptmix bench estimate: one thread, fp32, random weights; seconds of the processor, the fastest of 3 to 10 steps"
    found: dict[str, Any] = read_json(path) if Path(path).is_file() else {"origin": origin, "machine": {}, "steps": []}
    done = {step["case"] for step in found["steps"]}
    for backbone, classes, batch, methods in CASES:
        wanted = [name for name in methods or TRAINER_REGISTRY if f"{name}:{backbone}:{classes}:{batch}" not in done]
        if not wanted:
            continue
        world = World(backbone, folder, "cpu")
        found["machine"].setdefault(backbone, asdict(measure_machine(world.clip)))
        for name in wanted:
            measured = _measured(world, name, classes, batch)
            found["steps"].append({key: value for key, value in asdict(measured).items() if value})
            note(f"{measured.case}: {measured.seconds:.2f} s {measured.why}")
            write(found, path)
    return found


def write(found: Mapping[str, Any], path: str) -> None:
    """Write a record, one step a line."""
    lines = ",\n".join(f"  {json.dumps(step)}" for step in found["steps"])
    head = json.dumps({key: value for key, value in found.items() if key != "steps"}, indent=1)[:-2]
    atomic_write(path, lambda to: to.write_text(f'{head},\n "steps": [\n{lines}\n ]\n}}\n', encoding="utf-8"))


def _measured(world: World, name: str, classes: int, batch: int) -> Measured:
    case = f"{name}:{world.backbone}:{classes}:{batch}"
    try:
        trainer = world.trainer(name, classes)
        if not any(parameter.requires_grad for parameter in trainer.model.parameters()):
            return Measured(case, why="learns nothing by steps")
        pictures = world.batch(trainer, batch)
        trainer.forward_backward(pictures)  # references are built once, in the first step
    except UserError as error:  # it wants another data set or backbone
        return Measured(case, why=str(error))
    gc.collect()
    memory.reset_peak()
    resident = memory.resident_mb() or 0.0
    seconds = min(_times(lambda: trainer.forward_backward(pictures)))
    peak = memory.peak_mb()["rss"] or 0.0
    work, ran = training_step(trainer, batch)
    return Measured(case, ran, round(seconds, 4), round(resident, 1), round(peak, 1), round(work.live_mb, 1), work.rows())


def _times(work: Callable[[], Any], seconds: float = 3.0) -> Iterator[float]:
    spent, rounds = 0.0, 0
    while rounds < 3 or (spent < seconds and rounds < 10):
        begin = time.process_time()
        work()
        took = time.process_time() - begin
        spent, rounds = spent + took, rounds + 1
        yield took


@dataclass(frozen=True)
class Error:
    """How far off an estimate is: predicted over measured, less 1.

    Attributes:
        case: method, backbone, classes, batch.
        seconds: of the time.
        peak: of the peak of resident memory.
        rise: of what the step adds to it, which is a small part of the peak where steps are small.
    """

    case: str
    seconds: float
    peak: float
    rise: float


def errors(found: Mapping[str, Any]) -> list[Error]:
    """Return how far off the estimates are for every recorded step that has numbers."""
    rows = []
    for step in found["steps"]:
        if "why" in step:
            continue
        machine = Machine(**found["machine"][step["case"].split(":")[1]])
        predicted = machine.seconds(Work.of_rows(step["work"]))
        peak, resident = peak_of(step["resident_mb"], step["live_mb"]), step["resident_mb"]
        rise = (peak - resident) / max(step["peak_mb"] - resident, 1.0) - 1
        rows.append(Error(step["case"], predicted / step["seconds"] - 1, peak / step["peak_mb"] - 1, rise))
    return rows


def table(found: Mapping[str, Any]) -> str:
    """Return the errors as a table, method by method, with what could not be measured below."""
    rows = errors(found)
    kinds = list(dict.fromkeys(row.case.partition(":")[2] for row in rows))
    at = {row.case: row for row in rows}
    lines = []
    for name in dict.fromkeys(row.case.partition(":")[0] for row in rows):
        of = [at.get(f"{name}:{kind}") for kind in kinds]
        cells = ["" if one is None else f"{getattr(one, what):+.0%}" for what in ("seconds", "peak") for one in of]
        lines.append([name, *cells])
    names = [f"{kind.replace(':', ', ', 1).replace(':', ' classes, batch ')}" for kind in kinds]
    head = ["method", *(f"time, {name}" for name in names), *(f"memory, {name}" for name in names)]
    text = [tabulate(lines, head, tablefmt="github"), ""]
    for what in ("seconds", "peak", "rise"):
        off = [abs(getattr(row, what)) for row in rows]
        within = sum(one <= TOLERANCE for one in off)
        text.append(
            f"{what}: {within} of {len(off)} within {TOLERANCE:.0%}, median {statistics.median(off):.0%}, worst {max(off):.0%}"
        )
    text += [f"{step['case']}: {step['why']}" for step in found["steps"] if "why" in step]
    return "\n".join(text)
