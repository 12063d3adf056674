"""Own pictures with one command: what is chosen is said, nothing of the quick start is inherited, every kind of method trains."""

from __future__ import annotations

import json

import pytest

from promptmix.cli import main
from promptmix.clip.load import look_of
from promptmix.data.datasets.emoji import write_sample
from promptmix.data.templates import IMAGENET_80, groups_of
from promptmix.runs.fit import Wish, config_of, recipe_of

QUICK = ["OPTIM.MAX_EPOCH", "1"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own") / "pictures"
    write_sample(folder, ("bird", "clock", "fruit"))
    return folder


def fit(pictures, out, *more):
    return main(["fit", str(pictures), "--output-dir", str(out), *more, *QUICK])


def test_it_says_what_it_chose_compares_and_says_what_to_type_next(pictures, tmp_path, capsys):
    assert fit(pictures, tmp_path / "out") == 0
    shown = capsys.readouterr().out
    assert "3 classes (bird, clock, fruit)" in shown and "tiny-en, embedded" in shown and "--backbone ViT-B/16" in shown
    assert "configs/trainers/CoOp/tiny.yaml: 1 epoch," in shown and "all training pictures" in shown and "0.5, 0.2, 0.3" in shown
    assert "| ZeroshotCLIP |" in shown and "| CoOp " in shown and f"promptmix predict --model-dir {tmp_path}/out/CoOp" in shown
    config = json.loads((tmp_path / "out" / "CoOp" / "results.json").read_text())["config"]
    assert config["DATASET"]["SUBSAMPLE_CLASSES"] == "all" and config["DATASET"]["SOURCE_DOMAINS"] == []
    words = json.loads((tmp_path / "out" / "CoOp" / "zeroshot" / "results.json").read_text())["vocabulary"]
    assert words["classnames"] == ["bird", "clock", "fruit"]
    assert fit(pictures, tmp_path / "out") == 0
    again = capsys.readouterr().out
    assert again.count("finished before") == 2 and "changed since" in again


@pytest.mark.parametrize("trainer", ["MoCoOp", "MoPD", "MaPLe", "TipAdapterF", "PromptSRC"])
def test_methods_with_groups_visual_prompts_and_caches_need_no_config(pictures, tmp_path, trainer, capsys):
    given = ["--template", "an icon of a {}."] if trainer in ("MaPLe", "TipAdapterF") else []
    assert fit(pictures, tmp_path, "--trainer", trainer, "--shots", "2", "--no-baseline", *given) == 0
    said = capsys.readouterr().out
    assert "at most 2: 2 a class" in said
    assert ("--template changed nothing: MaPLe reads none" in said) == (trainer == "MaPLe")
    export = ["export", str(tmp_path / trainer), "--output", str(tmp_path / "arrays.npz")]
    assert ("--format npz" in said) == (main(export) == 0)  # what it offers works


def test_few_pictures_are_said_with_numbers(pictures, tmp_path, capsys):
    assert fit(pictures, tmp_path, "--shots", "16", "--trainer", "ZeroshotCLIP") == 0
    assert "note: 16 shots: 2 of 3 classes have fewer training pictures (10)" in capsys.readouterr().out


def test_damaged_pictures_stop_it_or_are_left_out(pictures, tmp_path, capsys):
    damaged = pictures / "bird" / "damaged.webp"
    damaged.write_bytes(b"none")
    flags = ["--trainer", "ZeroshotCLIP"]
    try:
        assert fit(pictures, tmp_path / "out", *flags) == 2
        assert "--skip-bad" in capsys.readouterr().err and not (tmp_path / "out").exists()
        assert fit(pictures, tmp_path / "out", *flags, "--skip-bad") == 0
    finally:
        damaged.unlink()


def test_a_table_and_templates(pictures, tmp_path, capsys):
    rows = [f"{path.relative_to(pictures)},{path.parent.name}" for path in sorted(pictures.rglob("*.webp"))]
    table = pictures / "labels.csv"
    table.write_text("path,label\n" + "\n".join(rows) + "\n")
    try:
        assert fit(table, tmp_path, "--trainer", "MoCoOp", "--no-baseline", "--template", "an icon of a {}.") == 0
    finally:
        table.unlink()
    said = capsys.readouterr().out
    assert "'an icon of a {}.'" in said and "as labels.csv says" in said
    words = json.loads((tmp_path / "MoCoOp" / "results.json").read_text())["vocabulary"]
    assert words["templates"] == ["an icon of a {}."] and len(words["template_groups"]) == 6


def test_the_table_of_a_folder_is_found(pictures):
    table = pictures / "metadata.jsonl"
    table.write_text('{"file_name": "a.webp", "label": "cat"}\n')
    try:
        cfg = config_of(Wish(str(pictures)))
    finally:
        table.unlink()
    assert ("CSV", str(pictures), "metadata.jsonl") == (cfg.DATASET.NAME, cfg.DATASET.ROOT, cfg.DATASET.CSV.FILE)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "no nowhere"),
        (["--shots", "0"], "--shots"),
        (["--shots", "1__6"], "--shots is '1__6'; give a number"),
        (["--shots", "٣"], "--shots is '٣'; give a number"),
        (["--seed", "٣"], "--seed: invalid int value: '٣'"),
        (["--weights", "clip.pt"], "needs --backbone"),
        (["--trainer", "CoOpp"], "did you mean 'CoOp'"),
        (["--backbone", "ViT-B/99"], "ViT-B/99"),
        (["--backbone", "ViT-B/16", "--weights", "none.pt"], "none.pt"),
        (["--template", "no place"], "{}"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(pictures, tmp_path, arguments, words, capsys):
    given = arguments if arguments[0] == "nowhere" else [str(pictures), *arguments]
    assert main(["fit", *given, "--output-dir", str(tmp_path / "out"), *QUICK]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("promptmix: error") == 1 and not (tmp_path / "out").exists()


def test_recipes_of_real_backbones_are_the_methods_own():
    assert recipe_of("CoOp", "ViT-B/16") == "configs/trainers/CoOp/vit_b16.yaml"
    assert recipe_of("PromptSRC", "ViT-L/14") == "configs/trainers/PromptSRC/few_shot.yaml"
    assert recipe_of("MoCoOp", "ViT-B/16") == "configs/trainers/MoCoOp/vit_b16_c4_ep25_batch32_lr32.yaml"
    assert recipe_of("MaPLe", "ViT-B/16") == "configs/trainers/MaPLe/base_to_new.yaml"
    assert recipe_of("ZeroshotCLIP", "RN50") == "configs/trainers/_vit_b16.yaml"
    assert recipe_of("SomebodysOwn", "tiny-en") == "configs/quickstart.yaml"


def test_a_real_backbone_is_read_as_it_was_trained(room, pictures, tmp_path, capsys):
    assert look_of("ViT-L/14@336px").size == 336 and look_of("ViT-B-16-SigLIP").mean == (0.5, 0.5, 0.5)
    weights = ["--backbone", "ViT-B/16", "--weights", str(room / "clip.safetensors")]
    size = ["INPUT.SIZE", "(32, 32)", "DATALOADER.NUM_WORKERS", "0", *QUICK]
    assert main(["fit", str(pictures), "--output-dir", str(tmp_path), "--shots", "1", *weights, *size]) == 0
    shown = capsys.readouterr().out
    assert f"promptmix report {tmp_path}/CoOp --weights {room}/clip.safetensors --root" in shown
    assert "ViT-B/16, weights from" in shown and f"--weights {room}/clip.safetensors" in shown
    config = json.loads((tmp_path / "CoOp" / "zeroshot" / "results.json").read_text())["config"]
    assert config["MODEL"]["BACKBONE"]["WEIGHTS"] == weights[-1] and config["INPUT"]["PIXEL_MEAN"][0] == pytest.approx(0.48145466)


def test_groups_for_templates_that_come_without():
    assert {template for group in groups_of(["a photo of a {}."]) for template in group} <= set(IMAGENET_80)
    assert groups_of(["x {}", "y {}"]) == [["x {}"], ["y {}"]]
    assert groups_of(["x {}"])[0] == ["x {}"] and len(groups_of(["x {}"])) == 6


def test_sample_pictures_are_written(tmp_path, capsys):
    assert main(["data", "sample", str(tmp_path / "pics")]) == 0
    assert "295 pictures of 8 classes" in capsys.readouterr().out
    assert len(list((tmp_path / "pics").rglob("*.webp"))) == 295
    assert main(["data", "sample"]) == 2
