"""Two test pictures of each class of the embedded data sets: hundreds say no more and take minutes to encode."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest


def few_emoji(patch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Leave the embedded data sets few pictures for the test; return what does it, which stops where its ``off`` is True."""
    from promptmix.data.datasets.emoji import _EmojiBase

    make = _EmojiBase.__init__

    def few(self: Any, cfg: Any, classes: Any, train: Any, val: Any, test: Any) -> None:
        kept = defaultdict(list)
        for item in test:
            kept[item.domain, item.label].append(item)
        make(self, cfg, classes, train, val, test if few.off else [item for items in kept.values() for item in items[:2]])

    few.off = False  # type: ignore[attr-defined]
    patch.setattr(_EmojiBase, "__init__", few)
    return few
