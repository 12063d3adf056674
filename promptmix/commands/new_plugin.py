"""``promptmix new-plugin``: write a package of your own that adds one part, ready to install."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import keyword
import re
import shlex
import sys
import tempfile
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from promptmix.errors import UserError

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9]*(-[A-Za-z0-9]+)*")
_SUMMARY = "A part for promptmix."


@dataclass(frozen=True)
class Kind:
    """What one kind of part needs beside its skeleton ``promptmix/skeletons/<kind>.py``.

    Attributes:
        registry: the plural that ``promptmix list`` and the hook ``register_<plural>`` use; "" = it implements another hook.
        use: what follows ``promptmix`` on a command line that puts the part to use.
    """

    registry: str
    use: str


_TRAIN = "train --config-file configs/quickstart.yaml --seed 1 --output-dir runs/my_part"
_RUN = "--config-file configs/trainers/CoOp/tiny.yaml --trainer CoOp --seeds 1 --shots 4 --output-dir runs/my_part"
_SELECT = "PROTOCOL.ACTIVE.SELECTOR MyPart PROTOCOL.ACTIVE.ROUNDS 3"

KINDS = {
    "router": Kind("routers", f"{_TRAIN} --trainer MoCoOp ROUTER.NAME MyPart"),
    "prompt-bank": Kind("prompt_banks", f"{_TRAIN} --trainer Mixture PROMPT_BANK.NAME MyPart"),
    "head": Kind("heads", f"{_TRAIN} --trainer Mixture HEAD.NAME MyPart"),
    "text-supervision": Kind("text_supervisions", f"{_TRAIN} --trainer Mixture TEXT_SUPERVISION.NAME MyPart"),
    "distiller": Kind("distillers", f"{_TRAIN} --trainer Mixture DISTILLER.NAME MyPart"),
    "trainer": Kind("trainers", f"{_TRAIN} --trainer MyPart"),
    "dataset": Kind("datasets", f"{_TRAIN} --trainer CoOp --root DATA DATASET.NAME MyPart"),
    "backbone": Kind("backbones", f"{_TRAIN} --trainer CoOp MODEL.BACKBONE.NAME MyPart INPUT.SIZE '[32, 32]'"),
    "logger": Kind("", f"{_TRAIN} --trainer CoOp"),
    "protocol": Kind("protocols", f"run MyPart --datasets EmojiConcepts {_RUN}"),
    "selector": Kind("selectors", f"run active --datasets EmojiFamilies {_RUN} {_SELECT}"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("name", metavar="NAME", help="what it is called, as spelled, such as TCP or cosine-router")
    parser.add_argument("--kind", choices=tuple(KINDS), default="router", help="what it adds (default: router)")
    parser.add_argument("--summary", default="", help="one line on what it does, for its README and docstring")
    parser.add_argument("--directory", default=".", metavar="DIR", help="where to put the folder (default: here)")


def run(args: argparse.Namespace) -> int:
    """Write the package and say how to go on."""
    texts = package(args.name, args.kind, args.summary)
    folder = Path(args.directory, _package(args.name))
    if folder.exists():
        raise UserError(f"{folder} is there already; choose another NAME or --directory")
    _refuse_taken(args.name, KINDS[args.kind].registry)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent) as scratch:
            made = Path(scratch, folder.name)
            for path, text in texts.items():
                (made / path).parent.mkdir(parents=True, exist_ok=True)
                (made / path).write_text(text, encoding="utf-8")
            made.rename(folder)
    except OSError as error:
        raise UserError(f"{folder} can't be written: {error.strerror or error}; choose another --directory") from error
    # A path, not a name: names belong to whoever takes them first in a package index.
    here = str(folder) if folder.is_absolute() else f"./{folder}"
    sys.stdout.write(f"{folder}: {', '.join(texts)}\nNext: pip install -e {shlex.quote(here)}, then see {folder / 'README.md'}\n")
    return 0


def package(name: str, kind: str, summary: str = "") -> dict[str, str]:
    """Return a package's files, relative path to text.

    Args:
        name: what the part is called. The class keeps this spelling, without hyphens (``TCP``; ``cosine-router`` in small letters
            becomes ``CosineRouter``); the package is ``promptmix-`` and the name in small letters.
        kind: a key of ``KINDS``.
        summary: one line on what it does.

    Raises:
        UserError: the name is not words of letters and digits joined by hyphens, or means something in Python or in the skeleton,
            or the summary would break a docstring.
    """
    short = _short(name)
    if not _NAME.fullmatch(short) or short.lower() == "promptmix" or not name.isascii():
        raise UserError(f"NAME {name!r} must be words of letters and digits joined by hyphens, such as TCP or cosine-router")
    if any(character in summary for character in '"\\') or not summary.isprintable():
        raise UserError("--summary must be one line without quotes and backslashes; write those in the README")
    part, skeleton = KINDS[kind], _read(f"{kind.replace('-', '_')}.py")
    if keyword.iskeyword(_class(name)) or _class(name) in _names(skeleton):
        raise UserError(f"NAME {name}: {_class(name)} means something else in the skeleton; choose another NAME")
    summary = summary or f"A {kind.replace('-', ' ')} for promptmix."
    module = f"{_package(name).replace('-', '_')}.py"
    texts = {
        "setup.py": _read("_setup.py").replace(_SUMMARY, summary),
        "README.md": _read("README.md").replace(_SUMMARY, summary).replace("--use", part.use),
        module: re.sub(r'^""".*"""', lambda _: f'"""{summary}"""', skeleton, count=1),
        f"tests/test_{module.removeprefix('promptmix_')}": _read("_test.py" if part.registry else "_test_logger.py"),
    }
    words = {
        "MyPart": _class(name),
        "MYPART": _class(name).upper(),
        "promptmix-my-part": _package(name),
        "promptmix_my_part": module.removesuffix(".py"),
        "my_part": module.removeprefix("promptmix_").removesuffix(".py"),
        "list parts": f"list {part.registry or 'plugins'}",
        '"parts"': f'"{part.registry}"',
    }
    pattern = re.compile("|".join(sorted(map(re.escape, words), key=len, reverse=True)))
    return {path: pattern.sub(lambda found: words[found.group()], _as_strangers(text)) for path, text in texts.items()}


def _as_strangers(text: str) -> str:
    """Put a module's imports of promptmix among those of other packages, where a linter wants them outside of promptmix."""
    blocks = text.split("\n\n")
    for i, (before, block) in enumerate(zip(blocks, blocks[1:], strict=False)):
        others = before.startswith(("import ", "from ")) and re.split(r"[ .\n]", before)[1] not in sys.stdlib_module_names
        if others and block.startswith("from promptmix"):
            lines = sorted([*before.split("\n"), *block.split("\n")], key=lambda line: (line.startswith("from"), line.split()[1]))
            return "\n\n".join([*blocks[:i], "\n".join(lines), *blocks[i + 2 :]])
    return text


