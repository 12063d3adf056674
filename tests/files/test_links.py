"""Logs and locks in folders that others may fill: no link leads the writing to another file."""

from __future__ import annotations

import os

import pytest

from promptmix.engine.log import setup_logger
from promptmix.engine.run_folder import RunFolder
from promptmix.errors import OutputError, UserError
from promptmix.files.links import open_own
from promptmix.files.places import refuse_unwritable


@pytest.fixture
def victim(tmp_path):
    path = tmp_path / "victim"
    path.write_text("precious")
    return path


def test_files_are_made_written_and_appended_to(tmp_path):
    for append, expected in ((False, "one"), (True, "oneone"), (False, "one")):
        with open_own(tmp_path / "log", append) as file:
            file.write("one")
        assert (tmp_path / "log").read_text() == expected


@pytest.mark.parametrize("append", [False, True])
@pytest.mark.parametrize("make", [os.symlink, os.link], ids=["symbolic", "hard"])
def test_links_are_refused(tmp_path, victim, make, append):
    make(victim, tmp_path / "log")
    with pytest.raises(OSError, match="log is .*remove it"):
        open_own(tmp_path / "log", append)
    assert victim.read_text() == "precious"


def test_a_link_to_nothing_makes_nothing(tmp_path):
    (tmp_path / "log").symlink_to(tmp_path / "new")
    with pytest.raises(OSError, match="is a link"):
        open_own(tmp_path / "log")
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "log")
    with pytest.raises(OSError, match="remove it"):
        open_own(tmp_path / "log")


def test_a_log_that_is_a_link_is_left_alone(tmp_path, victim):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/log.txt").symlink_to(tmp_path / "nothing")
    with setup_logger(tmp_path / "out") as log:
        log.write("line\n")
    assert not (tmp_path / "nothing").exists() and victim.read_text() == "precious"
    assert len(list((tmp_path / "out").glob("log.txt-*"))) == 1


@pytest.mark.parametrize("make", [os.symlink, os.link], ids=["symbolic", "hard"])
def test_a_lock_that_is_a_link_is_one_line(tmp_path, victim, make):
    make(victim, tmp_path / ".job.lock")
    with pytest.raises(UserError, match="is a link|same file as another"), RunFolder(tmp_path / "job").alone():
        pass
    assert victim.read_text() == "precious"


def test_a_folder_that_cannot_be_made_is_refused_and_a_trial_leaves_nothing(tmp_path):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below", "/proc/self/nothing", "/dev/null/below"):
        with pytest.raises(OutputError, match="output .*; choose another"):
            refuse_unwritable(place, "output", "choose another")
    refuse_unwritable(tmp_path / "one" / "two", "output", "choose another")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
