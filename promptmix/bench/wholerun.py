"""Suite ``run``: training and test on the embedded default, against the same run without any saving."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from types import MethodType
from typing import Any

from promptmix.bench.evaluate import infer_plainly
from promptmix.bench.measure import Row, measure
from promptmix.bench.world import World
from promptmix.clip.reference import plain_towers
from promptmix.config import validate
from promptmix.config.flags import make_config
from promptmix.engine import build_trainer, set_random_seed


def run(world: World, args: Namespace) -> list[Row]:
    """Return a row for each method: plain, ours, and ours once the features are on disk."""
    return [_row(world, name, args) for name in args.methods]


def _row(world: World, name: str, args: Namespace) -> Row:
    def whole(saving: bool, cache: str) -> Callable[[], None]:
        def work() -> None:
            sizes = ["OPTIM.MAX_EPOCH", args.epochs, "DATASET.NUM_SHOTS", args.shots, "SEED", 1, "VERBOSE", False]
            ways = ["INPUT.CACHED_VIEWS", int(saving), "INPUT.FEATURE_CACHE", bool(cache), "INPUT.FEATURE_CACHE_DIR", cache]
            places = ["OUTPUT_DIR", str(world.folder / f"run{len(list(world.folder.glob('run*')))}"), "TRAINER.NAME", name]
            cfg = make_config(["configs/quickstart.yaml"], {}, [*sizes, *ways, *places])
            validate(cfg)
            set_random_seed(1)
            trainer: Any = build_trainer(cfg)
            (world.folder / cfg.OUTPUT_DIR).mkdir(exist_ok=True)
            if saving:
                trainer.train()
                return
            trainer.model_inference = MethodType(infer_plainly, trainer)
            with plain_towers(trainer.clip):
                trainer.train()

        return work

    again = whole(True, str(world.folder / "features"))
    again()
    ways = {"plain": whole(False, ""), "ours": whole(True, ""), "ours, features on disk": again}
    return Row(f"run, {name}, {args.shots} shots, {args.epochs} epochs, embedded default", measure(ways, args.repeats))
