"""results.json, Dassl's log as a fallback, and the numbers in the tables."""

import csv
import io
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from promptmix.config import get_cfg_default
from promptmix.errors import DataError, UserError
from promptmix.runs import results
from promptmix.runs.results import RunResult
from promptmix.tables import tables
from promptmix.tables.spread import spread_of, student_quantile


def make(trainer="CoOp", part="base", seed=1, accuracy=50.0, macro=None, dataset="Pets", finished="2026-01-01", **keys):
    config = {"DATASET": {"SUBSAMPLE_CLASSES": part, "NUM_SHOTS": 16}, "OPTIM": {"LR": 0.002}, "SEED": seed} | keys
    numbers = {"accuracy": accuracy} | ({} if macro is None else {"macro_accuracy": macro})
    return RunResult(
        trainer=trainer,
        dataset=dataset,
        backbone="tiny-en",
        subsample_classes=part,
        shots=16,
        seed=seed,
        metrics={"test": numbers},
        config=config,
        started=finished,
        finished=finished,
        source=f"{trainer}/{part}/{seed}/{finished}",
    )


def test_saved_result_reads_back_equal(tmp_path):
    run = make(macro=40.0)
    run.versions = results.collect_versions()
    path = run.save(tmp_path / "new" / "folder")
    back = results.load(path)
    assert back.source == str(path)
    back.source = run.source
    assert back == run
    assert json.loads(path.read_text())["schema_version"] == results.SCHEMA_VERSION
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]


def test_failed_save_leaves_the_old_file(tmp_path):
    path = make().save(tmp_path)
    before = path.read_text()
    bad = make()
    bad.metrics = {"test": {"accuracy": object()}}
    with pytest.raises(TypeError):
        bad.save(tmp_path)
    assert path.read_text() == before
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema_version": 1}', '{"schema_version": 99, "trainer": "x"}'])
def test_unreadable_results_are_named(tmp_path, text):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(DataError, match="results.json"):
        results.find(tmp_path)


def test_folder_without_runs_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="no results.json"):
        results.find(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        results.find(tmp_path / "missing")


def dassl_log(seed, accuracy, part="base"):
    cfg = get_cfg_default()
    cfg.TRAINER.NAME, cfg.DATASET.NAME, cfg.MODEL.BACKBONE.NAME = "CoCoOp", "OxfordPets", "ViT-B/16"
    cfg.DATASET.NUM_SHOTS, cfg.SEED, cfg.DATASET.SUBSAMPLE_CLASSES = 16, seed, part
    cfg.DATASET.SOURCE_DOMAINS = ("art", "photo")
    return "\n".join(
        [
            "***************\n** Arguments **\n***************\nbackbone: ",
            f"************\n** Config **\n************\n{cfg}\nCollecting env info ...\n** System info **\nPyTorch 1.8",
            "Evaluate on the *val* set\n=> result\n* total: 10\n* accuracy: 11.0%",
            "Evaluate on the *test* set\n=> result\n* total: 3,669\n* correct: 3,000",
            f"* accuracy: {accuracy}%\n* error: {100 - accuracy:.1f}%\n* macro_f1: 84.1%\n* macro_acc: 83.0%\nElapsed: 0:01:02\n",
        ]
    )


def test_dassl_log_is_read_where_there_is_no_json(tmp_path):
    for seed, accuracy in ((1, 85.3), (2, 87.3)):
        folder = tmp_path / f"seed{seed}"
        folder.mkdir()
        (folder / "log.txt").write_text(dassl_log(seed, accuracy))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "log.txt").write_text("epoch [1/50]\n")
    runs, notes = results.find(tmp_path)
    first = runs[0]
    assert (first.trainer, first.dataset, first.backbone, first.shots) == ("CoCoOp", "OxfordPets", "ViT-B/16", 16)
    assert first.source_domains == ["art", "photo"]
    assert first.metrics["test"] == {"accuracy": 85.3, "error_rate": 14.7, "macro_f1": 84.1, "macro_accuracy": 83.0}
    assert first.metrics["val"] == {"accuracy": 11.0}
    assert first.config["OPTIM"]["WARMUP_CONS_LR"] == 1e-5
    assert first.config["DATASET"]["ROOT"] == ""
    assert len(notes) == 1 and "broken" in notes[0]
    rows, _, _ = tables.aggregate(runs)
    assert rows[0].cells["accuracy", "base"].mean == pytest.approx(86.3)


