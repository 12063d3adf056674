"""Protocol ``federated``: clients with pictures of their own train in rounds and share what they learned.

It is pFedMoAP's (arXiv 2410.10114), for any method; with CoOp it is federated averaging of prompts.

A round: some clients are drawn; each starts from the average of what the last round's clients learned, weighted by their
numbers of training pictures, trains on its own pictures, and is tested on its own test pictures among all classes. What a part
says to stay (``Component.stays_local``: pFedMoAP's gate) goes on from the client's own last round, what it says to borrow
(``Component.borrows``: prompts of others) comes from other clients' last rounds, chosen by
``promptmix.runs.server.choose_others``. Before anybody has trained, all start alike and nothing is borrowed. There is no
server process: what a client starts from follows from the checkpoints of earlier rounds, so that clients are jobs of any sweep
backend.

Against the authors' code: each client keeps its own gate and its optimizer's state, and its schedule begins anew in each
round, where theirs hand all three from client to client; ``nearest`` is what they describe, where theirs stops once there is a
choice.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from promptmix.config.declare import Setting
from promptmix.errors import ConfigError
from promptmix.hookspecs import hookimpl
from promptmix.registry import Registry
from promptmix.runs.protocols import Job, Part
from promptmix.runs.rounds import Rounds, built, read_note

if TYPE_CHECKING:
    import numpy as np

    from promptmix.runs.results import RunResult


@dataclass(frozen=True)
class Plan:
    """Who trains on what, and what is shared."""

    clients: Annotated[int, Setting("clients", low=1, high=1000)] = 10
    fraction: Annotated[float, Setting("share of the clients that train in a round, at least one", above=0, high=1)] = 1.0
    rounds: Annotated[int, Setting("rounds; OPTIM.MAX_EPOCH counts a client's epochs in each", low=1, high=1000)] = 10
    num_experts: Annotated[int, Setting("K: prompts of a client, its own one included", low=1)] = 10
    selection: Annotated[str, Setting("whose prompts a client gets", choices=("nearest", "random"))] = "nearest"
    split: Annotated[
        str,
        Setting(
            "classes: own classes for each client; dirichlet: shares of each class; domains: a domain each",
            choices=("classes", "dirichlet", "domains"),
        ),
    ] = "classes"
    beta: Annotated[float, Setting("dirichlet: concentration; small = clients differ much", above=0)] = 0.5
    split_seed: Annotated[int, Setting("of the split, the same for every SEED", low=0, high=2**32 - 1)] = 2023


def split_pictures(plan: Plan, train: Sequence[Any], test: Sequence[Any], classes: int) -> list[tuple[list[int], list[int]]]:
    """Return each client's places in the training and in the test pictures (items with ``label`` and ``domain``).

    ``classes`` shuffles the classes and gives every client round(C / clients) of them, the last one the rest.

    Raises:
        ConfigError: a client would have no training or no test pictures.
    """
    import numpy as np

    if plan.split == "classes":
        order = list(range(classes))
        random.Random(plan.split_seed).shuffle(order)
        each = round(classes / plan.clients)
        ends = [min(each * (i + 1), classes) for i in range(plan.clients - 1)] + [classes]
        own = [set(order[begin:end]) for begin, end in zip([0, *ends], ends, strict=False)]
        found = [tuple([i for i, item in enumerate(items) if item.label in kept] for items in (train, test)) for kept in own]
    elif plan.split == "domains":
        names = sorted({item.domain for item in train})
        if len(names) != plan.clients:
            raise ConfigError(
                f"PROTOCOL.FEDERATED.CLIENTS is {plan.clients}, but SPLIT 'domains' gives one to each of {len(names)} domains of "
                f"the training pictures; set it to {len(names)}, or change DATASET.SOURCE_DOMAINS"
            )
        found = [tuple([i for i, item in enumerate(items) if item.domain == name] for items in (train, test)) for name in names]
    else:
        draws = np.random.RandomState(plan.split_seed)
        shares = draws.dirichlet(np.repeat(plan.beta, plan.clients), size=classes)
        halves = [_by_shares(items, shares, draws) for items in (train, test)]
        found = list(zip(*halves, strict=True))
    lacking = next((i for i, parts in enumerate(found) if not all(parts)), None)
    if lacking is not None:
        raise ConfigError(
            f"PROTOCOL.FEDERATED.CLIENTS is {plan.clients} with SPLIT {plan.split!r}, which leaves client {lacking} without "
            f"training or test pictures ({len(train)} and {len(test)} of {classes} classes in all); lower it, or change SPLIT, "
            "BETA or SPLIT_SEED"
        )
    return [(parts[0], parts[1]) for parts in found]


def _by_shares(items: Sequence[Any], shares: np.ndarray, draws: np.random.RandomState) -> list[list[int]]:
    """Part each class's pictures among clients by its row of ``shares`` (C, clients)."""
    import numpy as np

    found: list[list[int]] = [[] for _ in range(shares.shape[1])]
    for label, row in enumerate(shares):
        places = draws.permutation([i for i, item in enumerate(items) if item.label == label]).astype(int)
        cuts = np.rint(np.cumsum(row)[:-1] * len(places)).astype(int)
        for client, part in enumerate(np.split(places, cuts)):
            found[client] += part.tolist()
    return [sorted(places) for places in found]


