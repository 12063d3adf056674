"""Averages over data sets, and the papers' numbers beside ours: only where everything that matters is the same."""

import json

import numpy as np
import pytest

from promptmix.cli import main
from promptmix.errors import UserError
from promptmix.runs.results import RunResult
from promptmix.tables import plots, published, tables

ELEVEN = published._ELEVEN


def run(trainer="CoOp", part="base", seed=1, accuracy=50.0, dataset="OxfordFlowers", backbone="ViT-B/16", shots=16, **keys):
    return RunResult(
        trainer=trainer,
        dataset=dataset,
        backbone=backbone,
        subsample_classes=part,
        shots=shots,
        seed=seed,
        metrics={"test": {"accuracy": accuracy}},
        config={"MODEL": {"BACKBONE": keys.pop("node", {})}, "DATASET": keys.pop("data", {}), "OPTIM": keys.pop("settings", {})},
        started="2026",
        finished="2026",
        **keys,
    )


def table(runs, **keys):
    rows, metrics, _ = tables.aggregate(runs, **keys)
    return rows + tables.averages(rows, metrics, keys.get("ci95", False)), metrics


def test_average_is_the_mean_of_means_and_h_is_that_of_the_averages():
    base = {("A", 1): 80.0, ("A", 2): 84.0, ("B", 1): 40.0, ("B", 2): 60.0}
    new = {("A", 1): 70.0, ("A", 2): 74.0, ("B", 1): 30.0, ("B", 2): 34.0}
    runs = [run(dataset=d, seed=s, accuracy=v) for (d, s), v in base.items()]
    runs += [run(dataset=d, seed=s, accuracy=v, part="new") for (d, s), v in new.items()]
    average = table(runs)[0][-1]
    assert average.dataset == "average of 2" and average.averages == ("A", "B") and average.seeds == [1, 2]
    assert average.cells["accuracy", "base"].mean == 66.0
    assert average.cells["accuracy", "base"].spread == pytest.approx(np.std([60.0, 72.0]))
    assert average.cells["accuracy", "h"].mean == pytest.approx(2 * 66 * 52 / (66 + 52))
    narrow = table(runs, ci95=True)[0][-1]
    assert narrow.cells["accuracy", "base"].spread == pytest.approx(12.70620474 * np.std([60.0, 72.0], ddof=1) / np.sqrt(2))


def test_average_of_transfer_leaves_the_source_out():
    def transfer(dataset, accuracy, trained_on=""):
        return run(dataset=dataset, part="all", accuracy=accuracy, protocol="cross-dataset", trained_on=trained_on)

    runs = [transfer("ImageNet", 70.0), transfer("EuroSAT", 40.0, "ImageNet"), transfer("UCF101", 60.0, "ImageNet")]
    rows, metrics = table(runs)
    assert [row.dataset for row in rows] == [
        "ImageNet",
        "ImageNet → EuroSAT",
        "ImageNet → UCF101",
        "ImageNet → average of 2",
    ]
    assert rows[-1].cells["accuracy", "test"].mean == 50.0
    assert tables.render(rows, metrics).splitlines()[-1].startswith("| CoOp     | ImageNet → average of 2")


def test_one_data_set_has_no_average_and_other_settings_have_their_own():
    assert len(table([run()])[0]) == 1
    runs = [run(dataset="A"), run(dataset="B"), run(dataset="A", shots=4), run(dataset="B", shots=4)]
    assert [row.shots for row in table(runs)[0] if row.averages] == ["16", "4"]


def test_published_number_and_difference_stand_beside_ours():
    rows, metrics = table([run(accuracy=90.0), run(accuracy=60.0, part="new"), run(trainer="ZeroshotCLIP", accuracy=72.08)])
    notes = published.add(rows)
    coop, clip = rows
    assert coop.published == {"base": 97.60, "new": 59.67, "h": 74.06}
    assert clip.published["base"] == 72.08
    text = tables.render(rows, metrics)
    assert "97.60 (-7.60)" in text and "59.67 (+0.33)" in text and "72.08 (+0.00)" in text
    assert any("PromptKD" in note for note in notes)
    line = next(line for line in json.loads(tables.render(rows, metrics, "json")) if line["part"] == "new")
    assert line["published"] == 59.67 and line["difference"] == pytest.approx(0.33) and "PromptKD" in line["origin"]
    assert "published" in tables.render(rows, metrics, "csv").splitlines()[0]


def test_average_over_the_eleven_is_compared_and_disagreement_told():
    rows, _ = table([run(dataset=dataset, accuracy=80.0) for dataset in ELEVEN])
    notes = published.add(rows)
    average = next(row for row in rows if row.averages)
    assert average.published == {"base": 82.69, "new": 63.22, "h": 71.66}
    assert any("KgCoOp" in note and "82.63" in note for note in notes)
    best = [note for note in notes if note.startswith("best published H")]
    assert best[0] == "best published H, labelled pictures: 81.51 (SpecPL, abstract arXiv 2605.04504)"
    assert best[-1].startswith("best published H, unlabelled pictures and teacher: 84.35 (ATPrompt + PromptKD")
    fewer, _ = table([run(dataset=dataset) for dataset in ELEVEN[1:]])
    published.add(fewer)
    assert not next(row for row in fewer if row.averages).published