def _read(name: str) -> str:
    return files("promptmix.skeletons").joinpath(name).read_text(encoding="utf-8")


def _short(name: str) -> str:
    return name[len("promptmix-") :] if name.lower().startswith("promptmix-") else name


def _package(name: str) -> str:
    return f"promptmix-{_short(name).lower()}"


def _class(name: str) -> str:
    return "".join(word.capitalize() if word.islower() else word for word in _short(name).split("-"))


def _names(source: str) -> set[str]:
    """Return the names that a module uses but for its own part's."""
    tree = ast.parse(source)
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    imported = {alias.asname or alias.name for node in ast.walk(tree) for alias in getattr(node, "names", []) if alias}
    return (used | imported) - {"MyPart"}


def _refuse_taken(name: str, kind: str) -> None:
    """Refuse what could not be loaded later: two modules, or two parts, of one name."""
    from promptmix.plugin_manager import get_plugin_manager
    from promptmix.registry import REGISTRIES

    get_plugin_manager()
    module = _package(name).replace("-", "_")
    if importlib.util.find_spec(module) is not None:
        raise UserError(f"NAME {name}: a module {module} is installed already; choose another NAME")
    registry = REGISTRIES.get(kind, ())
    # Config nodes are in upper case, so that names must differ in more than that.
    for entry in registry:
        if entry.upper() == _class(name).upper():
            raise UserError(f"NAME {name}: {entry} is taken by {REGISTRIES[kind].origin(entry)}; choose another NAME")
