"""promptmix finds the plugin, and what it logs is written."""

from types import SimpleNamespace

from promptmix.plugin_manager import get_plugin_manager, load_plugin


def test_numbers_are_written(tmp_path):
    load_plugin("promptmix_my_part")
    manager = get_plugin_manager()
    plugin = manager.get_plugin("promptmix_my_part")
    hooks = manager.hook.log_scalar.get_hookimpls()
    assert plugin is not None and plugin in [hook.plugin for hook in hooks]
    plugin.log_scalar(SimpleNamespace(output_dir=tmp_path), "train/loss", 0.5, 3)
    assert (tmp_path / "my_part.csv").read_text() == "train/loss,3,0.5\n"
