"""Checkouts with a Dassl of their own: it is used where it differs from the original, or what is not used is named."""

from __future__ import annotations

import re
import shutil
import sys

import pytest

from promptmix.dassl import vendored
from tests.dassl.fork import HERE, change, make, refused, run


@pytest.fixture
def room(tmp_path):
    return make(tmp_path)


def own_dassl(room, folder, name="dassl"):
    """Give the checkout a Dassl that differs from the original."""
    package = (room / folder).joinpath(*name.split("."))
    for part in ("engine", "config"):
        (package / part).mkdir(parents=True)
    (package / "__init__.py").write_text("")
    shutil.copy(HERE / "shapes" / "dassl_engine.py", package / "engine" / "trainer.py")
    (package / "engine" / "__init__.py").write_text("from .trainer import *  # noqa: F403\n")
    (package / "config" / "__init__.py").write_text((HERE / "standin" / "dassl" / "config.py").read_text())
    fork = room / "fork"
    (fork / "trainers" / "wordbias.py").write_text(
        f"from {name}.engine import TRAINER_REGISTRY, TrainerX\n\n\n"
        "@TRAINER_REGISTRY.register()\nclass WordBias(TrainerX):\n    pass\n"
    )
    change(
        room,
        "train.py",
        ("import datasets.squares  # noqa: F401\n", ""),
        ("from dassl.config", f"from {name}.config"),
        ("from dassl.engine", f"from {name}.engine"),
    )
    change(
        room,
        "train.py",
        ("from dassl.utils import set_random_seed, setup_logger", f"from {name}.engine import setup_logger"),
        ("    set_random_seed(cfg.SEED)\n", "    print('****\\n** Config **\\n****')\n"),
    )
    change(
        room,
        "train.py",
        ("    setup_logger(cfg.OUTPUT_DIR)\n", ""),
        ("    print('****", "    setup_logger(cfg.OUTPUT_DIR)\n    print('****"),
        ("** Config **\\n****')\n", "** Config **\\n****')\n    print(cfg)\n"),
    )


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("fork", "dassl"),
        ("fork/Dassl.pytorch", "dassl"),
        ("fork/dist/Dassl.pytorch", "dassl"),
        ("Dassl.Forked.pytorch", "dassl"),
        ("fork", "my_dassl"),
        ("fork", "Dassl.dassl"),
    ],
)
def test_a_dassl_that_differs_is_used(room, folder, name, capsys):
    """15 of 16 copies differ, in evaluators and data managers too: another engine would give other numbers without a word."""
    own_dassl(room, folder, name)
    init = (room / folder).joinpath(*name.split("."), "engine", "__init__.py")
    init.write_text(f"import logging\n\nlogging.disable(logging.WARNING)\n{init.read_text()}")
    (room / "README.md").write_text("")
    results = run(room, weights="")
    assert results["metrics"]["test"]["accuracy"] == 75.0
    assert f"{folder}/{name.replace('.', '/')} (" in results["versions"]["dassl"]
    assert results["trainer"] == "WordBias" and results["seed"] == 1
    said = capsys.readouterr()
    assert "the checkout's own" in said.out + said.err and "Results: " in said.out + said.err
    assert not [
        module for module in sys.modules if module.partition(".")[0] in ("Dassl", "dassl", "my_dassl", "gdown", "trainers")
    ]


def test_a_dassl_beside_the_checkout_is_another_repository(tmp_path):
    """A folder of code, where a fork of Dassl lies beside a checkout that came as an archive."""
    (tmp_path / "fork").mkdir()
    engine = tmp_path / "Dassl.pytorch" / "dassl" / "engine"
    engine.mkdir(parents=True)
    (engine / "trainer.py").write_text("another = True\n")
    (tmp_path / "fork" / "train.py").write_text("")
    assert vendored.choose(tmp_path / "fork", tmp_path / "fork" / "train.py", "").folder is None
    (tmp_path / "README.md").write_text("")
    assert vendored.choose(tmp_path / "fork", tmp_path / "fork" / "train.py", "").folder == engine.parent


