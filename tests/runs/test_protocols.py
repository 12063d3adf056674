"""The protocols on the embedded pictures: what is trained, what is evaluated from it, what is skipped and resumed."""

import json

import pytest

from promptmix.cli import main
from promptmix.runs import results
from promptmix.runs.protocols import PROTOCOLS, Job, check, parts
from tests.runs import made

SMALL = ["OPTIM.MAX_EPOCH", "1", "INPUT.SIZE", "(32, 32)", "DATASET.EMOJI.NUM_CONCEPTS", "6"]
FAMILIES, CONCEPTS = "EmojiFamilies", "EmojiConcepts"
STYLES = ["to-fluent_3d", "to-openmoji_black", "to-fluent_high_contrast"]


def command(protocol, output, *flags, datasets=(CONCEPTS,), trainers=("CoOp",), opts=SMALL):
    words = ["run", protocol, "--trainer", *trainers, "--datasets", *datasets, "--seeds", "1", "--shots", "1"]
    return [*words, "--output-dir", str(output), *flags, *opts]


def job(protocol, dataset=CONCEPTS, **keys):
    return Job(protocol, "CoOp", dataset, "out", 1, 1, config_file="configs/quickstart.yaml", **keys)


def fails(capsys, argv, *words):
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    assert all(word in error for word in words), error


@pytest.mark.parametrize(
    ("protocol", "expected"),
    [
        ("few-shot", {FAMILIES: ["all"], CONCEPTS: ["all"]}),
        ("base-to-new", {FAMILIES: ["base", "new"], CONCEPTS: ["base", "new"]}),
        ("open-world", {FAMILIES: ["base", "new", "open"], CONCEPTS: ["base", "new", "open"]}),
        ("cross-dataset", {FAMILIES: ["source", "to-EmojiConcepts"], CONCEPTS: ["source", "to-EmojiFamilies"]}),
        ("domain-generalization", {FAMILIES: ["source", *STYLES], CONCEPTS: ["source", *STYLES]}),
    ],
)
def test_emoji_take_part_in_every_protocol(protocol, expected, tmp_path, capsys):
    assert main(command(protocol, tmp_path, datasets=expected)) == 0
    shown = capsys.readouterr().out
    for dataset, names in expected.items():
        folder = tmp_path / protocol / dataset / "CoOp" / "shots1" / "seed1"
        assert sorted(path.name for path in folder.iterdir()) == sorted(names)
        for name in names[1:]:
            tested = results.load(folder / name / "results.json")
            assert tested.checkpoint == {"directory": str(folder / names[0]), "epoch": 1}
            assert tested.protocol == protocol
            assert f"{dataset} seed" not in shown and f"{name}: {'OpenworldAUC' if name == 'open' else 'accuracy'}" in shown
            if name.startswith("to-") and protocol == "domain-generalization":
                assert tested.target_domains == [name[3:]] and tested.dataset == dataset
            elif name.startswith("to-"):
                assert tested.dataset == name[3:] and tested.trained_on == dataset
    if protocol == "open-world":
        assert "OpenworldAUC" in shown.split("Seeds")[1].splitlines()[0]
        of = {name: results.load(folder / name / "results.json").metrics["test"] for name in names}
        assert of["open"]["base_accuracy"] == of["base"]["accuracy"] and of["open"]["new_accuracy"] == of["new"]["accuracy"]
    if protocol == "cross-dataset":
        assert f"| {FAMILIES} → {CONCEPTS} (" in " ".join(shown.split()).replace("| CoOp ", "")
    if protocol == "domain-generalization":
        assert f"{FAMILIES} → average of 3" in shown and f"{FAMILIES} (openmoji_color → fluent_3d)" in shown
    assert main(command(protocol, tmp_path, datasets=expected)) == 0
    again = capsys.readouterr().out
    assert again.count("finished before") == sum(map(len, expected.values()))


def test_cut_off_training_goes_on_and_other_settings_are_refused(tmp_path, capsys):
    assert main(command("few-shot", tmp_path)) == 0
    folder = tmp_path / "few-shot" / CONCEPTS / "CoOp" / "shots1" / "seed1" / "all"
    before = results.load(folder / "results.json")
    (folder / "results.json").unlink()  # as if it had been killed between the last epoch and the end of the test
    capsys.readouterr()
    fails(capsys, command("few-shot", tmp_path, opts=[*SMALL, "OPTIM.LR", "0.5"]), "another run", "OPTIM.LR")
    assert main(command("few-shot", tmp_path)) == 0
    assert results.load(folder / "results.json").metrics == before.metrics
    assert any("will resume training" in log.read_text() for log in folder.glob("log.txt*"))


def test_experts_keep_their_templates_on_another_data_set(tmp_path, capsys):
    made.make_sweep(tmp_path, tmp_path / "unused")
    target = str(tmp_path / "paints.yaml")
    flags = ["--root", str(tmp_path / "data"), "--targets", target]
    assert main(command("cross-dataset", tmp_path / "out", *flags, trainers=["MoCoOp", "ZeroshotCLIP"])) == 0
    folder = tmp_path / "out" / "cross-dataset" / CONCEPTS
    source = results.load(folder / "MoCoOp" / "shots1" / "seed1" / "source" / "results.json")
    tested = results.load(folder / "MoCoOp" / "shots1" / "seed1" / "to-paints" / "results.json")
    assert tested.config["DATASET"]["TEMPLATE_GROUPS"] == source.vocabulary["template_groups"]
    assert (tested.dataset, tested.title, tested.config["DATASET"]["SOURCE_DOMAINS"]) == ("ImageFolder", "paints", [])
    plain = results.load(folder / "ZeroshotCLIP" / "shots1" / "seed1" / "to-paints" / "results.json")
    assert plain.config["DATASET"]["TEMPLATE_GROUPS"] == []