def test_log_and_json_of_one_config_are_one_setting(tmp_path):
    (tmp_path / "log.txt").write_text(dassl_log(1, 80.0))
    from_log = results.from_log(tmp_path / "log.txt")
    cfg = get_cfg_default()
    cfg.TRAINER.NAME, cfg.DATASET.NUM_SHOTS = "CoCoOp", 16
    plain = json.loads(json.dumps(cfg))
    assert from_log.settings() == RunResult.from_config(plain).settings()


def test_h_is_the_harmonic_mean_of_means_and_spread_is_dassls():
    base, new = [80.0, 82.0, 84.0], [60.0, 50.0, 64.0]
    runs = [make(part="base", seed=i, accuracy=value) for i, value in enumerate(base)]
    runs += [make(part="new", seed=i, accuracy=value) for i, value in enumerate(new)]
    rows, metrics, notes = tables.aggregate(runs)
    cells = rows[0].cells
    assert metrics == ["accuracy"] and not notes
    assert cells["accuracy", "base"].mean == 82.0
    assert cells["accuracy", "base"].spread == pytest.approx(np.std(base))
    assert cells["accuracy", "h"].mean == pytest.approx(2 * 82 * 58 / (82 + 58))
    each = [2 * b * n / (b + n) for b, n in zip(base, new, strict=True)]
    assert cells["accuracy", "h"].spread == pytest.approx(np.std(each))
    interval, _, _ = tables.aggregate(runs, ci95=True)
    assert interval[0].cells["accuracy", "base"].spread == pytest.approx(4.302652730 * np.std(base, ddof=1) / math.sqrt(3))


#: Two-sided 95% quantiles from printed tables (NIST/SEMATECH e-Handbook, 1.3.6.7.2), and two of other shares.
@pytest.mark.parametrize(
    ("freedom", "inside", "t"),
    [
        *((1, 0.95, 12.706), (2, 0.95, 4.303), (3, 0.95, 3.182), (4, 0.95, 2.776), (5, 0.95, 2.571), (9, 0.95, 2.262)),
        *((10, 0.95, 2.228), (29, 0.95, 2.045), (100, 0.95, 1.984), (10_000, 0.95, 1.960), (2, 0.99, 9.925), (7, 0.9, 1.895)),
    ],
)
def test_quantiles_are_students(freedom, inside, t):
    assert student_quantile(freedom, inside) == pytest.approx(t, abs=6e-4)


def test_an_interval_holds_the_true_mean_in_95_of_100_cases():
    draws = np.random.default_rng(0).normal(70.0, 2.0, (4000, 3))
    held = [abs(row.mean() - 70.0) <= spread_of(row.tolist(), ci95=True) for row in draws]
    assert np.mean(held) == pytest.approx(0.95, abs=0.012)


@pytest.mark.parametrize("ci95", [False, True])
def test_one_seed_has_no_spread_and_no_interval(ci95):
    rows, metrics, _ = tables.aggregate([make(accuracy=50.0)], ci95=ci95)
    assert rows[0].cells["accuracy", "base"].spread == (None if ci95 else 0.0)
    assert "±" not in tables.render(rows, metrics)
    line = json.loads(tables.render(rows, metrics, fmt="json"))[0]
    assert (line["spread"], line["count"]) == (None if ci95 else 0.0, 1)


