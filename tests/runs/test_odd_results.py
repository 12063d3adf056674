"""``parse`` among files that somebody else wrote: what can't be read is named and left out, and the table stands."""

from __future__ import annotations

import json

import pytest

from promptmix.cli import main
from promptmix.runs.results import RunResult

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
