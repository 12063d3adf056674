"""``promptmix list``: every registry entry, hook and plugin, and where it came from."""

from __future__ import annotations

import argparse
import sys

from promptmix.errors import UserError
from promptmix.registry import REGISTRIES, closest

KINDS = (*REGISTRIES, "hooks", "plugins", "keys")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add = parser.add_argument
    add("kind", nargs="?", default="", help=f"one of {', '.join(KINDS)}; default: every registry")
    add("name", nargs="?", default="", metavar="NAME", help="keys: a component (TopK), a node (OPTIM) or a key (OPTIM.LR)")
    add("--plugin", action="append", default=[], metavar="MODULE|FILE", help="load a plugin first")
    add("--all", action="store_true", help="backbones: every architecture of open_clip, and which way it takes prompts")


def run(args: argparse.Namespace) -> int:
    """Print the tables."""
    return show(args.kind, args.plugin, args.name, everything=args.all)


def show(kind: str, plugins: list[str], name: str = "", *, everything: bool = False) -> int:
    """Print one kind, or every registry.

    Args:
        kind: one of ``KINDS`` or "".
        plugins: plugins to load before.
        name: of kind ``keys``, what to show the keys of.
        everything: of kind ``backbones``, open_clip's architectures too, and how they run.

    Raises:
        UserError: an unknown kind or name.
    """
    from tabulate import tabulate

    from promptmix.config.flags import load_plugins
    from promptmix.plugin_manager import failed_plugins

    kind = kind.replace("-", "_")
    if kind and kind not in KINDS:
        raise UserError(f"unknown kind {kind!r}{closest(kind, list(KINDS))} (kinds: {', '.join(KINDS)})")
    if name and kind != "keys":
        raise UserError(f"list {kind}: takes no name, but got {name!r}; leave it out, or give `list keys {name}`")
    if everything and kind != "backbones":
        raise UserError(f"list {kind or '(every registry)'}: --all shows more backbones; give `list backbones --all`")
    load_plugins(plugins, lenient=True)
    for error in failed_plugins().values():
        sys.stderr.write(f"note: left out: {error}\n")
    if everything:
        sys.stdout.write(tabulate(_ways(), headers=("Name", "Text", "Visual prompts", "Needs")) + "\n")
        return 0
    if kind == "keys":
        sys.stdout.write(tabulate(_keys(name), headers=("Key", "Default", "Takes", "Meaning"), disable_numparse=True) + "\n")
        return 0
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


def _ways() -> list[tuple[str, str, str, str]]:
    """Return every backbone: how prompts go through its text tower, whether its image tower takes any, and the extra it needs."""
    from promptmix.clip.load import COOP_NAMES, EMBEDDED_NAMES, embedded_spec
    from promptmix.clip.ways import all_ways, way_of
    from promptmix.registry import BACKBONE_REGISTRY

    ways = {way.name: way for way in all_ways()}
    for name in EMBEDDED_NAMES:
        ways[name] = way_of(name, embedded_spec(name)["model_cfg"])
    rows = []
    for name in [*BACKBONE_REGISTRY, *ways]:
        way = ways.get(COOP_NAMES.get(name, name))
        if way is not None:
            rows.append((name, way.text, "yes" if way.visual_prompts else "no", way.needs))
        else:
            rows.append((name, f"as {BACKBONE_REGISTRY.origin(name)} says", "", ""))
    return list(dict.fromkeys(rows))


def _keys(name: str) -> list[tuple[str, str, str, str]]:
    """Return key, default, what it takes and what it means, of all keys or of those of one component, node or key.

    Raises:
        UserError: nothing is called ``name``.
    """
    from promptmix.config import get_cfg, get_key
    from promptmix.config.declare import Setting, all_declared, all_keys

    cfg = get_cfg()
    declared, undeclared = all_declared(cfg), Setting("")  # keys of plugins that add them without a declaration
    rows = []
    for key in all_keys(cfg):
        default, setting = get_key(cfg, key), declared.get(key, undeclared)
        takes = setting.allowed.removeprefix("give ").removeprefix("choose from ")
        rows.append(
            (key, repr(default), takes or type(default).__name__, "; ".join(filter(None, (setting.comment, setting.condition))))
        )
    if not name:
        return rows
    wanted = name.upper().split(".")
    found = [row for row in rows if _names(row[0].split("."), wanted)]
    if not found:
        nodes = sorted({part for key, *_ in rows for part in key.split(".")})
        raise UserError(f"list keys: nothing is called {name!r}{closest(name, nodes)} (`promptmix list keys` shows all)")
    return found


def _names(key: list[str], wanted: list[str]) -> bool:
    """Tell whether ``wanted`` is the key, or one of the nodes above it."""
    return any(key[start : start + len(wanted)] == wanted for start in range(len(key)))


def _hooks() -> list[tuple[str, str]]:
    from promptmix import hookspecs

    specs = {name: spec for name, spec in vars(hookspecs).items() if hasattr(spec, "promptmix_spec")}
    return [(name, (spec.__doc__ or "").split(":")[0].strip()) for name, spec in specs.items()]


def _plugins() -> list[tuple[str, str]]:
    from promptmix.plugin_manager import get_plugin_manager
    from promptmix.registry import marked_classes

    manager = get_plugin_manager()
    rows = []
    for name, plugin in sorted(manager.list_name_plugin()):
        hooks = sorted(caller.name for caller in manager.get_hookcallers(plugin) or [])
        classes = [f"{entry.__name__} ({entry.registry.kind})" for entry in marked_classes(plugin, own=True)]
        if hooks or classes:  # helper modules of built-in packages have none
            rows.append((name, ", ".join([*hooks, *classes])))
    return rows
