"""Paired tests: McNemar against the binomial, the bootstrap against what is known of its mean and spread, and the command."""

import csv
import hashlib
import io
import json

import numpy as np
import pytest
from scipy import stats

from promptmix.cli import main
from promptmix.errors import UserError
from promptmix.runs.results import RunResult
from promptmix.tables import paired, tables
from tests.runs.test_samples import write


def run_with(folder, trainer, hits, seed=1, part="base", dataset="Pets"):
    """Save a run whose pictures are told right where ``hits`` says so."""
    hits = np.asarray(hits, bool)
    count = len(hits)
    config = {"DATASET": {"SUBSAMPLE_CLASSES": part, "NUM_SHOTS": 16}, "OPTIM": {"LR": 0.1}, "SEED": seed}
    run = RunResult(trainer, dataset, "tiny-en", part, shots=16, seed=seed, config=config)
    run.metrics = {"test": {"accuracy": 100 * float(hits.mean())}}
    run.started = run.finished = "2026-01-01"
    place = folder / dataset / trainer / part / str(seed)
    place.mkdir(parents=True)
    arrays = {
        "path": np.array([f"{part}/{i}.png" for i in range(count)])[::-1],
        "label": np.zeros(count, np.int32),
        "classname": np.array(["a", "b"]),
        "top_class": (~hits[::-1]).astype(np.int32)[:, None],
        "top_probability": np.full((count, 1), 0.9, np.float32),
        "own_gap": np.zeros(count, np.float32),
        "temperature": np.array([1, 2], np.float32),
        "log_norm": np.zeros((count, 2), np.float32),
    }
    path = write(place / "predictions.npz", arrays)
    run.files = {"predictions.npz": hashlib.sha256(path.read_bytes()).hexdigest()}
    run.save(place)
    return place


def rows_of(folder):
    from promptmix.runs import results

    found, metrics, _ = tables.aggregate(results.find(folder)[0])
    return found + tables.averages(found, metrics)


@pytest.mark.parametrize(("a", "b"), [(0, 0), (1, 0), (3, 9), (40, 22), (700, 640)])
def test_mcnemar_is_the_binomial_test(a, b):
    expected = stats.binomtest(a, a + b).pvalue if a + b else 1.0
    assert paired.mcnemar(a, b) == pytest.approx(expected, rel=1e-6)


def test_two_runs_are_compared_by_mcnemar(tmp_path):
    draw = np.random.default_rng(0)
    first, second = draw.random(400) < 0.6, draw.random(400) < 0.5
    run_with(tmp_path, "A", first, part="all")
    run_with(tmp_path, "B", second, part="all")
    (one,), notes = paired.compare(rows_of(tmp_path))
    assert not notes and one.test == paired.MCNEMAR
    assert (one.only_first, one.only_second) == ((first & ~second).sum(), (second & ~first).sum())
    assert one.p == pytest.approx(stats.binomtest(one.only_first, one.only_first + one.only_second).pvalue)
    assert one.difference == pytest.approx(100 * (first.mean() - second.mean()))
    differences = first.astype(float) - second
    half = 1.96 * 100 * differences.std() / 20
    assert one.low == pytest.approx(one.difference - half, abs=0.6) and one.high == pytest.approx(one.difference + half, abs=0.6)


def test_seeds_widen_the_interval_and_are_shared_by_both(tmp_path):
    draw = np.random.default_rng(1)
    base = draw.random(300) < 0.5
    for seed in (1, 2, 3, 4):
        flipped = base ^ (draw.random(300) < 0.1 * seed)  # what a seed does, it does to both methods
        run_with(tmp_path / "same", "A", flipped, seed, "all")
        run_with(tmp_path / "same", "B", flipped, seed, "all")
        run_with(tmp_path / "other", "A", flipped, seed, "all")
        run_with(tmp_path / "other", "B", base, seed, "all")
    (same,), _ = paired.compare(rows_of(tmp_path / "same"))
    assert same.difference == same.low == same.high == 0 and same.p == 1
    (other,), _ = paired.compare(rows_of(tmp_path / "other"))
    assert other.seeds == (4, 4) and other.test.endswith("seeds") and other.high - other.low > 4