@pytest.mark.parametrize(("ci95", "words"), [(False, "population standard deviation"), (True, "half a 95% t-interval")])
def test_every_format_says_what_its_spread_is(ci95, words):
    rows, metrics, _ = tables.aggregate([make(seed=seed, accuracy=50.0 + seed) for seed in (1, 2)], ci95=ci95)
    assert tables.render(rows, metrics).splitlines()[-1].startswith("± is ") and words in tables.render(rows, metrics)
    assert tables.render(rows, metrics, fmt="latex").splitlines()[-1].startswith("% ± is ")
    assert words in json.loads(tables.render(rows, metrics, fmt="json"))[0]["spread_is"]
    assert words in next(csv.DictReader(io.StringIO(tables.render(rows, metrics, fmt="csv"))))["spread_is"]


@given(st.lists(st.tuples(st.floats(0.1, 100), st.floats(0.1, 100)), min_size=1, max_size=5))
def test_h_lies_between_base_and_new(pairs):
    runs = [make(part=p, seed=i, accuracy=v) for i, pair in enumerate(pairs) for p, v in zip(("base", "new"), pair, strict=True)]
    cells = tables.aggregate(runs)[0][0].cells
    base, new, h = (cells["accuracy", part].mean for part in ("base", "new", "h"))
    assert min(base, new) - 1e-9 <= h <= max(base, new) + 1e-9
    assert h <= (base + new) / 2 + 1e-9


def test_both_metrics_have_base_new_and_h():
    runs = [make(part="base", accuracy=70.0, macro=60.0), make(part="new", accuracy=50.0, macro=40.0)]
    text = tables.render(*tables.aggregate(runs)[:2])
    header = text.splitlines()[0]
    for title in ("Base", "New", "H", "Base (class-balanced)", "New (class-balanced)", "H (class-balanced)"):
        assert f" {title} |" in header
    assert "48.00" in text


def test_same_seed_twice_uses_the_newest_and_says_so():
    runs = [make(accuracy=10.0, finished="2026-01-02"), make(accuracy=90.0, finished="2026-01-01")]
    rows, _, notes = tables.aggregate(runs)
    assert rows[0].cells["accuracy", "base"].mean == 10.0
    assert rows[0].cells["accuracy", "base"].count == 1
    assert len(notes) == 1 and "seed 1" in notes[0] and "2026-01-02" in notes[0]


def test_unseeded_runs_are_not_duplicates():
    rows, _, notes = tables.aggregate([make(seed=-1, accuracy=10.0), make(seed=-1, accuracy=20.0)])
    assert rows[0].cells["accuracy", "base"].count == 2
    assert not notes


def test_a_seed_without_partner_stays_out_of_h():
    runs = [make(part="base", seed=1, accuracy=60.0), make(part="base", seed=2, accuracy=80.0)]
    runs.append(make(part="new", seed=1, accuracy=60.0))
    rows, _, notes = tables.aggregate(runs)
    assert rows[0].cells["accuracy", "h"].mean == pytest.approx(60.0)
    assert any("seed 2" in note for note in notes)


def test_other_settings_are_never_averaged_together():
    runs = [make(seed=1, accuracy=10.0), make(seed=2, accuracy=90.0, OPTIM={"LR": 0.1})]
    rows, metrics, _ = tables.aggregate(runs)
    assert {row.settings for row in rows} == {"OPTIM.LR=0.002", "OPTIM.LR=0.1"}
    assert "Settings" in tables.render(rows, metrics)


def test_a_record_that_says_less_hides_no_difference_of_others():
    runs = [make(seed=1, accuracy=10.0), make(seed=2, accuracy=90.0, OPTIM={"LR": 0.1}), make(seed=3, OPTIM={})]
    rows = tables.aggregate(runs)[0]
    assert {row.settings: row.seeds for row in rows} == {"OPTIM.LR=0.002": [1], "OPTIM.LR=0.1": [2], "": [3]}