def test_averages_of_other_protocols_are_compared():
    rows, metrics = table([run(trainer="PLOTpp", dataset=dataset, part="all", accuracy=80.0) for dataset in ELEVEN])
    notes = published.add(rows)
    assert rows[-1].published == {"test": 82.1} and "82.10 (-2.10)" in tables.render(rows, metrics)
    assert "best published accuracy (few-shot), labelled pictures: 85.1 (SOT-GLP, abstract arXiv 2603.08347)" in notes
    whole = {"part": "all", "protocol": "cross-dataset", "trained_on": "ImageNet", "trainer": "MaPLe"}
    rows, _ = table([run(dataset=dataset, **whole) for dataset in ELEVEN[1:]])
    published.add(rows)
    assert rows[-1].published == {"test": 66.3} and not any(row.published for row in rows[:-1])


@pytest.mark.parametrize(
    "change",
    [
        {"backbone": "ViT-B/32"},
        {"backbone": "tiny-en"},
        {"node": {"TAG": "laion2b_s34b_b88k"}},
        {"node": {"PRETRAINED": False}},
        {"shots": 4},
        {"part": "all"},
        {"trainer": "MoCoOp"},
        {"dataset": "EmojiFamilies"},
        {"data": {"CLASS_ORDER": "seeded"}},
    ],
    ids=str,
)
def test_anything_else_is_never_compared(change):
    rows, metrics = table([run(**change)])
    assert "no published number" in published.add(rows)[0]
    assert "ublished" not in tables.render(rows, metrics)


def test_every_published_row_is_a_number_of_a_known_protocol():
    for entries in published._table().values():
        for entry in entries:
            assert all(0 < float(entry[column]) <= 100 for column in ("base", "new", "hmean") if entry[column])
            assert entry["source"]


def test_parse_draws_and_compares(tmp_path, capsys):
    for trainer in ("CoOp", "KgCoOp"):
        for part in ("base", "new"):
            for dataset in ("EuroSAT", "UCF101"):
                for shots in (1, 16):
                    one = run(trainer=trainer, part=part, dataset=dataset, shots=shots, accuracy=40.0 + shots + len(part))
                    one.save(tmp_path / "runs" / f"{trainer}-{part}-{dataset}-{shots}")
    assert main(["parse", str(tmp_path / "runs"), "--published", "--plot", str(tmp_path / "plots")]) == 0
    output = capsys.readouterr()
    assert "Base, published" in output.out and "average of 2" in output.out
    expected = {f"shots-base-to-new-{part}.png" for part in ("base", "new", "h")}
    expected |= {f"{kind}-base-to-new-{shots}-shots.png" for kind in ("base-new", "bars") for shots in (1, 16)}
    assert {path.name for path in (tmp_path / "plots").iterdir()} == expected
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (tmp_path / "plots").iterdir())
    assert main(["parse", str(tmp_path / "runs"), "--published", "--split", "val"]) == 2


@pytest.mark.parametrize(("suffix", "start"), [("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_pictures_by_suffix_are_the_same_bytes_each_time(tmp_path, suffix, start):
    rows, _ = table([run(), run(trainer="MoCoOp", accuracy=60.0)])
    (first,) = plots.write(rows, "accuracy", tmp_path / "paper" / f"mine.{suffix}")
    assert first.name == f"mine-bars-base-to-new-16-shots.{suffix}"
    content = first.read_bytes()
    assert content.startswith(start)
    plots.write(rows, "accuracy", tmp_path / "paper" / f"mine.{suffix}")
    assert first.read_bytes() == content
    with pytest.raises(UserError, match="ends with .png, .pdf, .svg"):
        plots.write(rows, "accuracy", tmp_path / "mine.jpg")


def test_many_methods_are_ranked_and_only_the_best_have_colours():
    runs = [
        run(trainer=f"Method{n}", part=part, shots=shots, accuracy=40.0 + n + shots / 16)
        for n in range(20)
        for part in ("base", "new")
        for shots in (1, 16)
    ]
    rows, _ = table(runs)
    drawn = dict(plots.figures(rows, "accuracy"))
    assert {"ranking-base-to-new-16-shots", "base-new-base-to-new-16-shots", "shots-base-to-new-h"} <= set(drawn)
    names = [label.get_text() for label in drawn["ranking-base-to-new-16-shots"].axes[0].get_yticklabels()]
    assert names == [f"Method{n}" for n in range(20)]
    for name in ("base-new-base-to-new-16-shots", "shots-base-to-new-h"):
        told = [text.get_text() for text in drawn[name].legends[0].get_texts()]
        assert sorted(told) == sorted([*(f"Method{n}" for n in range(13, 20)), "others"])


def test_names_that_a_sweep_gave_stand_for_settings():
    pair = [run(variant="short", settings={"LR": 1}), run(variant="", accuracy=60.0, settings={"LR": 2})]
    rows, metrics = table(pair)
    assert {row.settings for row in rows} == {"", "short"} and "short" in tables.render(rows, metrics)
    assert {style.label for style in plots._styles(rows).values()} == {"CoOp", "CoOp (short)"}
    both, _ = table([run(variant="short", settings={"LR": 1}), run(variant="short", settings={"LR": 2})])
    assert {row.settings for row in both} == {"OPTIM.LR=1", "OPTIM.LR=2"}


def test_pictures_without_matplotlib_are_a_user_error(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    rows, _ = table([run()])
    with pytest.raises(UserError, match=r"pip install 'promptmix\[plot\]'"):
        plots.write(rows, "accuracy", tmp_path / "plots")


def test_methods_never_share_a_look():
    rows, _ = table([run(trainer=f"Method{number}") for number in range(40)])
    looks = {(style.colour, style.marker, style.hatch) for style in plots._styles(rows).values()}
    assert len(looks) == 40
    other, _ = table([run(), run(backbone="ViT-B/32")])
    assert {style.label for style in plots._styles(other).values()} == {"CoOp (ViT-B/16)", "CoOp (ViT-B/32)"}
