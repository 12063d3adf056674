"""Plugins: hooks as a contract, loading by name and file, and a package that is really installed."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import runpy
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from promptmix import hookspecs
from promptmix.errors import PluginError, RegistryError
from promptmix.plugin_manager import MOVED, MOVED_NAMES, get_plugin_manager, load_plugin
from promptmix.registry import REGISTRIES, ROUTER_REGISTRY, TRAINER_REGISTRY, Registry, marked_classes, register
from tests import forked

ROOT = Path(__file__).resolve().parent.parent
HOOKS = {name: spec for name, spec in vars(hookspecs).items() if hasattr(spec, "promptmix_spec")}


@cache
def calls():
    """Return the names of all methods that the core calls."""
    return {
        node.func.attr
        for file in (ROOT / "promptmix").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    }


@pytest.mark.parametrize("name", sorted(HOOKS))
def test_every_hook_says_when_it_fires_and_is_fired_somewhere(name):
    assert inspect.getdoc(HOOKS[name]).startswith("Fires ")
    kind = name.removeprefix("register_")
    if name.startswith("register_"):
        assert kind in REGISTRIES
        return
    assert name in calls()


def test_built_ins_come_in_through_the_hooks():
    manager = get_plugin_manager()
    names = {name for name, _ in manager.list_name_plugin()}
    assert {"promptmix.trainers.coop", "promptmix.plugins.router.topk", "promptmix.clip.backbones"} <= names
    assert not [h for h in ("register_backbones", "register_protocols") if not getattr(manager.hook, h).get_hookimpls()]
    found = marked_classes(manager.get_plugin("promptmix.trainers.dpl"), own=True)
    assert [entry.__name__ for entry in found] == ["DPLSearch", "DPL"]
    assert found == [TRAINER_REGISTRY.get("DPLSearch"), TRAINER_REGISTRY.get("DPL")]


def test_marked_classes_come_in_when_their_plugin_is_loaded_and_not_before(tmp_path):
    file = tmp_path / "marked_router.py"
    file.write_text(
        "from promptmix import register\nfrom promptmix.plugins.router.topk import TopK\n"
        "@register\nclass Marked(TopK): ...\nclass Unmarked(Marked): ...\n"
        "@register(name='Other')\nclass Named(TopK): ...\n"
    )
    runpy.run_path(str(file))
    assert "Marked" not in ROUTER_REGISTRY
    load_plugin(str(file))
    assert ROUTER_REGISTRY.get("Marked").__name__ == "Marked"
    assert ROUTER_REGISTRY.get("Other").__name__ == "Named"
    assert "Unmarked" not in ROUTER_REGISTRY
    assert "Named" not in ROUTER_REGISTRY


def test_a_mark_without_a_kind_is_refused():
    with pytest.raises(PluginError, match="@register above Lost: its base classes say no kind; extend PromptTrainer"):

        @register
        class Lost: ...


def test_a_file_comes_in_by_path(tmp_path):
    file = tmp_path / "my_router.py"
    file.write_text(
        "from promptmix import hookimpl\nfrom promptmix.prompts.roles import Router\n"
        "class FromFile(Router):\n    def forward(self, step): ...\n"
        "@hookimpl\ndef register_routers(registry): registry.register(FromFile)\n"
    )
    load_plugin(str(file))
    load_plugin(str(file))  # twice is once
    assert ROUTER_REGISTRY.get("FromFile").__name__ == "FromFile"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("from promptmix import hookimpl\n@hookimpl\ndef register_router(registry): ...\n", "register_routers"),
        ("import no_such_module\n", "ModuleNotFoundError"),
        ("1 +\n", "SyntaxError"),
    ],
)
def test_a_broken_plugin_is_named(tmp_path, text, words):
    file = tmp_path / "broken.py"
    file.write_text(text)
    with pytest.raises(PluginError, match=words):
        load_plugin(str(file))
    assert not [name for name, _ in get_plugin_manager().list_name_plugin() if "broken" in name]


@pytest.mark.parametrize("old", sorted(MOVED))
def test_a_plugin_that_imports_what_has_moved_is_told_where_it_is(tmp_path, old):
    new = MOVED[old].split()[0]
    importlib.import_module(f"promptmix.{new}")
    package, _, module = f"promptmix.{old}".rpartition(".")
    forms = [f"from {package} import {module}"]
    if (ROOT / "promptmix" / old.replace(".", "/")).is_dir():  # a package of that name is there still
        forms = [f"from promptmix.{old} import something"]
    else:
        forms += [f"import promptmix.{old}", f"from promptmix.{old} import something"]
    for number, form in enumerate(forms):
        file = tmp_path / f"old_{number}.py"
        file.write_text(form + "\n")
        with pytest.raises(PluginError) as raised:
            load_plugin(str(file))
        assert f"promptmix.{old} is now promptmix.{new}" in str(raised.value)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", sorted(MOVED_NAMES))
def test_a_plugin_that_imports_a_name_from_where_it_was_is_told_too(tmp_path, name):
    module, _, attribute = MOVED_NAMES[name].split()[0].rpartition(".")
    assert hasattr(importlib.import_module(module), attribute)
    file = tmp_path / "old.py"
    file.write_text(f"from promptmix.clip.tokens import {name}\n")
    with pytest.raises(PluginError, match=f"{name} is now {module}.{attribute}"):
        load_plugin(str(file))


def test_a_missing_file_is_named():
    with pytest.raises(PluginError, match=r"no_such/router\.py: no such file"):
        load_plugin("no_such/router.py")


def test_registry_refuses_a_taken_name_and_lists_choices():
    registry = Registry("router")
    registry.register(dict, name="A")
    with pytest.raises(RegistryError, match="registered already"):
        registry.register(list, name="A")
    assert registry.register(list, name="A", force=True) is list
    for odd in ("", "../x", "a + b", "a\x1b[31m", 5):
        with pytest.raises(RegistryError, match="is not a name"):
            registry.register(set, name=odd)
    with pytest.raises(RegistryError, match=r"unknown router 'a'; did you mean 'A'\? \(choices: A\)"):
        registry.get("a")


def test_an_installed_package_brings_a_router_that_mocoop_uses_from_yaml(tmp_path):
    """pip installs the package; the router is chosen and set in YAML; no line of ours knows it."""
    site, out = tmp_path / "site", tmp_path / "out"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    copy = tmp_path / "package"
    subprocess.run(["cp", "-r", ROOT / "tests/plugin_package", copy], check=True)
    subprocess.run([*pip, "--target", site, copy], check=True, timeout=120)
    (tmp_path / "run.yaml").write_text(
        f"_BASE_: {ROOT / 'configs/quickstart.yaml'}\n"
        "DATASET: {NUM_SHOTS: 1}\nOPTIM: {MAX_EPOCH: 1}\n"
        "ROUTER: {NAME: FirstExpert, FIRSTEXPERT: {EXPERT: 2}}\n"
    )
    command = ["train", "--trainer", "MoCoOp", "--config-file", str(tmp_path / "run.yaml"), "--seed", "1"]
    done = forked.run(
        [*command, "--output-dir", str(out)], env={**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])}
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((out / "results.json").read_text())
    assert result["config"]["ROUTER"]["FIRSTEXPERT"]["EXPERT"] == 2
    assert result["metrics"]["test"]["accuracy"] > 10


def test_hook_before_plugin_fires_before_the_module_is_imported(tmp_path):
    """So that a plugin in Dassl's idiom finds ``dassl`` where none is installed."""
    file = tmp_path / "in_dassls_idiom.py"
    file.write_text(
        "from dassl.engine import TRAINER_REGISTRY, TrainerX\nfrom promptmix import hookimpl\n"
        "class InDassls(TrainerX): ...\n@hookimpl\ndef register_trainers(registry): registry.register(InDassls)\n"
    )
    from promptmix.registry import TRAINER_REGISTRY

    load_plugin(str(file))
    assert TRAINER_REGISTRY.get("InDassls").__bases__[0].__module__.startswith("promptmix.")
