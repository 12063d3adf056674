"""Suite ``step``: whole training steps of methods; for mixtures the text side and its references."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from promptmix.bench import text
from promptmix.bench.measure import Row, measure
from promptmix.bench.world import World, minimum
from promptmix.clip.reference import plain_towers
from promptmix.engine.precision import Precision
from promptmix.prompts.trainer import PromptTrainer

#: Context vectors of a template such as "a photo of a".
_TEMPLATE_CONTEXT = 4


def run(world: World, args: Namespace) -> list[Row]:
    """Return a row for each case, and two for mixtures."""
    rows = []
    for case in args.steps:
        name, batch, classes = case.split(":")
        trainer = world.trainer(name, int(classes), experts=args.experts or 5)
        rows.append(whole(world, trainer, int(batch), args.repeats, also=args.also))
    if args.experts:
        rows.append(text.row(world, args.classes, _TEMPLATE_CONTEXT, args.experts, args.repeats))
        rows.append(_references(world, args.classes, args.experts, args.repeats))
    return rows


def whole(world: World, trainer: PromptTrainer, size: int, repeats: int, also: Sequence[str] = ()) -> Row:
    """Compare a step of ``trainer`` on ``size`` pictures with the plain way.

    Args:
        world: where pictures come from.
        trainer: the method.
        size: pictures in the batch.
        repeats: timed rounds.
        also: names in ``VARIANTS``: our ways again under each; the plain way stays eager and in fp32.

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
    own = [(name, way) for name, way in ways.items() if name != "plain"]
    ways |= {f"{name}, {variant}": _under(VARIANTS[variant], trainer, way) for variant in also for name, way in own}
    least = minimum(trainer, ours)
    work = f"step, {trainer.cfg.TRAINER.NAME}, batch {size}, {trainer.num_classes} classes"
    return Row(work, measure(ways, repeats), least)


def in_full(trainer: PromptTrainer, work: Callable[[], object]) -> Callable[[], None]:
    """Return ``work`` with every token in every layer."""
    return _under(lambda trainer: plain_towers(trainer.clip), trainer, work)


@contextmanager
def _bf16(trainer: PromptTrainer) -> Iterator[None]:
    """``TRAINER.PREC bf16`` inside the context."""
    before, trainer.precision = trainer.precision, Precision("bf16", trainer.device)
    try:
        yield
    finally:
        trainer.precision = before


@contextmanager
def _compiled(trainer: PromptTrainer) -> Iterator[None]:
    """``MODEL.COMPILE`` inside the context; what was compiled once is found again."""
    towers = trainer.clip.text, trainer.clip.image
    before = [(tower, dict(vars(tower))) for tower in towers]
    for tower in towers:
        tower.compile_layers()
    try:
        yield
    finally:
        for tower, state in before:
            vars(tower).update(state)


#: What ``--also`` names.
VARIANTS: dict[str, Callable[[PromptTrainer], AbstractContextManager[None]]] = {"bf16": _bf16, "compiled": _compiled}


def _under(
    variant: Callable[[PromptTrainer], AbstractContextManager[None]], trainer: PromptTrainer, work: Callable[[], object]
) -> Callable[[], None]:
    """Return ``work`` inside the context ``variant``."""

    def run() -> None:
        with variant(trainer):
            work()

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
