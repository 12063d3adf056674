"""Plugins that fail: one line names plugin and file, nothing of them stays behind, and each can be switched off."""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path

import pytest

from promptmix.cli import main
from promptmix.config import get_cfg, validate
from promptmix.errors import PluginError, UserError
from promptmix.plugin_manager import get_plugin_manager, load_plugin, switch_off
from promptmix.registry import PROTOCOL_REGISTRY, REGISTRIES, ROLES
from tests import forked

ROOT = Path(__file__).resolve().parent.parent
HOOK = "from promptmix import hookimpl\n"


def fails(capsys, command, *words, code=2):
    assert main(command) == code
    line = capsys.readouterr().err.strip()
    assert "\n" not in line
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import sys; sys.exit(3)\n", ["import failed", "ended the process", "SystemExit: 3"]),
        ("raise SystemExit\n", ["ended the process"]),
        ("raise ValueError('two\\nlines')\n", ["ValueError: two lines"]),
        ("x = 1\n", ["implements no hook", "@promptmix.hookimpl"]),
        ("def register_routers(registry): ...\n", ["register_routers has the name of a hook", "@promptmix.hookimpl"]),
        (HOOK + "@hookimpl\ndef register_routers(registry, colour): ...\n", ["colour", "hooks there are"]),
        (HOOK + "@hookimpl\ndef register_routers(registry): registry.get('Nope')\n", ["registration failed", "unknown router"]),
        (HOOK + "@hookimpl\ndef register_routers(registry): registry.register(42)\n", ["registration failed", "AttributeError"]),
        (HOOK + "@hookimpl\ndef register_routers(registry): exit(1)\n", ["registration failed", "ended the process"]),
        (
            "class Mute(Exception):\n    def __str__(self): return 1 / 0\nraise Mute\n",
            ["import failed (Mute:)"],
        ),
        (
            HOOK + "class TopK: ...\n@hookimpl\ndef register_routers(registry): registry.register(TopK)\n",
            ["'TopK' is registered already by promptmix.plugins.router.topk", "broken.py"],
        ),
        (HOOK + "@hookimpl\ndef extend_config(cfg): cfg.NO_SUCH.KEY = 1\n", ["registration failed", "NO_SUCH"]),
        (
            HOOK + "class Mine:\n    @staticmethod\n    def add_config(node): raise KeyError('x')\n"
            "@hookimpl\ndef register_trainers(registry): registry.register(Mine)\n",
            ["registration failed", "KeyError"],
        ),
    ],
)
def test_a_plugin_that_fails_is_named_and_leaves_nothing(tmp_path, capsys, text, words):
    file = tmp_path / "broken.py"
    file.write_text(text)
    get_plugin_manager()
    before = {kind: registry.snapshot() for kind, registry in REGISTRIES.items()}
    fails(capsys, ["list", "--plugin", str(file)], "broken.py", *words)
    assert {kind: registry.snapshot() for kind, registry in REGISTRIES.items()} == before
    assert not [name for name, _ in get_plugin_manager().list_name_plugin() if "broken" in name]


@pytest.mark.parametrize("name", ["", "no_such_module", "a" * 5000 + ".py", "nul\0.py", "/"])
def test_what_is_no_plugin(name):
    with pytest.raises(PluginError, match="--plugin"):
        load_plugin(name)


@pytest.mark.parametrize(
    "hook",
    [
        "validate_config(cfg): raise RuntimeError('no luck')",
        "validate_config(cfg): raise SystemExit(0)",
        "before_train(trainer): 1 / 0",
        "after_test(results): results['x'] = float('no number')",
    ],
)
def test_a_hook_that_fails_is_named_with_its_file(tmp_path, capsys, monkeypatch, hook):
    monkeypatch.setenv("PROMPTMIX_NO_PLUGIN", "")
    file = tmp_path / "raising.py"
    file.write_text(f"{HOOK}@hookimpl\ndef {hook}\n")
    load_plugin(str(file))
    (name,) = [name for name, _ in get_plugin_manager().list_name_plugin() if "raising" in str(name)]
    command = ["train", "--trainer", "CoOp", "--config-file", "configs/quickstart.yaml", "--output-dir", str(tmp_path / "out")]
    try:
        code = main([*command, "OPTIM.MAX_EPOCH", "1", "DATASET.NUM_SHOTS", "1"])
    finally:
        switch_off([name])
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2
    assert f"plugin 'raising' ({file}, line 3) failed" in last


@pytest.fixture
def installed(tmp_path):
    """Return an environment where two packages are installed, one of which can't be imported."""
    for name, text in (("good", f"{HOOK}@hookimpl\ndef register_routers(registry): ...\n"), ("bad", "import no_such_thing\n")):
        (tmp_path / f"{name}_plugin.py").write_text(text)
        about = tmp_path / f"{name}_package-1.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-package\nVersion: 1.0\n")
        (about / "entry_points.txt").write_text(f"[promptmix]\n{name} = {name}_plugin\n")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}


