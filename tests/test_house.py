"""The plan of the house: which part stands on which floor, who may import whom, and how many modules lie loose."""

import ast
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

#: From the ground up: a part imports what stands on lower floors alone. The package itself (``promptmix``) is the roof.
FLOORS = (
    {"errors", "version"},
    {"registry", "utils", "assets", "files"},
    {"hookspecs"},
    {"plugin_manager"},
    {"console"},
    {"config"},
    {"clip", "cost"},
    {"data"},
    {"engine"},
    {"prompts"},
    {"runs"},
    {"tables", "predict", "dassl"},
    {"bench"},
    {"commands"},
    {"cli"},
    {"promptmix"},
)
FLOOR = {part: number for number, parts in enumerate(FLOORS) for part in parts}


def modules():
    """Every module of the core: dotted name to file."""
    found = {}
    for path in (ROOT / "promptmix").rglob("*.py"):
        if "skeletons" in path.parts:  # packages to be; they are imported by their own test
            continue
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(name):
    """Every module of ours that ``name`` imports anywhere in it: at its top, in a function, or for the type checker."""
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            for alias in node.names:
                full = f"{module}.{alias.name}"
                yield from {full if full in MODULES else module} & set(MODULES)


def part_of(name):
    return name.split(".")[1] if "." in name else "promptmix"


def circles(graph):
    """Return the circles of a graph: groups of nodes of which each reaches the others (Tarjan)."""
    number, low, stack, found = {}, {}, [], []

    def visit(node):
        number[node] = low[node] = len(number)
        stack.append(node)
        for after in sorted(graph[node]):
            if after not in number:
                visit(after)
                low[node] = min(low[node], low[after])
            elif after in stack:
                low[node] = min(low[node], number[after])
        if low[node] == number[node]:
            group = [stack.pop()]
            while group[-1] != node:
                group.append(stack.pop())
            if len(group) > 1:
                found.append(sorted(group))

    for node in sorted(graph):
        if node not in number:
            visit(node)
    return found


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]


def test_every_part_stands_on_a_floor():
    assert {part_of(name) for name in MODULES} == set(FLOOR)


@pytest.mark.parametrize("part", sorted(FLOOR))
def test_no_import_runs_up(part):
    for name in MODULES:
        if part_of(name) == part:
            above = {other for other in imports(name) if part_of(other) != part and FLOOR[part_of(other)] >= FLOOR[part]}
            assert not above, f"{name} imports {sorted(above)}"


def test_no_modules_import_each_other():
    graph = {name: set(imports(name)) - {name} for name in MODULES}
    assert circles(graph) == []
    parts = defaultdict(set)
    for name, others in graph.items():
        parts[part_of(name)] |= {part_of(other) for other in others} - {part_of(name)}
    assert circles(parts) == []


def test_few_modules_lie_loose():
    loose = sorted(path.name for path in (ROOT / "promptmix").glob("*.py") if path.name != "__init__.py")
    assert len(loose) <= 9, loose