def test_gmop_ranks_by_its_detectors_and_open_is_for_evaluation_alone(tmp_path, capsys):
    assert main(command("open-world", tmp_path / "out", trainers=["GMoP"])) == 0
    folder = tmp_path / "out" / "open-world" / CONCEPTS / "GMoP" / "shots1" / "seed1"
    of = {name: results.load(folder / name / "results.json").metrics["test"] for name in ("base", "new", "open")}
    assert of["open"]["base_accuracy"] == of["base"]["accuracy"] and of["open"]["new_accuracy"] == of["new"]["accuracy"]
    assert 0 <= of["open"]["openworld_auc"] <= of["open"]["auroc"] <= 100
    train = ["train", "--trainer", "CoOp", "--config-file", "configs/quickstart.yaml", "--output-dir", str(tmp_path / "one")]
    fails(capsys, [*train, *SMALL, "DATASET.SUBSAMPLE_CLASSES", "open"], "'open'", "promptmix run open-world")
    fails(capsys, [*train, *SMALL, "TEST.EVALUATOR", "OpenWorld"], "'OpenWorld'", "'base'", "set it to open")
    assert not (tmp_path / "one").exists()


def test_several_shots_make_a_curve(tmp_path, capsys):
    words = command("few-shot", tmp_path, trainers=["ZeroshotCLIP"])
    words[words.index("--shots") + 1 : words.index("--shots") + 2] = ["1", "2"]
    assert main(words) == 0
    capsys.readouterr()
    assert main(["parse", str(tmp_path), "--format", "json", "--plot", str(tmp_path / "plots")]) == 0
    output = capsys.readouterr()
    assert {line["shots"] for line in json.loads(output.out)} == {"1", "2"}
    assert (tmp_path / "plots" / "shots-all-classes-test.png").is_file() and "shots-all-classes-test.png" in output.err


@pytest.mark.parametrize(
    ("protocol", "flags", "words"),
    [
        ("few-shot", ["--targets", FAMILIES], ["--targets", "has no targets"]),
        ("cross-dataset", ["--targets", "EmojiFamily"], ["EmojiFamily", "did you mean 'EmojiFamilies'"]),
        ("cross-dataset", ["--targets", CONCEPTS], ["the source itself"]),
        ("cross-dataset", ["--targets", "fluent_3d"], ["fluent_3d", "no data set"]),
        ("domain-generalization", ["--targets", "fluent_4d"], ["fluent_4d", "did you mean 'fluent_3d'"]),
        ("base-to-new", ["--plugin", "missing.py"], ["missing.py"]),
        ("base-to-new", ["SEED", "4"], ["SEED", "--seeds"]),
        ("base-to-new", ["DATASET.SUBSAMPLE_CLASSES", "all"], ["DATASET.SUBSAMPLE_CLASSES", "the protocol"]),
        ("open-world", ["TEST.EVALUATOR", "Classification"], ["TEST.EVALUATOR", "the protocol"]),
        ("base-to-new", ["OPTIM.LR"], ["OPTIM.LR", "has no value"]),
        ("base-to-new", ["OPTIM.LRR", "1"], ["OPTIM.LRR", "did you mean 'LR'"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_mistakes_are_one_line_and_leave_nothing(protocol, flags, words, tmp_path, capsys):
    fails(capsys, command(protocol, tmp_path / "out", opts=flags), *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("trainer", "opts", "what"),
    [("CoOp", ["TRAINER.COOP.CSC", "True", "TRAINER.COOP.CTX_INIT", ""], "a context"), ("TaskRes", [], "a residual")],
)
def test_what_is_learned_for_each_class_is_refused_before_it_is_trained(trainer, opts, what, tmp_path, capsys):
    argv = command(
        "base-to-new", tmp_path / "runs", "--seeds", "1", trainers=[trainer], datasets=[FAMILIES], opts=[*SMALL, *opts]
    )
    fails(capsys, argv, f"which learns {what} for each class that it trains on", "few-shot")
    assert not list(tmp_path.rglob("*.pth.tar*"))


def test_other_data_sets_need_a_config_and_targets(tmp_path, capsys):
    fails(capsys, command("few-shot", tmp_path / "out", datasets=["EuroSAT"]), "--config-file")
    fails(capsys, command("few-shot", tmp_path / "out", datasets=["EuroSet"]), "did you mean 'EuroSAT'")
    flags = ["--config-file", "configs/trainers/{trainer}/vit_b16_ep50_ctxv1.yaml"]
    fails(capsys, command("cross-dataset", tmp_path / "out", *flags, datasets=["EuroSAT"]), "--targets", "ImageNet")


def test_defaults_of_imagenet_are_the_papers():
    names = [part.name for part in parts(job("cross-dataset", "ImageNet"))]
    assert len(names) == 11 and names[0] == "source" and "to-EuroSAT" in names
    variants = {part.dataset for part in parts(job("domain-generalization", "ImageNet"))}
    assert variants == {"ImageNet", "ImageNetV2", "ImageNetSketch", "ImageNetA", "ImageNetR"}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_part_is_checked_beforehand(protocol):
    check(job(protocol))
    with pytest.raises(Exception, match="INPUT.SIZES"):
        check(job(protocol, settings=("INPUT.SIZES", (1, 1))))