def participants(plan: Plan, seed: int, number: int) -> list[int]:
    """Return the clients of round ``number``, drawn without replacement, one draw after another from a generator seeded once."""
    import numpy as np

    draws, count = np.random.RandomState(seed), max(int(plan.fraction * plan.clients), 1)
    drawn = [draws.choice(range(plan.clients), count, replace=False) for _ in range(number + 1)]
    return [int(client) for client in drawn[-1]]


def shuffled_clients(plan: Plan, seed: int) -> list[int]:
    """Return the order in which ``random`` hands out prompts, one for a whole run."""
    order = list(range(plan.clients))
    random.Random(seed).shuffle(order)
    return order


@dataclass(frozen=True)
class Federated(Rounds):
    """Clients in rounds."""

    def parts(self, job: Job) -> list[Part]:
        """Return a part for each client of each round; those of one round don't wait for each other."""
        plan, seed = self.plan_of(job), max(job.seed, 0)
        return [
            self.round_part(job, f"round{number}/client{client}", number)
            for number in range(plan.rounds)
            for client in sorted(participants(plan, seed, number))
        ]

    def inputs(self, job: Job, part: Part, before: Sequence[RunResult]) -> dict[str, Any]:
        """Return the client's pictures, and a digest of what it starts from."""
        from promptmix.files.digests import digest_of
        from promptmix.prompts.trainer import PromptTrainer

        plan, client = self.plan_of(job), _client(part)
        notes = (read_note(job, other) for other in self.parts(job) if _client(other) == client and other.wave < part.wave)
        pictures = next((note for note in notes if note), None)
        if pictures is None:
            with built(job, part) as trainer:
                data = trainer.dm.dataset
                train, test = split_pictures(plan, data.train_x, data.test, trainer.num_classes)[client]
                if not isinstance(trainer, PromptTrainer):
                    raise ConfigError(f"TRAINER.NAME is {job.trainer}, which has no prompt learner to share; choose another")
        else:
            train, test = pictures["train"], pictures["test"]
        return {"train": train, "test": test, "start": digest_of(self._past(job, part).everything(client))}

    def options(self, job: Job, part: Part, before: Sequence[RunResult]) -> dict[str, Any]:
        """Return how the client's trainer is made: as always, then given what it starts from."""
        from promptmix.engine import build_trainer, set_random_seed

        past = self._past(job, part)

        def build(cfg: Any) -> Any:
            trainer: Any = build_trainer(cfg)
            past.give(trainer, _client(part))
            if job.seed >= 0:  # batches and augmentations of its own, after a start that all share
                set_random_seed(zlib.crc32(f"federated/{job.seed}/{part.name}".encode()))
            return trainer

        return {"build": build}

    def _past(self, job: Job, part: Part) -> Any:  # Past, which needs torch
        from promptmix.runs.server import Past

        earlier = [other for other in self.parts(job) if other.wave < part.wave]
        rounds: dict[int, dict[int, Path]] = {}
        for other in earlier:
            rounds.setdefault(other.wave, {})[_client(other)] = Path(job.folder, other.name)
        plan = self.plan_of(job)
        return Past(rounds, plan.num_experts - 1, plan.selection, shuffled_clients(plan, max(job.seed, 0)))


def _client(part: Part) -> int:
    return int(part.name.rpartition("client")[2])


FEDERATED = Federated("clients train in rounds and share prompts", part="round0", classes="all", plan=Plan, parallel=True)


@hookimpl
def register_protocols(registry: Registry) -> None:
    """Add the protocol."""
    registry.register(FEDERATED, name="federated")
