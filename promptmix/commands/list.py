"""``promptmix list``: every registry entry, hook and plugin, and where it came from."""

from __future__ import annotations

import argparse
import sys

from promptmix.errors import UserError
from promptmix.registry import REGISTRIES, closest

KINDS = (*REGISTRIES, "hooks", "plugins")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("kind", nargs="?", default="", help=f"one of {', '.join(KINDS)}; default: all but hooks, plugins")
    parser.add_argument("--plugin", action="append", default=[], metavar="MODULE|FILE", help="load a plugin first")


def run(args: argparse.Namespace) -> int:
    """Print the tables."""
    return show(args.kind, args.plugin)


def show(kind: str, plugins: list[str]) -> int:
    """Print one kind, or every registry.

    Args:
        kind: one of ``KINDS`` or "".
        plugins: plugins to load before.

    Raises:
        UserError: an unknown kind.
    """
    from tabulate import tabulate

    from promptmix.config.flags import load_plugins

    kind = kind.replace("-", "_")
    if kind and kind not in KINDS:
        raise UserError(f"unknown kind {kind!r}{closest(kind, list(KINDS))} (kinds: {', '.join(KINDS)})")
    load_plugins(plugins)
    tables = {"hooks": (("Hook", "Fires"), _hooks), "plugins": (("Plugin", "Implements"), _plugins)}
    if kind in tables:
        headers, rows = tables[kind]
        sys.stdout.write(tabulate(rows(), headers=headers) + "\n")
        return 0
    entries = [
        (name if first else "", entry, registry.origin(entry))
        for name, registry in REGISTRIES.items()
        if kind in ("", name)
        for first, entry in zip([True, *[False] * len(registry)], registry, strict=False)
    ]
    sys.stdout.write(tabulate(entries, headers=("Kind", "Name", "From")) + "\n")
    return 0


def _hooks() -> list[tuple[str, str]]:
    from promptmix import hookspecs

    specs = {name: spec for name, spec in vars(hookspecs).items() if hasattr(spec, "promptmix_spec")}
    return [(name, (spec.__doc__ or "").split(":")[0].strip()) for name, spec in specs.items()]


def _plugins() -> list[tuple[str, str]]:
    from promptmix.plugin_manager import get_plugin_manager

    manager = get_plugin_manager()
    rows = []
    for name, plugin in sorted(manager.list_name_plugin()):
        hooks = sorted(caller.name for caller in manager.get_hookcallers(plugin) or [])
        if hooks:  # helper modules of the built-in rooms implement none
            rows.append((name, ", ".join(hooks)))
    return rows
