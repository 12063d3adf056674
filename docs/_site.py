"""What mkdocs builds besides the pages in this folder: pages of methods, roles and keys, and the repository's own.

mkdocs calls the ``on_...`` functions; see ``mkdocs.yml``.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from tabulate import tabulate

from promptmix.commands.list import _keys
from promptmix.plugin_manager import get_plugin_manager
from promptmix.registry import REGISTRIES, TRAINER_REGISTRY, Registry

ROOT = Path(__file__).resolve().parent.parent
#: Pages that live elsewhere in the repository, with where they stand on the site.
ELSEWHERE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "speed.md",
    "benchmarks/methods.md": "comparison.md",
    "promptmix/assets/README.md": "embedded.md",
}
_LINK = re.compile(r"\[([^\[\]]+)\]\((?!https?:|mailto:|#)([^)\s#]+)(#[^)\s]*)?\)")


def on_config(config: MkDocsConfig) -> None:
    """Put the methods' pages into the navigation."""
    for entry in config.nav or []:
        if entry.get("Methods") == "methods":
            entry["Methods"] = ["methods/index.md", *(f"methods/{name}.md" for name in _methods())]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is generated."""
    for target, text in _generated():
        files.append(File.generated(config, target, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links between files of the repository lead to their pages; what has none stays as words."""
    at = {target: source for source, target in ELSEWHERE.items()}
    source = at.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def moved(found: re.Match[str]) -> str:
        label, path, anchor = found.groups()
        inside = os.path.normpath(os.path.join(os.path.dirname(source), path))
        target = ELSEWHERE.get(inside, inside.removeprefix("docs/"))
        if files.get_file_from_path(target) is None:
            return label  # a file of the repository that is no page
        return f"[{label}]({os.path.relpath(target, os.path.dirname(page.file.src_uri) or '.')}{anchor or ''})"

    return _LINK.sub(moved, markdown)


def _generated() -> Iterator[tuple[str, str]]:
    get_plugin_manager()
    for source, target in ELSEWHERE.items():
        yield target, (ROOT / source).read_text(encoding="utf-8")
    yield "methods/index.md", _overview()
    for name in _methods():
        yield f"methods/{name}.md", _method(name)
    yield "parts.md", _parts()
    yield "keys.md", "# Every key\n\n" + _table(_keys(""))


def _methods() -> list[str]:
    get_plugin_manager()
    return sorted(TRAINER_REGISTRY, key=str.lower)


def _overview() -> str:
    """Return README's table of methods, each name leading to its page."""
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| (.+)$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    names = set(_methods())
    lines = ["# Methods", "", "| method | paper | in one line | backbone |", "| --- | --- | --- | --- |"]
    for shown, rest in rows:
        if names.issuperset(re.findall(r"`(\w+)`", shown)):
            lines.append("| " + re.sub(r"`(\w+)`", r"[`\1`](\1.md)", shown) + f" | {rest}")
    return "\n".join(lines) + "\n"


def _method(name: str) -> str:
    """Return a method's page: its file's docstring (paper, symbols, deviations), its settings, its configs."""
    trainer = TRAINER_REGISTRY.get(name)
    text = _markdown(inspect.getmodule(trainer).__doc__ or "")
    heading, _, rest = text.partition("\n")
    folder = ROOT / "configs" / "trainers" / name
    configs = [f"configs/trainers/{name}/{path.name}" for path in sorted(folder.glob("*.yaml"))]
    own = [row for row in _keys("") if row[0].startswith(f"TRAINER.{name.upper()}.")]
    keys = _table(own) if own else "None of its own."
    example = (
        f"promptmix train --trainer {name} --config-file configs/trainers/{name}/tiny.yaml --seed 1 --output-dir output/{name}"
    )
    parts = [f"# {heading}", rest, "## Settings", keys, "## Configs", "\n".join(f"- `{path}`" for path in configs) or "None."]
    return "\n\n".join([*parts, "## Try it", f"```bash\n{example}\n```"]) + "\n"


def _parts() -> str:
    """Return every part of each role with its docstring's first paragraph and its settings."""
    lines = ["# Built-in parts", "", "What a mixture is made of; names are for YAML (`ROUTER.NAME TopK`).", ""]
    for kind in ("prompt_banks", "routers", "heads", "text_supervisions", "distillers"):
        lines += [f"## {kind.replace('_', ' ').capitalize()}", ""]
        for name, part in _entries(REGISTRIES[kind]):
            lines += [f"### {name}", "", _markdown(inspect.getdoc(part) or "").partition("\n\n")[0], ""]
    return "\n".join(lines)


def _entries(registry: Registry) -> Iterator[tuple[str, Any]]:
    for name in sorted(registry):
        yield name, registry.get(name)


def _table(rows: list[tuple[str, str, str, str]]) -> str:
    cells = [(f"`{key}`", f"`{default}`", _cell(takes), _cell(meaning)) for key, default, takes, meaning in rows]
    return tabulate(cells, headers=("Key", "Default", "Takes", "Meaning"), tablefmt="github", disable_numparse=True) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")


def _markdown(docstring: str) -> str:
    """Return a docstring as Markdown: literals have one backtick there, and addresses are links."""
    return re.sub(r"(?<![<(])(https?://[^\s|)]+[\w/])", r"<\1>", re.sub(r"``(.+?)``", r"`\1`", inspect.cleandoc(docstring)))
