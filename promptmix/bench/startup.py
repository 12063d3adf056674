"""Suite ``startup``: from the start of Python, and from the end of a run before, to the first step on the embedded default."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from argparse import Namespace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from statistics import median

from promptmix.bench import stamp
from promptmix.bench.measure import Cost, Row, timed
from promptmix.bench.world import World
from promptmix.errors import UserError
from promptmix.runs.backends import Backend, Options, local
from promptmix.runs.clusters import on_ray
from promptmix.runs.protocols import Job
from promptmix.utils import read_json

#: What a new process does: as ``promptmix train`` builds it, then one batch.
_FIRST_STEP = """
import sys, torch
torch.set_num_threads(int(sys.argv[1]))
from promptmix.config.flags import make_config
from promptmix.config import validate
from promptmix.engine import build_trainer
opts = ["TRAINER.NAME", "CoOp", "INPUT.CACHED_VIEWS", "0", "DEVICE", "cpu", "SEED", "1", "VERBOSE", "False",
        "MODEL.PLAIN_TOWERS", str(sys.argv[2] == "plain")]
cfg = make_config(["configs/quickstart.yaml"], {}, opts)
validate(cfg)
trainer = build_trainer(cfg)
trainer.set_model_mode("train")
trainer.epoch, trainer.batch_idx, trainer.num_batches = 0, 0, 2
trainer.forward_backward(next(iter(trainer.train_loader_x)))
"""


def run(world: World | None, args: Namespace) -> list[Row]:
    """Return a row for new processes, and one for those of a sweep; what a process computes can't be counted from outside."""

    def start(way: str) -> float:
        command = [sys.executable, "-c", _FIRST_STEP, str(args.threads), way]
        return timed(lambda: subprocess.run(command, check=True, capture_output=True))

    seconds = {way: float("inf") for way in ("plain", "ours", "import torch alone")}
    for _ in range(max(args.repeats, 1)):
        for way in ("plain", "ours"):
            seconds[way] = min(seconds[way], start(way))
        alone = timed(lambda: subprocess.run([sys.executable, "-c", "import torch"], check=True))
        seconds["import torch alone"] = min(seconds["import torch alone"], alone)
    ways = {way: Cost(value, None, 0.0, 0.0) for way, value in seconds.items()}
    next_runs = {"in a new process": ways["ours"]}
    for name, backend in {"of a sweep": local, **({"of a sweep on Ray": on_ray} if find_spec("ray") else {})}.items():
        next_runs[name] = Cost(_between_runs(backend, args), None, 0.0, 0.0)
    return [
        Row("import to first step, CoOp on the embedded default", ways),
        Row("end of a run to the first step of the next, the same (median)", next_runs),
    ]


def _between_runs(backend: Backend, args: Namespace) -> float:
    """Return the median of the seconds from a run's end to the first step of the next, which the same worker does."""
    with tempfile.TemporaryDirectory(prefix="promptmix-") as folder:
        jobs = [
            Job(
                protocol="few-shot",
                trainer="CoOp",
                dataset="EmojiFamilies",
                folder=str(Path(folder, str(seed))),
                seed=seed,
                shots=1,
                config_file="configs/quickstart.yaml",
                settings=("OPTIM.MAX_EPOCH", 1, "OPTIM.WARMUP_EPOCH", -1, "INPUT.CACHED_VIEWS", 0, "TEST.NO_TEST", True),
                plugins=(stamp.__name__,),
                device="cpu",
            )
            for seed in range(1, max(args.repeats, 1) + 2)
        ]
        for _, outcome in backend(jobs, Options(threads=args.threads, folder=folder), lambda _: None):
            if outcome.error:
                raise UserError(outcome.error)
        stamps = sorted((read_json(path) for path in Path(folder).rglob(stamp.FILE_NAME)), key=lambda moment: moment["end"])
    return median(after["first"] - before["end"] for before, after in pairwise(stamps))
