"""The quick start: a table over base and new classes, one after another or side by side, that goes on where it stopped."""

from pathlib import Path

import pytest
import yaml

from promptmix.cli import main
from promptmix.commands import run
from promptmix.runs import backends, results
from promptmix.runs.protocols import Job
from tests.dots import PLUGIN, fails


@pytest.fixture
def comparison(dots, tmp_path):
    """Return a quick start over two seeds of `Linear` on `Dots`, into tmp_path/quick."""
    config = Path(dots[dots.index("--config-file") + 1])
    tree = yaml.safe_load(config.read_text())
    tree["DATASET"]["ROOT"] = str(tmp_path / "data")
    config.write_text(yaml.safe_dump(tree))
    words = ["--plugin", PLUGIN, "--config-file", str(config), "--seeds", "1", "2", "--trainers", "Linear"]
    return ["quickstart", *words, "--jobs", "1", "--output-dir", str(tmp_path / "quick")]


def test_quickstart_trains_on_base_tests_on_new_and_prints_the_table(comparison, tmp_path, capsys):
    assert main(comparison) == 0
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    assert [line.split(":")[0] for line in lines[:4]] == [
        f"[{number}/4] Linear seed {seed} {part}"
        for number, (seed, part) in enumerate(((1, "base"), (1, "new"), (2, "base"), (2, "new")), start=1)
    ]
    assert "| Linear" in shown and "Base" in shown and "=> result" not in shown
    base = results.load(tmp_path / "quick" / "Linear" / "seed1" / "base" / "results.json")
    new = results.load(tmp_path / "quick" / "Linear" / "seed1" / "new" / "results.json")
    assert (base.subsample_classes, new.subsample_classes) == ("base", "new")
    assert new.checkpoint == {"directory": str(tmp_path / "quick" / "Linear" / "seed1" / "base"), "epoch": 2}
    assert "=> result" in (tmp_path / "quick" / "Linear" / "seed2" / "new" / "log.txt").read_text()


def test_quickstart_side_by_side_makes_the_same_table(comparison, tmp_path, capsys, monkeypatch):
    given = []

    def local(jobs, options, started):
        """Stands in for processes; what they do is the sweep's, and tested there."""
        given.append(options)
        for index in (1, 0):
            started(index)
            yield index, backends.work(jobs[index], 1)

    assert main(comparison) == 0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    monkeypatch.setattr(backends, "local", local)
    monkeypatch.setattr(run, "last_first", lambda jobs: [1, 0])
    again = [*comparison, "--output-dir", str(tmp_path / "again"), "--jobs", "2"]
    assert main(again) == 0
    shown = capsys.readouterr().out
    assert [line for line in shown.splitlines() if line.startswith("|")] == table
    assert "[1/2] base-to-new Linear seed 1: base" in shown and given[0].jobs == 2 and given[0].threads == 1
    assert main(again) == 0  # nothing is left to run side by side
    assert capsys.readouterr().out.count("finished before") == 4 and len(given) == 1


def test_the_last_method_begins_first():
    jobs = [Job("few-shot", trainer, "", trainer, seed) for trainer in ("Small", "Middle", "Large") for seed in (1, 2)]
    assert run.last_first(jobs) == [4, 5, 2, 3, 1, 0]  # the first one last, which begins beside the other, for the test pictures
    assert run.last_first(jobs[:2]) == [0, 1]


def test_quickstart_goes_on_where_it_stopped(comparison, tmp_path, capsys):
    assert main(comparison) == 0
    first = capsys.readouterr().out
    paths = sorted((tmp_path / "quick").rglob("results.json"))
    before = [path.read_text() for path in paths]
    paths[0].unlink()  # the base run of seed 1, so that its test on new classes is stale
    assert main(comparison) == 0
    second = capsys.readouterr().out
    assert second.count("finished before") == 2
    assert [path.read_text() for path in paths[2:]] == before[2:]
    assert paths[0].is_file() and paths[1].read_text() != before[1]
    table = [line for line in first.splitlines() if line.startswith("|")]
    assert table == [line for line in second.splitlines() if line.startswith("|")]


def test_quickstart_refuses_a_wrong_name_before_it_runs(comparison, tmp_path, capsys):
    fails(capsys, [*comparison, "--trainers", "Linear", "Lineer"], "did you mean 'Linear'")
    assert not (tmp_path / "quick").exists()
