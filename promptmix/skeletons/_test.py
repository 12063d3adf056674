"""promptmix finds the plugin and what it adds."""

from promptmix.plugin_manager import load_plugin
from promptmix.registry import REGISTRIES


def test_registered() -> None:
    load_plugin("promptmix_my_part")
    assert "MyPart" in REGISTRIES["parts"]
