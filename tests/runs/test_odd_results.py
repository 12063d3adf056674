"""``parse`` among files that somebody else wrote: what can't be read is named and left out, and the table stands."""

from __future__ import annotations

import json
import typing
from dataclasses import replace

import pytest

from promptmix.cli import main
from promptmix.errors import DataError
from promptmix.runs.checked import check_fields
from promptmix.runs.results import RunResult, load

ODD = {
    "list": "[]",
    "half": '{"schema_version": 1, "trainer": ',
    "deep": "[" * 100_000,
    "types": json.dumps({"schema_version": 1, "trainer": 3, "dataset": "x"}),
    "metrics": json.dumps({"schema_version": 1, "trainer": "A", "dataset": "x", "metrics": {"test": {"accuracy": "high"}}}),
    "nan": '{"schema_version": 1, "trainer": "A", "dataset": "x", "metrics": {"test": {"accuracy": NaN}}}',
    "seed": json.dumps({"schema_version": 1, "trainer": "A", "dataset": "x", "seed": "one"}),
    "newer": json.dumps({"schema_version": 99, "trainer": "A", "dataset": "x"}),
}


#: Field (dotted: a part of it) to values that it can't have.
FIELDS = {
    "schema_version": [True, "1", 1.0, None],
    "seed": [1.5, True, 2**64, None],
    "title": [None, 5, "a\0b"],
    "metrics": [[], {"test": 5}, {"test": {"accuracy": True}}, {"test": {"accuracy": None}}],
    "config": [[], {"DATASET": 5}, {"MODEL": {"BACKBONE": None}}, {"TRAINER": []}],
    "config_sources": [{"SEED": 5}, {"SEED": []}],
    "versions": [{"torch": 2}, None],
    "command": ["promptmix", [1]],
    "checkpoint": [{}, {"directory": 5}, {"directory": "a\0b"}, {"directory": "x", "epoch": "1"}, {"epoch": 1}, []],
    "seconds": [{"train": "long"}, {"train": True}],
    "peak_memory_mb": [{"rss": "x"}],
    "learned_parameters": ["many", 1.5, True],
    "approximations": ["text", [5]],
    "vocabulary": [{"classnames": "ant"}, {"classnames": [1]}, {"templates": 5}, {"template_groups": ["a {}"]}, []],
}


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_of_another_kind_is_named(tmp_path, field):
    tree = {"schema_version": 1, "trainer": "A", "dataset": "x"}
    path = tmp_path / "results.json"
    for value in FIELDS[field]:
        path.write_text(json.dumps(tree | {field: value}))
        with pytest.raises(DataError, match=field) as caught:
            load(path)
        assert "not a results file of promptmix" in str(caught.value) and "\n" not in str(caught.value)


def test_every_field_has_a_type_that_is_checked():
    run = RunResult("A", "x", metrics={"test": {"accuracy": 5}}, seconds={"train": 1}, peak_memory_mb={"cuda": None}, commit=None)
    check_fields(run)
    for name in typing.get_type_hints(RunResult):
        with pytest.raises(TypeError, match=name):
            check_fields(replace(run, **{name: object()}))


@pytest.fixture
def good(tmp_path):
    RunResult("CoOp", "Dots", seed=1, metrics={"test": {"accuracy": 81.5}}).save(tmp_path / "good")
    return tmp_path


@pytest.mark.parametrize("kind", ODD)
def test_an_odd_file_is_named_and_left_out(good, capsys, kind):
    (good / kind).mkdir()
    (good / kind / "results.json").write_text(ODD[kind])
    assert main(["parse", str(good)]) == 0
    shown = capsys.readouterr()
    assert "81.5" in shown.out
    assert str(good / kind / "results.json") in shown.err
    assert "left out" in shown.err


def test_a_foreign_file_beside_a_log_gives_way_to_the_log(good, capsys):
    (good / "theirs").mkdir()
    (good / "theirs" / "results.json").write_text('{"accuracy": 3}')
    (good / "theirs" / "log.txt").write_text(
        "************\n** Config **\n************\nDATASET:\n  NAME: Dots\n  NUM_SHOTS: 4\n"
        "  SOURCE_DOMAINS: ()\n  TARGET_DOMAINS: ()\n"
        "MODEL:\n  BACKBONE:\n    NAME: RN50\nSEED: 2\nTRAINER:\n  NAME: CoCoOp\nCollecting env info ...\n"
        "Evaluate on the *test* set\n=> result\n* total: 10\n* correct: 4\n* accuracy: 44.0%\n"
    )
    assert main(["parse", str(good)]) == 0
    shown = capsys.readouterr()
    assert "44.0" in shown.out
    assert "left out" not in shown.err


def test_what_may_not_be_read_is_said_with_its_remedy(tmp_path, monkeypatch, capsys):
    """The log beside a record that is another user's is not taken for it; a folder that can't be listed is not an empty one."""

    def refuse(path, **_):
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "results.json").write_text("{}")
    (tmp_path / "log.txt").write_text("* accuracy: 50.0%\n")
    monkeypatch.setattr("pathlib.Path.read_text", refuse)
    assert main(["parse", str(tmp_path)]) == 2
    assert "results.json can't be read: Permission denied; check its permissions" in capsys.readouterr().err
    monkeypatch.setattr("os.scandir", refuse)
    assert main(["parse", str(tmp_path)]) == 2
    assert "can't be listed: Permission denied; check its permissions" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["github", "latex", "csv"])
def test_tables_mark_runs_that_did_otherwise(tmp_path, capsys, form):
    told = "RESUME: goes on from elsewhere, whose settings are not known"
    for name, texts in (("marked", [told]), ("plain", [])):
        RunResult(name, "Dots", seed=1, metrics={"test": {"accuracy": 50.0}}, approximations=texts).save(tmp_path / name)
    assert main(["parse", str(tmp_path), "--format", form]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(told in line for line in lines) == 1
    starred = [line for line in lines if "marked *" in line]
    assert len(starred) == (form != "csv") and not any("plain *" in line for line in lines)