def test_ours_on_request_names_what_is_not_used(room, caplog):
    own_dassl(room, "fork")
    for file in ("train.py", "trainers/wordbias.py"):
        shutil.copy(HERE / "checkout" / file, room / "fork" / file)
    results = run(room, "--dassl", "ours")
    assert results["metrics"]["test"]["accuracy"] != 75.0 and "dassl" not in results["versions"]


def test_a_renamed_dassl_cant_be_ours(room, capsys):
    own_dassl(room, "fork", "my_dassl")
    assert "imports its engine as my_dassl, which ours can't stand for" in refused(room, capsys, "--dassl", "ours", weights="")


def test_theirs_where_there_is_none(room, capsys):
    assert re.search(r"--dassl theirs: .*fork brings no Dassl, and none is installed", refused(room, capsys, "--dassl", "theirs"))


def test_an_installed_dassl_can_be_chosen(room, monkeypatch):
    own_dassl(room, "site")
    monkeypatch.syspath_prepend(str(room / "site"))
    assert run(room, "--dassl", "theirs", weights="")["metrics"]["test"]["accuracy"] == 75.0


@pytest.mark.parametrize("folder", ["elsewhere", "elsewhere/dassl"])
def test_a_dassl_can_be_named_by_its_folder(room, folder, monkeypatch):
    own_dassl(room, "elsewhere")
    monkeypatch.chdir(room)
    assert run(room, "--dassl", folder, weights="")["metrics"]["test"]["accuracy"] == 75.0


def test_a_folder_without_a_dassl(room, capsys):
    assert "--dassl weights: no Dassl there; choose ours, theirs, or the folder" in refused(room, capsys, "--dassl", "weights")


def test_a_log_that_its_dassl_closes(room):
    """ATPrompt closes standard output, then leaves."""
    own_dassl(room, "fork")
    change(
        room,
        "dassl/engine/trainer.py",
        ("    test = train", "        sys.stdout.close()\n        os._exit(0)\n\n    test = train"),
    )
    change(
        room,
        "dassl/engine/trainer.py",
        ("    def flush", "    def close(self):\n        self.console.close()\n        self.file.close()\n\n    def flush"),
    )
    assert run(room, weights="")["metrics"]["test"]["accuracy"] == 75.0


def test_a_dassl_that_was_published_in_part(room, capsys):
    own_dassl(room, "fork")
    change(room, "dassl/engine/__init__.py", ("from .trainer", "import dassl.augment\nfrom .trainer"))
    assert re.search(
        r"No module named 'dassl.augment' in the checkout's own Dassl; --dassl ours", refused(room, capsys, weights="")
    )


def test_comments_and_empty_lines_are_no_difference():
    text = "import os\n\n\ndef f():  # keeps its own\n    return 1\n"
    assert vendored.fingerprint(text) == vendored.fingerprint(
        "# a note\r\nimport os\r\ndef f():  # keeps its own\r\n    return 1"
    )
    assert vendored.fingerprint(text) != vendored.fingerprint(text.replace("1", "2"))


def test_what_a_copy_was_published_without_is_ours(room):
    """A ``.gitignore`` with ``data`` takes ``dassl/data`` out of LightRA and CoDA."""
    own_dassl(room, "fork")
    change(
        room,
        "trainers/wordbias.py",
        (
            "from dassl.engine",
            "from dassl.data.datasets.dg.pacs import PACS\nfrom dassl.data import DataManager\nfrom dassl.engine",
        ),
        ("    pass\n", "    assert DataManager.__module__.startswith('promptmix') and PACS.dataset_dir == 'pacs'\n"),
    )
    run(room, weights="")
    assert not [name for name in sys.modules if name.partition(".")[0] == "dassl"]
