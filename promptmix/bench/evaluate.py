"""Suite ``eval``: a whole evaluation, decoding included, against the plain way and against image tower and decoding alone."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from types import MethodType

import torch
from torch import Tensor

from promptmix.bench.measure import Row, measure
from promptmix.bench.world import World, minimum
from promptmix.clip.reference import plain_towers
from promptmix.prompts.trainer import PromptTrainer


def run(world: World, args: Namespace) -> list[Row]:
    """Return a row for each case."""
    return [_row(world, *case.split(":"), repeats=args.repeats) for case in args.evaluations]


def _row(world: World, name: str, pictures: str, classes: str, *, repeats: int) -> Row:
    trainer = world.trainer(name, int(classes), "INPUT.FEATURE_CACHE", False, test_pictures=int(pictures))
    ways: dict[str, Callable[[], object]] = {
        "plain": lambda: _plain_test(trainer),
        "ours": trainer.test,
        "image tower and decoding alone": lambda: _images_alone(trainer),
    }
    if trainer.model.image_is_frozen:
        folder = str(world.folder / "cache")
        cached = world.trainer(name, int(classes), "INPUT.FEATURE_CACHE_DIR", folder, test_pictures=int(pictures))
        cached.test()
        ways["ours, cached test features"] = cached.test
    work = f"evaluation, {name}, {pictures} pictures, {classes} classes"
    return Row(work, measure(ways, repeats), minimum(trainer, trainer.test))


def infer_plainly(self: PromptTrainer, images: Tensor) -> Tensor:
    """Score a batch as the authors' code does: the text side is encoded anew for each batch."""
    with self.precision.autocast():
        return self.model.logits(self.encode_images(images), self.model.classifier()).float()


def _plain_test(trainer: PromptTrainer) -> None:
    trainer.model_inference = MethodType(infer_plainly, trainer)  # type: ignore[method-assign]
    try:
        with plain_towers(trainer.clip):
            trainer.test()
    finally:
        del trainer.model_inference


@torch.no_grad()
def _images_alone(trainer: PromptTrainer) -> None:
    for batch in trainer.test_loader:
        trainer.clip.encode_image(trainer.parse_batch_test(batch)[0])
