"""promptmix finds the plugin, and what it logs is written."""

import importlib
from pathlib import Path
from types import SimpleNamespace

from promptmix.plugin_manager import get_plugin_manager, load_plugin


def test_numbers_are_written(tmp_path: Path) -> None:
    load_plugin("promptmix_my_part")
    plugin = importlib.import_module("promptmix_my_part")
    assert plugin in [hook.plugin for hook in get_plugin_manager().hook.log_scalar.get_hookimpls()]
    plugin.log_scalar(SimpleNamespace(output_dir=tmp_path), "train/loss", 0.5, 3)
    assert (tmp_path / "my_part.csv").read_text() == "train/loss,3,0.5\n"
