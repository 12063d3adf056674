"""Suite ``data``: reading and transforming pictures, against reading their features from the cache."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable

from promptmix.bench.measure import Row, measure
from promptmix.bench.world import World


def run(world: World, args: Namespace) -> list[Row]:
    """Return one row: an epoch without workers (plain), with them, and from cached views."""

    def epoch(*opts: object) -> Callable[[], None]:
        trainer = world.trainer("CoOp", args.pictures, "DATALOADER.TRAIN_X.BATCH_SIZE", 25, *opts)
        trainer.before_train()
        list(trainer.train_loader_x)  # workers that stay are started once

        def read() -> None:
            for _ in trainer.train_loader_x:
                pass

        return read

    ways = {"plain": epoch()}
    for workers in args.workers:
        ways[f"{workers} workers"] = epoch("DATALOADER.NUM_WORKERS", workers)
    ways["ours, cached views"] = epoch("INPUT.CACHED_VIEWS", 1, "INPUT.FEATURE_CACHE_DIR", str(world.folder / "cache"))
    return [Row(f"an epoch over {args.pictures} JPEGs without learning", measure(ways, args.repeats))]