def test_h_and_averages_are_compared(tmp_path):
    draw = np.random.default_rng(2)
    for dataset in ("Pets", "Cars"):
        for part, shares in {"base": (0.8, 0.6), "new": (0.5, 0.5)}.items():
            for trainer, share in zip("AB", shares, strict=True):
                for seed in (1, 2):
                    run_with(tmp_path, trainer, draw.random(500) < share, seed, part, dataset)
    rows = rows_of(tmp_path)
    found, _ = paired.compare(rows, "B")
    assert {one.shots for one in found} == {"16"}
    by_place = {(one.dataset, one.part): one for one in found}
    assert len(by_place) == 9 and all((one.first, one.second) == ("A", "B") for one in found)
    cells = {row.method: row.cells for row in rows if row.averages}
    for part in ("base", "new", "h"):
        one = by_place["average of 2", part]
        assert one.difference == pytest.approx(cells["A"]["accuracy", part].mean - cells["B"]["accuracy", part].mean)
        assert one.low < one.difference < one.high
    assert by_place["average of 2", "base"].p < 0.01 < by_place["average of 2", "new"].p
    assert all(one.holm >= one.p for one in found)
    ranked = sorted(found, key=lambda one: one.p)
    assert [one.holm for one in ranked] == sorted(one.holm for one in ranked)


def test_p_is_not_bound_by_the_number_of_replicates(tmp_path):
    draw = np.random.default_rng(3)
    base = draw.random(400) < 0.4
    for seed in (1, 2, 3):
        run_with(tmp_path, "A", base, seed, "all")
        run_with(tmp_path, "B", base & (np.arange(400) % 8 > 0), seed, "all")
    (one,), _ = paired.compare(rows_of(tmp_path))
    lost = (base & (np.arange(400) % 8 == 0)).mean()  # the same for all seeds, so that pictures alone are drawn
    z = lost / np.sqrt(lost * (1 - lost) / 400)
    assert z > 3.5 and np.log(one.p) == pytest.approx(np.log(2 * stats.norm.sf(z)), rel=0.1)
    assert one.p < 1 / paired.REPLICATES


def test_rows_of_one_method_are_told_apart_from_those_of_others_too(tmp_path):
    for rate, label in ((0.1, "short"), (0.2, "long")):
        place = run_with(tmp_path / label, "A", [True] * 30 + [False] * 10, part="all")
        record = json.loads((place / "results.json").read_text()) | {"variant": label}
        record["config"]["OPTIM"]["LR"] = rate
        (place / "results.json").write_text(json.dumps(record))
    run_with(tmp_path, "B", [True] * 10 + [False] * 30, part="all")
    found, _ = paired.compare(rows_of(tmp_path), "B")
    assert {(one.first, one.second) for one in found} == {("A (short)", "B"), ("A (long)", "B")}
    found, _ = paired.compare(rows_of(tmp_path), "A (short)")
    assert {(one.first, one.second) for one in found} == {("A (long)", "A (short)"), ("B", "A (short)")}


def test_rounds_of_labelling_are_compared(tmp_path):
    for label, right in (("random", 10), ("badge", 30)):
        for number in (0, 1):
            hits = [True] * (right if number else 20) + [False] * (20 if not number else 40 - right)
            place = run_with(tmp_path / f"{label}{number}", "A", hits, part="all")
            record = json.loads((place / "results.json").read_text())
            record |= {"variant": label, "protocol": "active", "part": f"round{number}"}
            (place / "results.json").write_text(json.dumps(record))
    first, second = paired.compare(rows_of(tmp_path), "A (random)")[0]
    assert (first.part, first.difference, second.part, second.difference) == ("round0", 0, "round1", 50)
    assert "| Round 1 |" in paired.render([second], "github")


def test_what_can_not_be_compared_is_said(tmp_path):
    run_with(tmp_path, "A", [True, False], part="all")
    run_with(tmp_path, "B", [True, False, True], part="all")
    place = run_with(tmp_path, "C", [True, False], part="all")
    (place / "predictions.npz").write_bytes(b"damaged")
    found, notes = paired.compare(rows_of(tmp_path))
    assert found == [] and any("different pictures" in note for note in notes) and any("SHA-256" in note for note in notes)
    with pytest.raises(UserError, match="--compare Z: no run of it"):
        paired.compare(rows_of(tmp_path), "Z")


def test_the_command_shows_them(tmp_path, capsys):
    run_with(tmp_path, "A|<b>", [True] * 30 + [False] * 10, part="all", dataset="=2+2")
    run_with(tmp_path, "B", [True] * 10 + [False] * 30, part="all", dataset="=2+2")
    assert main(["parse", str(tmp_path), "--compare"]) == 0
    out = capsys.readouterr().out
    assert "McNemar, exact (20:0)" in out and "A\\|<b>" in out and "<0.001" in out
    assert main(["parse", str(tmp_path), "--compare", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["only_first"] == 20
    assert main(["parse", str(tmp_path), "--compare", "--format", "csv"]) == 0
    (line,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert line["dataset"] == "'=2+2"
    assert main(["parse", str(tmp_path), "--compare", "A|<b", "--format", "csv"]) == 2
    assert "did you mean" in capsys.readouterr().err
    assert main(["parse", str(tmp_path), "--compare", "--split", "val"]) == 2
