"""What the two processes of a training do in the tests: some methods for some steps, and whole trainings."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from promptmix.errors import ConfigError
from promptmix.parallel import group
from promptmix.plugin_manager import get_plugin_manager
from promptmix.registry import DATASET_REGISTRY
from promptmix.runs.execute import execute
from promptmix.runs.protocols import Job
from promptmix.runs.results import RunResult
from promptmix.runs.run import run
from tests.trainers import toy

#: Methods with settings: among them a router with experts, deep prompts in both towers, two gradients, random crops.
METHODS: dict[str, tuple[object, ...]] = {
    "CoOp": ("INPUT.TRANSFORMS", ("random_resized_crop", "random_flip", "normalize")),
    "MoCoOp": ("MODEL.CLASS_CHUNK", 2),
    "MaPLe": ("TRAIN.CLIP_GRAD_NORM", 0.5, "TRAINER.MAPLE.PROMPT_DEPTH", 2),
    "PromptSRC": ("TRAINER.PROMPTSRC.PROMPT_DEPTH_TEXT", 2, "TRAINER.PROMPTSRC.PROMPT_DEPTH_VISION", 2),
    "ProGrad": (),
}
TIMEOUT = 60
#: What is said before the run begins that only one process tells of.
RUN = "the run"


def few_steps(room: Path, name: str) -> dict[str, torch.Tensor]:
    """Return what two batches of 3 pictures and an evaluation in batches of 7 (of 10) give: losses, learned tensors, scores."""
    options = ("DATALOADER.TRAIN_X.BATCH_SIZE", 3, "DATALOADER.TEST.BATCH_SIZE", 7, "OPTIM.LR", 0.02)
    trainer: Any = toy.toy_trainer(room, name, *options, *METHODS[name], classes="all")
    trainer.set_model_mode("train")
    trainer.num_batches, found = len(trainer.train_loader_x), {}
    for place, batch in zip(range(2), trainer.train_loader_x, strict=False):
        trainer.batch_idx = place
        summary = trainer.forward_backward(batch)
        trainer.check_processes(summary)
        found |= {f"{key} {place}": torch.as_tensor(value) for key, value in summary.items()}
    found |= {key: value.detach().clone() for key, value in trainer.model.named_parameters()}
    return found | {"scores": trainer.scores("test")[0]}


def beside_the_towers(room: Path) -> str:
    """Return how a loss of the pixels is refused, of which every process has its part."""
    trainer: Any = toy.toy_trainer(room, "CoOp")
    pixels = next(iter(trainer.train_loader_x))["img"]
    try:
        trainer.check_processes({"loss": pixels.mean()})
    except ConfigError as error:
        return str(error)
    return ""


def train(room: Path, folder: Path, *, stop: bool = False) -> None:
    """Train CoOp for two epochs into ``folder``, going on where a training there stopped; ``stop`` it after the first."""
    options = ("OPTIM.MAX_EPOCH", 2, "INPUT.CACHED_VIEWS", 1, "INPUT.FEATURE_CACHE_DIR", str(folder.with_suffix(".cache")))
    chosen = ("TEST.FINAL_MODEL", "best_val", "INPUT.TRANSFORMS", ("center_crop", "normalize"))
    cfg = toy.toy_cfg(room, "CoOp", "OUTPUT_DIR", str(folder), *options, *chosen, classes="all")
    if not stop:
        run(cfg)
        return
    trainer: Any = toy.toy_trainer(room, "CoOp", "OUTPUT_DIR", str(folder), *options, *chosen, classes="all")

    def end_in_the_second(epoch: int = 1) -> None:
        if trainer.epoch == epoch:
            raise InterruptedError

    trainer.before_epoch = end_in_the_second
    try:
        trainer.train()
    except InterruptedError:
        return


def protocol(room: Path, folder: Path) -> list[RunResult]:
    """Train CoOp on the base classes and test it on both halves, as ``run base-to-new`` does; then again, which is done."""
    settings = toy.toy_settings(room, "CoOp") | {"OPTIM.MAX_EPOCH": 1, "INPUT.FEATURE_CACHE": False}
    said = ("TRAINER.NAME", "DATASET.NAME", "DATASET.ROOT", "OUTPUT_DIR")
    words = [word for key, value in settings.items() if key not in said for word in (key, value)]
    job = Job("base-to-new", "CoOp", "ToyPictures", str(folder), seed=1, settings=tuple(words), root=str(room))
    first = execute(job)
    assert [result.metrics for result in execute(job)] == [result.metrics for result in first]
    return first


def together(room: Path) -> tuple[dict[str, dict[str, torch.Tensor]], str, str]:
    """Go through everything as one of the processes, until the second one is gone without a word.

    Returns:
        What the methods gave, how pixels were refused, and what the first process heard of the second.
    """
    found: dict[str, dict[str, torch.Tensor]] = {}
    refused = ""
    try:
        with group.joined(torch.device("cpu"), "the tests"):
            found |= {name: few_steps(room, name) for name in METHODS}
            refused = beside_the_towers(room)
            train(room, room / "2 to 1", stop=True)
            train(room, room / "2 together")
            protocol(room, room / "2 protocol")
            sys.stdout.write(RUN)
            train(room, room / "1 to 2")
            group.wait()
            if not group.writes():
                sys.stdout.flush()
                os._exit(9)
            group.wait()
    except group.LostProcessError as error:
        return found, refused, str(error)
    return found, refused, ""


def second(words: list[str]) -> int:
    """Be the other process, in the folder that ``words`` name."""
    torch.set_num_threads(1)
    get_plugin_manager()
    DATASET_REGISTRY._entries["ToyPictures"] = toy.ToyPictures
    together(Path(words[0]))
    return 0
