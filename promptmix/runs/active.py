"""Protocol ``active``: rounds of choosing pictures, labelling and training anew (PCB, arXiv 2311.11178); for any method.

Round 0 labels pictures at random. In every later one a selector looks at the pool with the model of the last round and
proposes candidates, of which the balance picks those whose predicted classes have the fewest labels. Labels come from the
pool's truth, each round trains from the start on all labels so far, and is tested on the whole test part.

Against the authors' code: selections are theirs (``tests/plugins/test_selectors.py``), but for a class that is left without
candidates: it counts as served here, where theirs stays the rarest and makes the rest of the round random (``COUNT_MISSING
False`` is that). Without ``BALANCE``, which theirs can't do, the selector's first pictures are taken.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

from promptmix.config.declare import Setting
from promptmix.errors import ConfigError
from promptmix.hookspecs import hookimpl
from promptmix.registry import SELECTOR_REGISTRY, Registry
from promptmix.runs.protocols import Job, Part
from promptmix.runs.rounds import Rounds, built, read_note

if TYPE_CHECKING:
    from promptmix.runs.results import RunResult
    from promptmix.runs.selection import Draws


@dataclass(frozen=True)
class Plan:
    """How labels are bought."""

    rounds: Annotated[int, Setting("rounds, the first at random", low=1, high=1000)] = 8
    query: Annotated[int, Setting("pictures labelled in each round; 0 = as many as classes", low=0)] = 0
    selector: Annotated[str, Setting("a name of the selector registry (`promptmix list selectors`)")] = "badge"
    balance: Annotated[bool, Setting("PCB: of the candidates, those whose predicted classes have the fewest labels")] = True
    gamma: Annotated[float, Setting("candidates for the balance, as a share of the whole pool", above=0, high=1)] = 0.1
    count_missing: Annotated[bool, Setting("a class without candidates counts as served; False: as published")] = True


@dataclass(frozen=True)
class Active(Rounds):
    """Rounds of labelling."""

    def parts(self, job: Job) -> list[Part]:
        """Return one part for each round."""
        return [self.round_part(job, f"round{number}", number) for number in range(self.plan_of(job).rounds)]

    def check(self, job: Job) -> None:
        """Refuse an unknown selector."""
        super().check(job)
        SELECTOR_REGISTRY.get(self.plan_of(job).selector)

    def inputs(self, job: Job, part: Part, before: Sequence[RunResult]) -> dict[str, Any]:
        """Return the pictures that are labelled in this round, and in all so far."""
        from promptmix.runs.selection import Draws

        plan = self.plan_of(job)
        # A seed below 0 is none: then the note alone remembers what was drawn.
        draws = Draws(zlib.crc32(f"active/{job.seed}/{part.wave}".encode()) if job.seed >= 0 else None)
        if part.wave == 0:
            with built(job, part) as trainer:
                pool, query = trainer.dm.dataset.train_x, plan.query or trainer.num_classes
            if plan.rounds * query > len(pool):
                raise ConfigError(
                    f"PROTOCOL.ACTIVE.ROUNDS is {plan.rounds}, each of {query} labels, but the pool has {len(pool)} pictures; "
                    "lower ROUNDS or QUERY, or give --shots -1"
                )
            picked = draws.python.sample(range(len(pool)), query)
            return {"picked": picked, "train": picked}
        last = replace(part, name=f"round{part.wave - 1}", wave=part.wave - 1)
        labelled = (read_note(job, last) or {})["train"]
        picked = self._select(job, last, plan, labelled, draws)
        return {"picked": picked, "train": [*labelled, *picked]}

    def _select(self, job: Job, last: Part, plan: Plan, labelled: list[int], draws: Draws) -> list[int]:
        """Return the next pictures, as the model of the last round sees the pool."""
        from promptmix.prompts.look import look_at
        from promptmix.prompts.trainer import PromptTrainer
        from promptmix.runs.selection import Pool, balanced

        with built(job, last, trained=True) as trainer:
            if not isinstance(trainer, PromptTrainer):
                raise ConfigError(f"TRAINER.NAME is {job.trainer}, whose features selectors can't see; choose a prompt trainer")
            items = trainer.dm.dataset.train_x
            features, logits = look_at(trainer, items)
            classes = trainer.num_classes
        pool = Pool(features.numpy(), logits.numpy(), labelled)
        query, selector = plan.query or classes, SELECTOR_REGISTRY.get(plan.selector)()
        more = plan.balance and selector.proposes_more
        count = min(max(query, int(plan.gamma * len(items))), len(pool.unlabelled)) if more else query
        candidates = selector.select(pool, count, draws)
        if not plan.balance:
            return list(candidates)
        seen = Counter(items[index].label for index in labelled)
        counts = [seen[label] for label in range(classes)]
        return balanced(candidates, pool.predicted, counts, query, draws.python, count_missing=plan.count_missing)[0]


@hookimpl
def register_protocols(registry: Registry) -> None:
    """Add the protocol."""
    registry.register(ACTIVE, name="active")


ACTIVE = Active("rounds of choosing pictures, labelling, training anew", part="round0", classes="all", plan=Plan, shots=-1)
