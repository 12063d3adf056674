"""What a federated client starts from: read from the checkpoints that the clients of earlier rounds left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from promptmix.engine.checkpoint import read_model
from promptmix.prompts.roles import Component
from promptmix.runs.rounds import NOTE
from promptmix.utils import get_logger, read_json

#: The model that clients share.
MODEL = "prompt_learner"


def choose_others(client: int, prompts: Mapping[int, Tensor], order: Sequence[int], count: int, selection: str) -> list[int]:
    """Return the clients, at most ``count``, whose prompts a client gets.

    Args:
        client: who asks.
        prompts: contexts of those that have trained, by client.
        order: of ``random``: the first of it that have trained and are others.
        count: K - 1.
        selection: ``nearest`` takes those whose contexts have the smallest Euclidean distance to the client's own, nearest first,
            and all in the order of their numbers where there are no more; a client that has not trained gets those of ``random``.
    """
    if selection == "random" or client not in prompts:
        return [other for other in order if other != client and other in prompts][:count]
    others = [other for other in sorted(prompts) if other != client]
    if len(others) <= count:
        return others
    return sorted(others, key=lambda other: float((prompts[other].double() - prompts[client].double()).norm()))[:count]


def weighted_average(tensors: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Return the mean of tensors of one shape, weighted by numbers of training pictures."""
    shares = torch.tensor(sizes, dtype=torch.float64) / sum(sizes)
    found: Tensor = torch.stack([share * tensor.double() for share, tensor in zip(shares, tensors, strict=True)]).sum(dim=0)
    return found.to(tensors[0].dtype)


class Past:
    """The rounds so far.

    Args:
        rounds: round -> client -> folder of its run.
        borrow: how many other clients' tensors a client gets.
        selection: which, see ``choose_others``.
        order: of the selection ``random``.
    """

    def __init__(self, rounds: Mapping[int, Mapping[int, Path]], borrow: int, selection: str, order: Sequence[int]) -> None:
        self.rounds, self.borrow, self.selection, self.order = rounds, borrow, selection, order

    @cached_property
    def latest(self) -> dict[int, dict[str, Any]]:
        """Checkpoint of each client that has trained, of its last round."""
        folders = {client: folder for number in sorted(self.rounds) for client, folder in self.rounds[number].items()}
        return {client: read_model(folder / MODEL)[0] for client, folder in folders.items()}

    @cached_property
    def average(self) -> dict[str, Tensor]:
        """Average of what the last round's clients learned, by name; empty before the first."""
        if not self.rounds:
            return {}
        folders = self.rounds[max(self.rounds)]
        states = [self.latest[client]["state_dict"] for client in folders]
        sizes = [len(read_json(folder / NOTE)["train"]) for folder in folders.values()]
        shared = [key for key, value in states[0].items() if all(state[key].shape == value.shape for state in states)]
        return {key: weighted_average([state[key] for state in states], sizes) for key in shared}

    def everything(self, client: int) -> dict[str, Any]:
        """Return all that the client's start can depend on, for a digest."""
        states = {other: found["state_dict"] for other, found in sorted(self.latest.items())}
        return {"average": self.average, "states": states, "optimizer": self.latest.get(client, {}).get("optimizer")}

    def give(self, trainer: Any, client: int) -> None:  # a PromptTrainer
        """Put what the client starts from into its new trainer."""
        if not self.rounds:
            return
        model, mine = trainer.model, self.latest.get(client)
        stays, borrowed = names_of(model)
        state = dict(model.state_dict())
        for key in state:
            if key in borrowed:
                lent = {other: found["state_dict"][borrowed[key]] for other, found in self.latest.items()}
                others = choose_others(client, lent, self.order, self.borrow, self.selection)
                get_logger().info("%s: of clients %s", key, ", ".join(map(str, others)) or "none")
                state[key] = torch.cat([lent[other] for other in others]) if others else state[key]
            elif key in stays:
                state[key] = mine["state_dict"][key] if mine else state[key]
            else:
                state[key] = self.average[key]
        model.load_state_dict(dict(model.fit_state(state)))
        optimizer = trainer._optims.get(MODEL)
        if mine and mine.get("optimizer") and optimizer is not None:  # its momentum; rates are the schedule's, which begins anew
            optimizer.load_state_dict({**optimizer.state_dict(), "state": mine["optimizer"]["state"]})


def names_of(model: torch.nn.Module) -> tuple[set[str], dict[str, str]]:
    """Return the tensors of a learner that stay with a client, and those that are borrowed, with the name of what they are."""
    stays: set[str] = set()
    borrowed: dict[str, str] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, Component):
            inside = f"{prefix}." if prefix else ""
            stays |= {inside + key for key in module.state_dict()} if module.stays_local else set()
            borrowed |= {inside + mine: inside + theirs for mine, theirs in module.borrows.items()}
    return stays, borrowed
