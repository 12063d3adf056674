"""Suite ``step``: whole training steps of methods; for mixtures the text side and its references."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable

from promptmix.bench import text
from promptmix.bench.measure import Row, measure
from promptmix.bench.world import World, minimum
from promptmix.clip.reference import plain
from promptmix.engine.precision import Precision
from promptmix.prompting import PromptTrainer

#: Context vectors of a template such as "a photo of a".
_TEMPLATE_CONTEXT = 4


def run(world: World, args: Namespace) -> list[Row]:
    """Return a row for each case, and two for mixtures."""
    rows = []
    for case in args.steps:
        name, batch, classes = case.split(":")
        trainer = world.trainer(name, int(classes), experts=args.experts or 5)
        rows.append(whole(world, trainer, int(batch), args.repeats, bf16=args.bf16))
    if args.experts:
        rows.append(text.row(world, args.classes, _TEMPLATE_CONTEXT, args.experts, args.repeats))
        rows.append(_references(world, args.classes, args.experts, args.repeats))
    return rows


def whole(world: World, trainer: PromptTrainer, size: int, repeats: int, *, bf16: bool = False) -> Row:
    """Compare a step of ``trainer`` on ``size`` pictures with the plain way.

    Args:
        world: where pictures come from.
        trainer: the method.
        size: pictures in the batch.
        repeats: timed rounds.
        bf16: also with the towers under bf16 autocast; the plain way stays in fp32.

    Returns:
        A row with cached views too, where they may be kept.
    """
    pictures = world.batch(trainer, size)

    def ours() -> None:
        trainer.forward_backward(pictures)

    ways: dict[str, Callable[[], object]] = {"plain": in_full(trainer, ours), "ours": ours}
    if trainer.model.image_is_frozen:
        features = world.batch(trainer, size, features=True)
        ways["ours, cached views"] = lambda: trainer.forward_backward(features)
    if bf16:
        half = Precision("bf16", trainer.device)
        ways |= {f"{name}, bf16": _under(trainer, half, way) for name, way in list(ways.items())[1:]}
    least = minimum(trainer, ours)
    work = f"step, {trainer.cfg.TRAINER.NAME}, batch {size}, {trainer.num_classes} classes"
    return Row(work, measure(ways, repeats), least)


def in_full(trainer: PromptTrainer, work: Callable[[], object]) -> Callable[[], None]:
    """Return ``work`` with every prompt at full length."""

    def full() -> None:
        with plain(trainer.clip):
            work()

    return full


def _under(trainer: PromptTrainer, precision: Precision, work: Callable[[], object]) -> Callable[[], None]:
    """Return ``work`` at another precision."""

    def run() -> None:
        before, trainer.precision = trainer.precision, precision
        try:
            work()
        finally:
            trainer.precision = before

    return run


def _references(world: World, classes: int, experts: int, repeats: int) -> Row:
    """Prototypes of each expert's group of three hard templates."""
    trainer = world.trainer("ZeroshotCLIP", classes, experts=experts)
    dataset = trainer.dm.dataset

    def ours() -> None:
        for group in dataset.template_groups:
            world.clip.ensemble(group, dataset.classnames)

    work = f"references, {experts} groups of 3 hard prompts, {classes} classes"
    return Row(work, measure({"plain": in_full(trainer, ours), "ours": ours}, repeats), minimum(trainer, ours))
