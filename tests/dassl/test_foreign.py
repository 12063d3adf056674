"""Paths of the authors' machine in a checkout's code, where their ends lead somewhere here."""

from __future__ import annotations

import builtins
import os
from pathlib import Path

import pytest
import torch

from promptmix.dassl.foreign import found_here, is_foreign
from tests.dassl.fork import change, log, make, refused, run

BUILD = "    def build_model(self):\n"
THEIRS = "/storage_of_nobody/someone/project"


@pytest.fixture
def room(tmp_path):
    room = make(tmp_path)
    (room / "fork" / "gpt").mkdir()
    (room / "fork" / "gpt" / "words.json").write_text('{"square": ["has four sides"]}')
    return room


def use(room, line):
    change(room, "trainers/wordbias.py", (BUILD, f"{BUILD}        import json, os\n        {line}\n"))


def test_they_are_read_from_here_and_the_log_says_so(room):
    use(room, f"assert os.path.exists('{THEIRS}/gpt/words.json') and json.load(open('{THEIRS}/gpt/words.json'))['square']")
    run(room)
    said = [line for line in log(room).splitlines() if "a path of its authors' machine" in line]
    assert len(said) == 1 and "fork/gpt/words.json is taken for it" in said[0]


def test_what_has_no_end_here_stops_the_run_as_before(room, capsys):
    use(room, f"json.load(open('{THEIRS}/gpt/others.json'))")
    assert "gpt/others.json, which is not there: a path of its authors' machine; see the checkout's own page" in refused(
        room, capsys
    )


def test_folders_data_weights_and_what_is_made_in_them(tmp_path):
    root, data = tmp_path / "fork", tmp_path / "data"
    (root / "gpt").mkdir(parents=True)
    (data / "squares" / "images").mkdir(parents=True)
    torch.save({"w": torch.ones(1)}, root / "gpt" / "w.pt")
    before = builtins.open, os.stat, os.listdir
    with found_here(root, str(data)):
        os.makedirs(f"{THEIRS}/squares/split_fewshot", exist_ok=True)
        Path(f"{THEIRS}/squares/split_fewshot/shot_1.json").write_text("[]")
        assert (data / "squares" / "split_fewshot" / "shot_1.json").read_text() == "[]"
        assert (
            sorted(os.listdir(f"{THEIRS}/squares")) == ["images", "split_fewshot"] and Path(f"{THEIRS}/squares/images").is_dir()
        )
        assert torch.load(f"{THEIRS}/gpt/w.pt")["w"] == 1
        for path, mode in (
            (f"{THEIRS}/nothing/of/ours.json", "w"),
            (tmp_path / "elsewhere" / "gpt" / "w.pt", "rb"),  # a path of this machine, mistyped
            ("gpt/w.pt", "rb"),
            (root / "lost", "rb"),
        ):
            with pytest.raises(FileNotFoundError), open(path, mode=mode):
                pass
    assert (builtins.open, os.stat, os.listdir) == before
    assert is_foreign(Path(THEIRS)) and not is_foreign(tmp_path / "lost" / "file")


def test_clips_table_of_byte_pairs_is_lent(tmp_path):
    with found_here(tmp_path, ""), open(tmp_path / "clip" / "bpe_simple_vocab_16e6.txt.gz", "rb") as words:
        assert words.read(2) == b"\x1f\x8b"
