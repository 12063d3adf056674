"""The pages about writing methods and plugins: their code runs, and the API that they promise is there."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from promptmix.cli import main
from promptmix.plugin_manager import load_plugin
from promptmix.registry import PROTOCOL_REGISTRY, ROUTER_REGISTRY
from tests import forked
from tests.trainers.toy import first_step, toy_trainer

ROOT = Path(__file__).resolve().parent.parent
QUICK = ["--config-file", "configs/quickstart.yaml", "--seed", "1", "OPTIM.MAX_EPOCH", "1", "DATASET.NUM_SHOTS", "1"]
QUICK += ["INPUT.SIZE", "(32, 32)"]


def blocks(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.S)


def test_the_method_of_the_page_trains(tmp_path):
    method, loss, bank = blocks("write-a-method.md")
    file = tmp_path / "near.py"
    # The page's second block, put to use as the page says.
    file.write_text(
        method.replace("@register\nclass Near", loss + "\n\n@register\nclass Near").replace(
            "CrossEntropy() +", "CrossEntropy() + 0.1 * Entropy() +"
        )
    )
    flags = ["train", "--plugin", str(file), "--trainer", "Near", "--output-dir", str(tmp_path / "out")]
    assert main([*flags, *QUICK, "TRAINER.NEAR.WEIGHT", "4"]) == 0
    assert "entropy" in (tmp_path / "out" / "log.txt").read_text()


def test_the_bank_of_the_page_learns_in_both_towers(room, tmp_path):
    file = tmp_path / "two_deep.py"
    file.write_text(blocks("write-a-method.md")[2])
    load_plugin(str(file))
    trainer = toy_trainer(room, "Mixture", "PROMPT_BANK.NAME", "TwoDeep")
    first_step(trainer)
    assert all(p.grad is not None and p.grad.any() for p in trainer.model.parameters())
    assert not trainer.model.image_is_frozen


def test_the_plugin_of_the_page_routes(tmp_path):
    router, protocol = blocks("write-a-plugin.md")
    file = tmp_path / "first.py"
    file.write_text(f"{router}\n\n{protocol}")
    flags = ["train", "--plugin", str(file), "--trainer", "MoCoOp", "--output-dir", str(tmp_path / "out")]
    assert main([*flags, *QUICK, "ROUTER.NAME", "First"]) == 0
    assert "First" in ROUTER_REGISTRY
    assert "base-only" in PROTOCOL_REGISTRY


def test_the_notebook_runs(tmp_path):
    """Its cells in order, as a kernel runs them; the last one's pictures are a cat, told from a bus and a flower."""
    cells = json.loads((ROOT / "docs" / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    program = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    epochs = '"OPTIM.MAX_EPOCH", "5"'
    assert epochs in program
    program = program.replace(epochs, '"OPTIM.MAX_EPOCH", "1", "DATASET.NUM_SHOTS", "1"')

    def run(_):
        forked.few()
        exec(compile(program, "quickstart.ipynb", "exec"), {"__name__": "__main__"})
        return 0

    done = forked.run([], tmp_path, work=run)
    assert done.returncode == 0, done.stderr
    first, prediction = done.stdout.splitlines()
    assert first.startswith("MoCoOp ")
    assert "'cat'" in prediction


def test_the_stable_names_are_there():
    rows = re.findall(r"^\| `(promptmix[\w.]*)` \| (.*) \|$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.M)
    assert len(rows) > 10
    for module, names in rows:
        found = importlib.import_module(module)
        assert [name for name in re.findall(r"`(\w+)`", names) if not hasattr(found, name)] == []


@pytest.mark.parametrize("kind", ["examples", "skeletons"])
def test_plugins_pass_a_strict_type_check(kind):
    folder = ROOT / "examples" if kind == "examples" else ROOT / "promptmix" / "skeletons"
    sources = sorted(map(str, folder.glob("*/promptmix_*.py" if kind == "examples" else "[!_]*.py")))
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--ignore-missing-imports"]
    done = subprocess.run([*command, "--config-file=", *sources], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert sources and done.returncode == 0, done.stdout + done.stderr