def test_classes_epochs_and_names_of_a_sweep_are_kept_apart():
    runs = [make(seed=1), make(seed=2)]
    for run, names in zip(runs, (["ant", "bee"], ["car", "dog"]), strict=True):
        run.vocabulary = {"classnames": names, "all_classnames": names}
    assert [row.settings.partition(",")[0] for row in tables.aggregate(runs)[0]] == ["classes=ant", "classes=car"]
    runs = [make(seed=1), make(seed=2)]
    for run, epoch in zip(runs, (5, 10), strict=True):
        run.checkpoint = {"directory": f"runs/seed{run.seed}", "epoch": epoch}
    assert {row.settings for row in tables.aggregate(runs)[0]} == {"--load-epoch=5", "--load-epoch=10"}
    runs = [make(seed=1), make(seed=1, finished="2026-01-02")]
    runs[0].variant, runs[1].variant = "short", "long"
    rows, _, notes = tables.aggregate(runs)
    assert {row.settings for row in rows} == {"short", "long"} and not notes


def test_protocols_shots_and_data_sets_are_kept_apart():
    runs = [make(), make(part="all"), make(dataset="Cars")]
    runs.append(make(trainer="MoCoOp", accuracy=70.0))
    rows, metrics, _ = tables.aggregate(runs)
    assert len(rows) == 4
    text = tables.render(rows, metrics, sort="base")
    assert text.index("MoCoOp") < text.index("CoOp ", text.index("MoCoOp") + 6)
    assert "Test" in text


@pytest.mark.parametrize("fmt", ["github", "latex", "latex_booktabs", "plain", "csv", "json", "html"])
def test_formats(fmt):
    runs = [make(seed=seed, part=part, accuracy=50.0 + seed) for seed in (1, 2) for part in ("base", "new")]
    text = tables.render(*tables.aggregate(runs)[:2], fmt=fmt)
    if fmt == "csv":
        lines = list(csv.DictReader(io.StringIO(text)))
        assert {line["part"] for line in lines} == {"base", "new", "h"}
        assert float(lines[0]["mean"]) == 51.5 and lines[0]["seeds"] == "1 2"
    elif fmt == "json":
        assert json.loads(text)[0]["count"] == 2
    else:
        assert "51.50" in text and "CoOp" in text


def test_cost_shows_learned_parameters_and_mean_seconds():
    runs = [make(seed=seed) for seed in (1, 2)]
    for run, seconds in zip(runs, (2.0, 4.0), strict=True):
        run.learned_parameters, run.seconds, run.step_gflops = 2048, {"train": seconds}, 1234.5
    rows, metrics, _ = tables.aggregate(runs)
    cells = tables.render(rows, metrics, cost=True).splitlines()[-3].split("|")
    assert [cell.strip() for cell in cells[-4:-1]] == ["2,048", "1,234.5", "3.0"]
    assert "Learned" not in tables.render(rows, metrics)


def test_leagues_are_no_ranking_of_each_other():
    runs = [make(trainer=name) for name in ("A", "B", "C")]
    runs[0].league, runs[0].metrics = "unlabelled pictures and teacher", {"test": {"accuracy": 99.0}}
    rows, metrics, notes = tables.aggregate(runs)
    assert notes[0].startswith(
        "leagues differ (labelled pictures, unlabelled pictures and teacher): their rows are not a ranking"
    )
    lines = tables.render(rows, metrics, sort="base").splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:5]] == ["B", "C", "A"]  # the best number is of another league
    assert "League" in lines[0]
    alone, metrics, notes = tables.aggregate(runs[1:])
    assert "League" not in tables.render(alone, metrics) and not notes


def test_unknown_choices_are_refused():
    rows, metrics, _ = tables.aggregate([make()])
    with pytest.raises(UserError, match="did you mean 'github'"):
        tables.render(rows, metrics, fmt="githb")
    with pytest.raises(UserError, match="--sort"):
        tables.render(rows, metrics, sort="size")
    with pytest.raises(UserError, match="did you mean 'accuracy'"):
        tables.aggregate([make()], ["acuracy"])
    with pytest.raises(UserError, match="evaluated splits: test"):
        tables.aggregate([make()], split="val")
