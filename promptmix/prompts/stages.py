"""Trainings in stages: which tensors learn in which part of the steps, and what happens where a part begins."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import nn

from promptmix.engine.optim import EpochSchedule


@dataclass(frozen=True)
class Stage:
    """One part of a training.

    Attributes:
        learns: the module or the parameters that learn in it; those of the other stages stand still, without a graph.
        share: its part of all steps; the last stage has what is left.
        enter: called when training goes on in it, also after a resume.
        begin: called once, before its first step and without a graph, after ``enter``.
    """

    learns: nn.Module | Iterable[nn.Parameter]
    share: float = 1.0
    enter: Callable[[], None] | None = None
    begin: Callable[[], None] | None = None

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield what learns in it."""
        yield from self.learns.parameters() if isinstance(self.learns, nn.Module) else self.learns


class Stages:
    """The stages of a training in its steps. Where a training is follows from the step, so that a resume needs no more.

    One optimizer serves all stages: a tensor that a stage leaves out has no gradient, so it is neither moved nor decayed, and
    one that begins to learn later has an optimizer's fresh state then.

    Args:
        stages: first to last; none leaves everything as it is.
        steps: of the whole training.
    """

    def __init__(self, stages: Sequence[Stage], steps: int) -> None:
        self.stages = tuple(stages)
        #: First step of each stage, and behind the last one.
        self.bounds = (0, *(int(steps * share) for share in accumulate(stage.share for stage in stages[:-1])), max(steps, 1))
        self._learns = [[p for p in stage.parameters() if p.requires_grad] for stage in stages]
        self._now: int | None = None

    def at(self, step: int) -> int:
        """Return the index of the stage that ``step`` lies in; a stage may have no step at all."""
        return next((i for i, end in enumerate(self.bounds[1:-1]) if step < end), len(self.stages) - 1)

    def turn_to(self, step: int) -> None:
        """Have those tensors learn that the stage of ``step`` trains, and begin it if this is its first step."""
        now = self.at(step)
        if now == self._now or not self.stages:
            return
        self._now, stage = now, self.stages[now]
        for parameters in (*self._learns, self._learns[now]):  # the stage's own last, of which others may have some too
            for parameter in parameters:
                parameter.requires_grad_(parameters is self._learns[now])
        if stage.enter is not None:
            stage.enter()
        if stage.begin is not None and step == self.bounds[now]:
            with torch.no_grad():
                stage.begin()

    def cosine(self, optimizer: torch.optim.Optimizer, last: float) -> EpochSchedule:
        """Return a schedule by step: in each stage anew from the first rate to ``last`` by a cosine."""
        base = float(optimizer.param_groups[0]["lr"])

        def factor(step: int) -> float:
            now = self.at(step)
            first, end = self.bounds[now], self.bounds[now + 1]
            done = (step - first) / max(end - first, 1)
            return (last + (base - last) * (1 + math.cos(math.pi * done)) / 2) / base if base else 0.0

        return EpochSchedule(optimizer, factor)
