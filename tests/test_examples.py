"""The example packages and what ``promptmix new-plugin`` writes are really installed and run, without a change to our code."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image
from setuptools import build_meta

from promptmix.cli import main
from promptmix.commands.new_plugin import KINDS, package
from promptmix.errors import UserError
from promptmix.registry import REGISTRIES
from tests import forked

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = {"promptmix-nearest-router": "router", "promptmix-task-residual": "trainer"}
QUICK = ["VERBOSE", "False", "OPTIM.MAX_EPOCH", "2", "DATASET.NUM_SHOTS", "2"]


def put_together(words: list[str]) -> int:
    """Build a wheel of each package and lay it into the folder that comes first, which is all that pip does with it."""
    target, *sources = map(Path, words)
    for source in sources:
        os.chdir(source)
        sys.argv = ["setup.py"]
        wheel = build_meta.build_wheel(str(source))
        with zipfile.ZipFile(source / wheel) as archive:
            archive.extractall(target)
    return 0


def install(sources: list[Path], tmp_path: Path) -> dict[str, str]:
    """Install packages into a folder of their own and return the environment that sees it."""
    done = forked.run([str(tmp_path / "site"), *map(str, sources)], work=put_together)
    assert done.returncode == 0, done.stdout + done.stderr
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), str(ROOT)])}


def promptmix(env: dict[str, str], cwd: Path, *arguments: str) -> str:
    done = forked.run(list(arguments), cwd, env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("examples")
    for name in EXAMPLES:  # setuptools builds inside the source folder
        shutil.copytree(ROOT / "examples" / name, folder / name)
    return install([folder / name for name in EXAMPLES], folder)


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_examples_are_listed_with_their_package(installed, tmp_path):
    listed = promptmix(installed, tmp_path, "list")
    for line in (
        "NearestRouter",
        "promptmix_nearest_router (0.1.0)",
        "TaskResidual",
        "DrawnShapes",
        "promptmix_task_residual (0.1.0)",
    ):
        assert line in listed


def test_example_router_serves_mocoop_from_yaml(installed, tmp_path):
    (tmp_path / "nearest.yaml").write_text(
        f"_BASE_: {ROOT / 'configs' / 'quickstart.yaml'}\n"
        "TRAINER:\n  NAME: MoCoOp\nROUTER:\n  NAME: NearestRouter\n  NEARESTROUTER:\n    K: 2\n"
    )
    run = ["train", "--config-file", "nearest.yaml", "--seed", "1", "--output-dir", "out", *QUICK]
    promptmix(installed, tmp_path, *run, "INPUT.SIZE", "(32, 32)")
    found = results(tmp_path / "out")
    assert found["config"]["ROUTER"]["NAME"] == "NearestRouter"
    assert found["metrics"]["test"]["accuracy"] > 0


def test_example_trainer_learns_its_data_set(installed, tmp_path):
    run = ["train", "--config-file", "configs/quickstart.yaml", "--seed", "1", "--root", ".", "--output-dir", "out"]
    shapes = [*QUICK, "DATASET.NAME", "DrawnShapes", "DATASET.SUBSAMPLE_CLASSES", "all"]
    promptmix(installed, tmp_path, *run, "--trainer", "TaskResidual", *shapes, "OPTIM.MAX_EPOCH", "20", "OPTIM.LR", "0.1")
    found = results(tmp_path / "out")
    assert len(list((tmp_path / "drawn_shapes").rglob("*.png"))) == 9 * 28
    assert found["learned_parameters"] == 9 * 128
    promptmix(installed, tmp_path, *run[:-1], "zero", "--trainer", "ZeroshotCLIP", *shapes)
    learned, zeroshot = (results(tmp_path / name)["metrics"]["test"]["accuracy"] for name in ("out", "zero"))
    assert learned > zeroshot


@pytest.mark.parametrize(("name", "kind"), EXAMPLES.items())
def test_example_setup_is_the_template(name, kind):
    """What a package must say to be found stands once, in the template of ``promptmix new-plugin``."""
    setup = (ROOT / "examples" / name / "setup.py").read_text()
    summary = setup.split('description="')[1].split('"')[0]
    assert setup == package(name, kind, summary)["setup.py"]


def test_new_plugins_install_and_run(tmp_path, capsys):
    for kind in KINDS:
        assert main(["new-plugin", f"promptmix-fresh-{kind}", "--kind", kind, "--directory", str(tmp_path / "new")]) == 0
        assert f"Next: pip install -e {tmp_path / 'new' / f'promptmix-fresh-{kind}'}" in capsys.readouterr().out
    env = install(sorted((tmp_path / "new").iterdir()), tmp_path)
    tests = [str(path) for path in (tmp_path / "new").glob("*/tests/test_*.py")]
    assert len(tests) == len(KINDS)
    done = forked.run(["-q", "-p", "no:cacheprovider", *tests], tmp_path, env, pytest.main)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(KINDS)} passed" in done.stdout
    run = ["train", "--config-file", "configs/quickstart.yaml", "--seed", "1", *QUICK]
    roles = ["PROMPT_BANK.NAME", "FreshPromptBank", "TEXT_SUPERVISION.NAME", "FreshTextSupervision"]
    roles += ["ROUTER.NAME", "FreshRouter", "DISTILLER.NAME", "FreshDistiller", "HEAD.NAME", "FreshHead"]
    promptmix(env, tmp_path, *run[:3], "--output-dir", "mixed", "--trainer", "Mixture", *run[3:], *roles)
    assert results(tmp_path / "mixed")["metrics"]["test"]["accuracy"] > 0
    assert "train/loss" in (tmp_path / "mixed" / "fresh_logger.csv").read_text()
    for part in ("train", "val", "test"):
        for number in range(12):
            folder = tmp_path / "fresh_dataset" / part / ["red", "green"][number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), folder.name).save(folder / f"{number}.png")
    shapes = ["--root", ".", "--output-dir", "own", *run[3:], "DATASET.NAME", "FreshDataset", "DATASET.SUBSAMPLE_CLASSES", "all"]
    shapes += ["MODEL.BACKBONE.NAME", "FreshBackbone", "INPUT.SIZE", "[32, 32]"]
    promptmix(env, tmp_path, *run[:3], "--trainer", "FreshTrainer", *shapes)
    assert results(tmp_path / "own")["config"]["MODEL"]["BACKBONE"]["NAME"] == "FreshBackbone"
    assert "FreshProtocol" in promptmix(env, tmp_path, "list", "protocols")


@pytest.mark.parametrize(
    ("name", "module", "class_name"),
    [
        ("TCP", "promptmix_tcp", "TCP"),
        ("CLIP-LoRA", "promptmix_clip_lora", "CLIPLoRA"),
        ("MyRouter", "promptmix_myrouter", "MyRouter"),
        ("promptmix-cosine-router", "promptmix_cosine_router", "CosineRouter"),
    ],
)
def test_new_plugin_keeps_the_spelling(tmp_path, capsys, monkeypatch, name, module, class_name):
    monkeypatch.chdir(tmp_path)
    assert main(["new-plugin", name]) == 0
    folder = module.replace("_", "-")
    assert f"Next: pip install -e ./{folder}, then" in capsys.readouterr().out
    assert f"class {class_name}(Router)" in (tmp_path / folder / f"{module}.py").read_text()
    assert f'"{class_name}" in REGISTRIES["routers"]' in next((tmp_path / folder / "tests").iterdir()).read_text()
    assert "pip install -e ." in (tmp_path / folder / "README.md").read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_the_skeleton_is_left(kind):
    written = package("TCP", kind, "Something of mine.")
    assert not [path for path, text in written.items() if re.search("my.?part|A part for|--use", path + text, re.I)]
    assert all("Something of mine." in written[path] for path in ("setup.py", "README.md", "promptmix_tcp.py"))


def test_new_plugins_please_a_linter_with_its_own_defaults(tmp_path):
    for kind in KINDS:
        for path, text in package(f"fresh-{kind}", kind).items():
            target = tmp_path / f"promptmix-fresh-{kind}" / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache", "--select", "E4,E7,E9,F,I", "."]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("kind", KINDS)
def test_skeletons_are_modules(kind):
    importlib.import_module(f"promptmix.skeletons.{kind.replace('-', '_')}")
    assert KINDS[kind].registry in ("", *REGISTRIES)


@pytest.mark.parametrize("name", ["promptmix", "my_router", "promptmix-", "-router", "promptmix-1st", "promptmix-Ä"])
def test_new_plugin_refuses_names_that_make_no_package(name):
    with pytest.raises(UserError, match="words of letters"):
        package(name, "router")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["promptmix-soft"], "Soft is taken by"),
        (["SOFT"], "Soft is taken by"),
        (["Router"], "Router means something else"),
        (["yields"], "a module promptmix_yields is installed"),
        (["promptmix-a"], "is there already"),
    ],
)
def test_new_plugin_refuses_what_would_not_load(tmp_path, tmp_path_factory, monkeypatch, capsys, arguments, message):
    installed = tmp_path_factory.mktemp("installed")
    (installed / "promptmix_yields.py").touch()
    monkeypatch.syspath_prepend(installed)
    (tmp_path / "promptmix-a").mkdir()
    assert main(["new-plugin", *arguments, "--directory", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["promptmix-a"]
