"""Counted limits: names of ImageNet-21k, tokens in a trie, and the page that the command writes."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path

import pytest

from promptmix.bench import scale
from promptmix.bench.world import World, silenced
from promptmix.clip.tokens import Tokenizer
from promptmix.cost.machine import Machine
from promptmix.plugin_manager import get_plugin_manager

PAGE = Path(__file__).resolve().parents[2] / "docs" / "limits.md"
MACHINE = Machine(100.0, 10.0, 20.0, 50.0, (1e6, 1e8), (10.0, 5.0), (4.0, 2.0), 1.0, 2.0)


def test_names_are_real_and_differ_as_classes_must():
    found = scale.names(21000)
    assert found[:3] == ["tench", "goldfish", "great white shark"] and "toilet paper" in found[:1000]
    assert len({name.casefold().replace("_", " ") for name in found}) == 21000
    with pytest.raises(ValueError, match="30000 names are wanted"):
        scale.names(30000)


def test_a_trie_shares_what_begins_alike():
    found = scale.tokens(Tokenizer(), ["great white shark", "great grey owl", "owl"])
    assert (found.full, found.packed, found.trie) == (231, 5 + 5 + 3, 13 - 1)


def test_a_trie_would_save_too_little_on_imagenet():
    found = scale.tokens(Tokenizer(), scale.names(1000))
    assert 0.03 < found.saved < 0.05  # 15% is where it would be built
    row = next(line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| 1,000 "))
    assert [cell.strip() for cell in row.split("|")[2:6]] == [
        f"{found.full:,}",
        f"{found.packed:,}",
        f"{found.trie:,}",
        f"{found.saved:.1%}",
    ]


def test_the_page_holds_what_is_counted(tmp_path):
    get_plugin_manager()
    with silenced():
        tables = scale.study(World("tiny-vit", tmp_path, "meta"), asdict(MACHINE), classes=(3, 9), methods=("CoOp",))
    assert [len(table.splitlines()) for table in tables.values()] == [4, 4, 8]
    page = Path(shutil.copy(PAGE, tmp_path))
    for _ in range(2):  # written again, it stays what it is
        scale.rewrite(page, tables)
        text = page.read_text(encoding="utf-8")
        assert all(text.count(f"<!-- {name} -->\n\n{table}\n\n<!-- end -->") == 1 for name, table in tables.items())
    headings = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert headings == [line for line in text.splitlines() if line.startswith("#")]


def test_a_share_of_the_classes_needs_less_of_a_device(tmp_path):
    get_plugin_manager()
    with silenced():
        one = scale.step(World("tiny-vit", tmp_path, "meta"), "CoOp", scale.names(16))
    assert one.share.gflops < one.work.gflops / 4 < one.plain_gflops / 4
