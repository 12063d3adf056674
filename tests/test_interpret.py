"""``promptmix interpret``: words against what was planted, ways of choosing experts against scores by hand, and the command."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from promptmix.cli import main
from promptmix.interpret import mixture as m
from promptmix.interpret.look import look
from promptmix.interpret.mixture import look_into, mixtures_of
from promptmix.interpret.opened import open_run
from promptmix.interpret.words import nearest_words
from promptmix.runs import results, samples

SMALL = ["OPTIM.MAX_EPOCH", "1", "OPTIM.WARMUP_EPOCH", "-1", "DATASET.NUM_SHOTS", "1", "DATASET.SUBSAMPLE_CLASSES", "base"]
SMALL += ["DATASET.NAME", "EmojiConcepts", "DATASET.EMOJI.NUM_CONCEPTS", "8"]
RUNS = {
    "MoCoOp": (),
    "CoOp": ("TRAINER.COOP.CLASS_TOKEN_POSITION", "middle"),
    "CoOpATP": (),
    "IVLP": (),
    "MaPLeATP": (),
    "MoPD": (),
    "TRIP": (),
    "PLOT": (),
    "CoCoOp": (),
    "TCP": (),
    "ZeroshotCLIP": (),
    "Mixture": (),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return a function that trains a method for one epoch, once."""
    folder, made = tmp_path_factory.mktemp("runs"), {}

    def run(name):
        if name not in made:
            config = f"configs/trainers/{name}/{'deep_experts' if name == 'Mixture' else 'tiny'}.yaml"
            flags = ["train", "--trainer", name, "--config-file", config, "--seed", "1", "--output-dir", str(folder / name)]
            assert main([*flags, *SMALL, *RUNS[name]]) == 0
            made[name] = open_run(folder / name)
        return made[name]

    return run


def learner_of(opened):
    return opened.trainer.model


def test_planted_words_are_found_in_every_layer(runs):
    opened = runs("IVLP")
    bank, task = learner_of(opened).bank, learner_of(opened).task
    tower = task.clip.text
    ids = [tower.tokenizer.encode(word)[0] for word in ("cat", "house")]
    with torch.no_grad():
        bank.text.ctx[:2] = tower.embed(ids) + 0.01
        x = torch.cat([tower.embed([*tower.tokenizer.before, ids[1]])])[None] + tower.positional_embedding[:2]
        x = tower.blocks[0](x, attn_mask=tower.attn_mask[:2, :2])
        bank.text.deeper[0][0] = x[0, 1]
    found = {(one.layer, one.place): one for one in nearest_words(bank, task) if one.place > 0}
    assert [found[0, place].words[0][0] for place in (1, 2)] == ["cat", "house"]
    assert found[0, 1].words[0][1] == pytest.approx(0.01 * tower.width**0.5, rel=1e-3)
    assert found[1, 1].words[0] == ("house", pytest.approx(0, abs=1e-3))
    layers = {one.layer for one in found.values()}
    assert layers == set(range(len(bank.text.layers))) and all(one.usual > 0 for one in found.values())
    assert all(one.words == sorted(one.words, key=lambda pair: pair[1]) for one in found.values())
    assert not any(parameter.grad is not None for parameter in bank.parameters())


