"""A protocol for promptmix."""

from __future__ import annotations

from promptmix import hookimpl
from promptmix.registry import Registry
from promptmix.runs.protocols import Protocol

MyPart = Protocol(
    "train on the base classes, test on base and new ones and on other data sets",
    part="base",
    classes="base",
    new=True,
    targets={"EmojiConcepts": ("EmojiFamilies",)},
)


@hookimpl
def register_protocols(registry: Registry) -> None:
    registry.register(MyPart, name="MyPart")
