"""The plan that a machine can check: which part stands on which floor, who imports whom, thin doors, and what gets installed."""

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from collections import defaultdict
from pathlib import Path

import pytest

from tests import forked

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("trainers", "plugins", "configs")


def imported(path):
    """Return every module that a file imports, relative ones resolved against its installed name."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    package = (parts if parts[0] == "promptmix" else ("promptmix", *parts))[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{name.name}" for name in node.names)


def within(module, package):
    return module == package or module.startswith(package + ".")


@pytest.mark.parametrize("path", [p for p in sorted((ROOT / "promptmix").rglob("*.py")) if "skeletons" not in p.parts], ids=str)
def test_the_core_imports_none_of_the_folders_beside_it(path):
    for module in imported(path):
        for folder in FOLDERS:
            assert not within(module, folder) and not within(module, f"promptmix.{folder}"), f"{path} imports {module}"


@pytest.mark.parametrize(
    "path",
    sorted(p for folder in ("trainers", "plugins") for p in (ROOT / folder).rglob("*.py")),
    ids=lambda path: path.name,
)
def test_folders_import_the_core_and_trainers_the_built_in_parts(path):
    allowed = ("promptmix.plugins",) if path.is_relative_to(ROOT / "trainers") else ()
    for module in imported(path):
        for folder in (*FOLDERS, "tools", "tests"):
            forbidden = within(module, folder) or within(module, f"promptmix.{folder}") and f"promptmix.{folder}" not in allowed
            assert not forbidden, f"{path} imports {module}"


#: From the ground up: a part imports what stands on lower floors alone. The package itself (``promptmix``) is the roof.
FLOORS = (
    {"errors", "version"},
    {"assets"},
    {"files"},
    {"parallel"},
    {"registry", "utils"},
    {"hookspecs"},
    {"plugin_manager"},
    {"console"},
    {"config"},
    {"clip"},
    {"cost"},  # measures the machine by passes through towers
    {"data"},
    {"engine"},
    {"prompts"},
    {"runs"},
    {"tables", "predict", "dassl"},
    {"interpret"},
    {"report"},
    {"bench"},
    {"commands"},
    {"cli"},
    {"__main__"},
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


@pytest.mark.parametrize("path", sorted((ROOT / "tools").glob("*.py")), ids=lambda path: path.name)
def test_tools_import_nothing_of_ours_but_the_command_line(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    ours = {module for module in imported(path) if within(module, "promptmix")}
    if "promptmix.cli" in ours:
        assert ours == {"promptmix.cli", "promptmix.cli.main"}
        limit = 45 if path.name == "bench.py" else 20  # which has work before anything of ours can be imported
        assert len(path.read_text(encoding="utf-8").splitlines()) < limit
    assert ast.get_docstring(tree)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_is_not_importable_from_the_root(folder):
    code = f"import {folder}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "ImportError" in done.stderr and f"promptmix.{folder}" in done.stderr


def test_nothing_else_of_a_checkout_is_importable_under_our_name(tmp_path):
    """A promptmix found by its path alone, without what pip knows of it."""
    code = (
        "import importlib, pathlib, sys\n"
        "sys.meta_path[:] = [finder for finder in sys.meta_path if 'editable' not in repr(finder)]\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import promptmix\n"
        "beside = [p.name for p in pathlib.Path(sys.path[0]).iterdir() if p.is_dir() or p.suffix == '.py']\n"
        "inside = {p.stem for p in pathlib.Path(sys.path[0], 'promptmix').iterdir()}\n"
        "for name in sorted({n.removesuffix('.py') for n in beside if n.removesuffix('.py').isidentifier()} - inside):\n"
        "    try:\n        print(importlib.import_module('promptmix.' + name).__name__)\n"
        "    except ModuleNotFoundError:\n        pass\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["promptmix.configs", "promptmix.plugins", "promptmix.trainers"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    source = tmp_path_factory.mktemp("source")
    # A copy: building leaves a build/ folder, whose stale files would get into the next wheel.
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("promptmix", *FOLDERS):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    (built,) = out.glob("promptmix-*.whl")
    return zipfile.ZipFile(built)


def test_the_wheel_holds_everything_under_one_name(wheel):
    names = set(wheel.namelist())
    tops = {name.split("/")[0] for name in names}
    assert [top for top in tops if not top.startswith("promptmix-")] == ["promptmix"]
    for folder, suffixes in {
        "promptmix": None,
        "trainers": (".py",),
        "plugins": (".py",),
        "configs": (".py", ".yaml"),
    }.items():
        for path in (ROOT / folder).rglob("*"):
            if not path.is_file() or "__pycache__" in path.parts or (suffixes and path.suffix not in suffixes):
                continue
            inside = path.relative_to(ROOT).as_posix()
            assert (inside if folder == "promptmix" else f"promptmix/{inside}") in names


def test_the_wheel_works_from_another_folder(wheel, tmp_path):
    site = tmp_path / "site"
    wheel.extractall(site)

    def use(words):
        import promptmix
        from promptmix.cli import main
        from promptmix.config.flags import resolve_config

        assert Path(promptmix.__file__).is_relative_to(site)
        assert resolve_config("configs/quickstart.yaml").is_file()
        return main(words)

    done = forked.run(["list"], tmp_path, os.environ | {"PYTHONPATH": str(site)}, work=use)
    assert done.returncode == 0, done.stderr
    assert "promptmix.trainers." in done.stdout


def test_ci_runs_the_test_command_of_the_readme():
    """The README's command is found where .ci/run looks for it: the first code block after the marker."""
    _, marked = (ROOT / "README.md").read_text(encoding="utf-8").split("<!-- test-command -->")
    command = marked.split("```")[1]
    assert command.startswith("bash\n") and command.rstrip().endswith("-m pytest -n auto --dist worksteal")
    assert "test-command" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