def test_a_context_in_the_middle_is_told_by_its_place(runs):
    opened = runs("CoOp")
    learner = learner_of(opened)
    found = nearest_words(learner.bank, learner.task)
    length = learner.bank.ctx.shape[1]
    assert sorted(one.place for one in found if one.place > 0) == list(range(1, length // 2 + 1))
    assert len([one for one in found if one.place < 0]) == length - length // 2


def test_a_class_specific_context_is_told_by_class(tmp_path):
    flags = ["train", "--trainer", "CoOp", "--config-file", "configs/trainers/CoOp/tiny.yaml", "--output-dir", str(tmp_path)]
    assert main([*flags, *SMALL, "TRAINER.COOP.CSC", "True", "TRAINER.COOP.CTX_INIT", "", "TRAINER.COOP.N_CTX", "2"]) == 0
    learner = learner_of(open_run(tmp_path))
    found = nearest_words(learner.bank, learner.task)
    assert len(found) == 2 * len(learner.task.classnames) and {one.classname for one in found} == set(learner.task.classnames)


@pytest.mark.parametrize("name", ["CoOpATP", "MaPLeATP", "CoCoOp", "TCP", "MoCoOp"])
def test_other_banks_have_words_too(runs, name):
    learner = learner_of(runs(name))
    found = nearest_words(learner.bank, learner.task, 1)
    assert found and {one.expert for one in found} == set(range(learner.bank.num_experts))
    assert all(np.isfinite(one.words[0][1]) for one in found)


@pytest.mark.parametrize("name", ["MoCoOp", "Mixture", "TRIP"])
def test_ways_of_choosing_experts(runs, name):
    opened = runs(name)
    learner = learner_of(opened)
    (mixed,) = mixtures_of(learner)
    count = len(mixed.names)
    found = look_into(opened, mixed)
    ways = {way.name: way for way in found.ways}
    kept = samples.of_run(results.load(opened.folder / "results.json"))
    assert ways[m.TRAINED].accuracy == pytest.approx(opened.result.metrics["test"]["accuracy"])
    assert found.pictures == len(kept) and sum(found.weight) == pytest.approx(1, abs=1e-5)
    dense = np.zeros((len(kept), count))
    np.put_along_axis(dense, kept.expert.astype(int), kept.expert_weight, 1)
    assert np.allclose(found.weight, dense.mean(0), atol=1e-5)
    assert np.allclose(found.by_class[0], dense[kept.label == 0].mean(0), atol=1e-5)
    chosen = [(kept.expert == e).any(1).mean() for e in range(count)]
    assert np.allclose(found.share, chosen, atol=1e-6)
    hits = []
    for features, labels, classifier in opened.batches():
        one_hot = F.one_hot(torch.full((len(labels),), 1), count).float()
        said = learner.weighed(features, classifier, one_hot).argmax(1)
        if name == "MoCoOp":
            by_hand = (features @ learner.bank(learner.task.classnames)[1].T).argmax(1)
            assert (said == by_hand).all()
        hits.append((said == labels).float())
    assert ways[f"expert {mixed.names[1]} alone"].accuracy == pytest.approx(100 * float(torch.cat(hits).mean()))
    best = max(way.accuracy for way in found.ways if way.name.endswith("alone"))
    assert ways[m.BEST].accuracy >= best and ways[m.SHUFFLED].spread is not None
    assert np.allclose(np.diag(found.agreement), 1) and 0 < found.entropy <= 1 + 1e-6
    one = ways[m.OFF]
    gap = (one.only_this - one.only_trained) * 100 / found.pictures
    assert one.accuracy - ways[m.TRAINED].accuracy == pytest.approx(gap, abs=1e-6)


def test_a_router_that_matters_is_told_from_one_that_does_not(runs):
    """Experts that know one half of the classes each: routing is everything, and shuffling it breaks the mixture."""
    opened = runs("MoCoOp")

    class Toy:
        folder, result, lacks = opened.folder, opened.result, ""

        def batches(self):
            for start in range(0, 60, 20):
                labels = torch.arange(start, start + 20) % 2
                yield F.one_hot(labels, 2).float(), labels, None

    def weighed(features, classifier, weights):
        return weights  # expert a says the first class of every picture, expert b the second

    def routing(features, classifier):
        return m.Routing.top_k(10 * features, 1)

    found = look_into(Toy(), m.Mixed("toy", ("a", "b"), weighed, routing))
    ways = {way.name: way.accuracy for way in found.ways}
    assert ways[m.TRAINED] == 100 and ways["expert a alone"] == ways["expert b alone"] == 50
    assert 30 < ways[m.SHUFFLED] < 70 and ways[m.BEST] == 100
    assert found.agreement == [[1, 0], [0, 1]] and found.by_class[:2] == [[1, 0], [0, 1]]


def test_the_teachers_of_mopd_are_looked_at(runs):
    found = look(runs("MoPD"))
    (gate,) = found.mixtures
    assert "teachers" in gate.title and gate.routed and len(gate.experts) == len(gate.ways) - 6
    assert "{}" in gate.experts[0]


def test_what_has_no_experts_says_so(runs):
    for name in ("PLOT", "CoOp", "ZeroshotCLIP"):
        found = look(runs(name))
        assert found.mixtures == [] and any("weighs no experts" in note for note in found.notes)
    assert any("learned no tensor" in note for note in found.notes)
    assert all(one.degrees < 0.1 for one in found.moved)  # hard prompts are where they were


def test_the_command_prints_and_draws(runs, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folder = str(runs("MoCoOp").folder)
    flags = ["--pictures", str(tmp_path / "pics"), "--picture-format", "svg", "png", "pdf"]
    capsys.readouterr()
    assert main(["interpret", folder, *flags, "--format", "json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree["trainer"] == "MoCoOp" and len(tree["mixtures"][0]["by_class"]) == 4 and len(tree["moved"]) == 4
    names = {path.name for path in (tmp_path / "pics").iterdir()}
    assert names == {f"{name}.{end}" for name in ("routing", "experts", "moved") for end in ("svg", "png", "pdf")}
    assert (tmp_path / "pics" / "routing.svg").read_text().count("<svg") == 1
    assert main(["interpret", folder, folder]) == 0
    out = capsys.readouterr().out
    assert "Nearest words" in out and "2 runs" in out and "shuffled" in out


def test_bad_calls_end_in_one_line(runs, tmp_path, capsys):
    folder = str(runs("MoCoOp").folder)
    for flags, words in {
        (str(tmp_path),): "name the output folder of a run",
        (folder, "--words", "0"): "--words is 0",
        (folder, "--format", "htlm"): "did you mean 'html'",
        (folder, "--load-epoch", "9"): "no checkpoint",
        (folder, "--root", "nowhere"): "--root nowhere: no such folder",
    }.items():
        capsys.readouterr()
        assert main(["interpret", *flags]) == 2
        err = capsys.readouterr().err.strip()
        assert words in err and "Traceback" not in err


def test_without_its_pictures_a_run_still_tells_words(tmp_path, capsys):
    from PIL import Image

    for part in ("train", "test"):
        for name, colour in {"cat": "red", "dog": "blue"}.items():
            (tmp_path / "data" / part / name).mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (32, 32), colour).save(tmp_path / "data" / part / name / f"{i}.png")
    flags = ["train", "--trainer", "MoCoOp", "--config-file", "configs/quickstart.yaml", "--root", str(tmp_path / "data")]
    more = ["DATASET.NAME", "ImageFolder", "OPTIM.MAX_EPOCH", "1", "DATASET.SOURCE_DOMAINS", "()"]
    assert main([*flags, "--output-dir", str(tmp_path / "out"), *more]) == 0
    capsys.readouterr()
    assert main(["interpret", str(tmp_path / "out"), "--format", "json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree["words"] and tree["moved"] and not tree["mixtures"] and any("--root" in note for note in tree["notes"])
    assert main(["interpret", str(tmp_path / "out"), "--format", "json", "--root", str(tmp_path / "data")]) == 0
    assert json.loads(capsys.readouterr().out)["mixtures"][0]["pictures"] == 4
