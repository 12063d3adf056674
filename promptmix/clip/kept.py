"""Tables that follow from class names and templates alone, made once: no step makes one, or copies it to the device.

They lie in plain dictionaries, since ``torch.compile`` looks into those and takes what it finds, where it would look through a
``functools.lru_cache`` and trace how each table is made.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

Given = ParamSpec("Given")
Table = TypeVar("Table")

#: How many are kept; beyond, the oldest goes.
_SIZE = 256


def find(tables: dict[Hashable, Table], key: Hashable, make: Callable[[], Table], size: int = _SIZE) -> Table:
    """Return ``tables[key]``, made when it is first asked for; ``size`` of them are kept."""
    if key not in tables:
        if len(tables) >= size:
            del tables[next(iter(tables))]
        tables[key] = make()
    return tables[key]


def kept(make: Callable[Given, Table]) -> Callable[Given, Table]:
    """Keep what ``make`` returns for its positional arguments, which are hashable and decide it."""
    tables: dict[Hashable, Table] = {}

    @wraps(make)
    def get(*args: Given.args, **none: Given.kwargs) -> Table:
        return find(tables, args, lambda: _outside(make, *args))

    return get


@torch.inference_mode(False)  # a table made while a teacher runs serves steps that learn too
def _outside(make: Callable[..., Table], *args: Hashable) -> Table:
    return make(*args)
