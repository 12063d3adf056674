"""Suite ``startup``: from the start of Python to the first learned step on the embedded default."""

from __future__ import annotations

import subprocess
import sys
from argparse import Namespace

from promptmix.bench.measure import Cost, Row, timed
from promptmix.bench.world import World

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
    """Return one row; what a process computes can't be counted from outside."""

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
    return [Row("import to first step, CoOp on the embedded default", ways)]