def test_an_installed_plugin_that_fails_is_left_out_of_lists_and_can_be_switched_off(installed):
    def shown(commands):
        from promptmix.cli import main

        found = []
        for command in commands:
            out, err = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = main(command)
            found.append((code, out.getvalue(), err.getvalue()))
        print(json.dumps(found))
        return 0

    def promptmix(*commands, **more):
        done = forked.run(list(commands), env=installed | more, work=shown)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    listed, refused, near, without, both = promptmix(
        ["list", "plugins"],
        ["data", "list"],
        ["list", "--no-plugin", "baad"],
        ["data", "list", "--no-plugin", "bad"],
        ["list", "plugins", "--no-plugin", "good"],
    )
    assert listed[0] == 0
    assert "good " in listed[1]
    assert "left out: installed plugin 'bad' of bad-package: import failed (ModuleNotFoundError" in listed[2]
    assert refused[0] == 2
    assert refused[2].count("\n") == 1
    assert "leave it out with --no-plugin bad" in refused[2]
    assert "did you mean 'bad'" in near[2]
    assert (without[0], without[2]) == (0, "")
    assert "good " not in both[1]
    ((code, _, error),) = promptmix(["data", "list"], PROMPTMIX_NO_PLUGIN="bad-package")
    assert (code, error) == (0, "")


def test_only_plugins_that_are_there_and_not_built_in_are_switched_off():
    for name, words in (("nobody", "is not installed"), ("promptmix.trainers.coop", "is built in and stays")):
        with pytest.raises(UserError, match=words):
            switch_off([name])


def test_a_loaded_plugin_is_switched_off_with_what_it_brought(tmp_path, monkeypatch):
    monkeypatch.setenv("PROMPTMIX_NO_PLUGIN", "")
    (tmp_path / "short_lived.py").write_text(
        f"{HOOK}from promptmix.runs.protocols import Protocol\n"
        "@hookimpl\ndef register_protocols(registry):\n"
        "    registry.register(Protocol('twice', part='all', classes='all'), name='twice')\n"
    )
    load_plugin(str(tmp_path / "short_lived.py"))
    name = PROTOCOL_REGISTRY.origin("twice")
    assert name.startswith("promptmix_plugin_short_lived")
    switch_off([name])
    assert "twice" not in PROTOCOL_REGISTRY
    assert not get_plugin_manager().has_plugin(name)


@pytest.fixture
def unloaded():
    """Take out again what a test loads."""
    manager = get_plugin_manager()
    plugins, entries = manager.get_plugins(), {kind: registry.snapshot() for kind, registry in REGISTRIES.items()}
    yield
    for plugin in manager.get_plugins() - plugins:
        manager.unregister(plugin)
    for kind, registry in REGISTRIES.items():
        registry.restore(entries[kind])


@pytest.mark.usefixtures("unloaded")
def test_a_plugin_adds_to_every_registry(tmp_path):
    known = {kind: registry.registered_names()[0] for kind, registry in REGISTRIES.items()}
    again = (
        f"@hookimpl\ndef register_{kind}(registry):\n    registry.register(registry.get({name!r}), name='Again')\n"
        for kind, name in known.items()
    )
    (tmp_path / "again.py").write_text(HOOK + "".join(again))
    load_plugin(str(tmp_path / "again.py"))
    for kind, registry in REGISTRIES.items():
        assert registry.get("Again") is registry.get(known[kind])
    cfg = get_cfg()
    assert all("AGAIN" in cfg[role] for role in ("TRAINER", *ROLES))
    cfg.TRAINER.NAME, cfg.TEST.EVALUATOR, cfg.DATASET.NAME = "CoOp", "Again", "Again"
    cfg.MODEL.BACKBONE.NAME = "Again"
    validate(cfg)


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(
    ("code", "words"),
    [
        (
            "class Mine(PromptTrainer):\n    def compose(self, task): return 5\n",
            ["Mine.compose returned a int", "must return a Learner"],
        ),
        ("class Mine(PromptTrainer):\n    pass\n", ["must define compose", "loaded; fix that plugin"]),
        (
            "class Mine(PromptTrainer):\n"
            "    def compose(self, task):\n"
            "        bank = Soft(task, 2)\n"
            "        return Learner(task, bank, loss=CrossEntropy() + Odd())\n",
            ["the loss 'odd' returned a Tensor of shape", "return a scalar"],
        ),
    ],
)
def test_parts_that_give_something_else_are_named(tmp_path, capsys, code, words):
    (tmp_path / "p.py").write_text(
        "from promptmix import register\n"
        "from promptmix.plugins.prompt_bank.soft import Soft\n"
        "from promptmix.prompts.learner import Learner\n"
        "from promptmix.prompts.losses import CrossEntropy\n"
        "from promptmix.prompts.roles import Loss\n"
        "from promptmix.prompts.trainer import PromptTrainer\n"
        "class Odd(Loss):\n    part = 'odd'\n    def forward(self, step): return step.logits\n"
        "@register\n" + code
    )
    flags = ["--trainer", "Mine", "--plugin", str(tmp_path / "p.py"), "--config-file", "configs/quickstart.yaml"]
    assert main(["train", *flags, "--output-dir", str(tmp_path / "out"), "DATASET.NUM_SHOTS", "1"]) == 2
    line = capsys.readouterr().err.strip()
    assert "\n" not in line and all(word in line for word in words), line


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize("hook", ["extend_config", "validate_config"])
def test_a_hook_that_changes_keys_of_others_is_named(tmp_path, capsys, hook):
    (tmp_path / "p.py").write_text(f"import promptmix\n@promptmix.hookimpl\ndef {hook}(cfg): cfg.OPTIM.LR = -1.0\n")
    flags = ["--trainer", "CoOp", "--plugin", str(tmp_path / "p.py"), "--config-file", "configs/quickstart.yaml"]
    assert main(["train", *flags, "--output-dir", str(tmp_path / "out")]) == 2
    assert f"{hook} changed OPTIM.LR" in capsys.readouterr().err
