"""2SFS: the authors' numbers in both stages, what each kind of first stage trains, and trainings that cross the border."""

from __future__ import annotations

import copy
import json
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from promptmix.plugins.prompt_bank.tuned_towers import TunedTowers
from promptmix.trainers.twosfs import ClassifierOf, digest

from promptmix.cost.estimate import step_gflops
from promptmix.errors import ConfigError
from promptmix.prompts.heads import Cosine
from promptmix.prompts.learner import Learner
from promptmix.prompts.stages import Stage, Stages
from tests.trainers.golden import FOLDER, close, golden_clip, golden_task, images, labels, numbers, seeded
from tests.trainers.toy import scores, three_layers, toy_trainer

CASE = "twostage"
SHAPES = json.loads((FOLDER / f"{CASE}.json").read_text())["learned"]
ADAMW = ("OPTIM.NAME", "adamw", "OPTIM.WARMUP_EPOCH", -1)


@lru_cache(maxsize=1)
def frozen():
    return golden_clip()


def two_stages(classes=5, **settings):
    task = golden_task(frozen(), classes=classes)
    bank = ClassifierOf(task, TunedTowers(task, **settings))
    return Learner(task, bank, head=Cosine(task, bank))


def by_their_names(learner):
    """The learned tensors of the towers by the authors' names."""
    values = learner.bank.first.values
    return {name.replace("/", "."): value for tower in values.values() for name, value in tower.items()}


def set_towers(learner):
    with torch.no_grad():
        for name, value in by_their_names(learner).items():
            value.add_(torch.from_numpy(seeded().learned(CASE, name, tuple(value.shape))))


def check(expected, name, gradient):
    norm = float(expected[f"gradnorm:{name}"])
    close(gradient.norm(), expected[f"gradnorm:{name}"])
    close(gradient.sum(), expected[f"gradsum:{name}"], scale=norm)
    head = expected[f"gradhead:{name}"]
    close(gradient.flatten()[: len(head)], head, scale=norm)


def test_first_stage():
    learner, expected = two_stages(), numbers(CASE)
    assert set(by_their_names(learner)) | {"classifier"} == set(SHAPES)
    set_towers(learner)
    terms = learner.train().loss(learner.step(images(), labels()))
    close(terms.logits, expected["logits_stage1"])
    close(terms.total, expected["loss_stage1"])
    terms.total.backward()
    for name, value in by_their_names(learner).items():
        check(expected, name, value.grad)
    assert learner.bank.classifier.grad is None


def test_second_stage_and_selective_inference():
    learner, expected = two_stages(classes=4), numbers(CASE)
    set_towers(learner)
    bank = learner.train().bank
    stages = Stages([Stage(bank.first, 0.5), Stage([bank.classifier], begin=bank.start)], 2)
    stages.turn_to(1)
    with torch.no_grad():
        # The recorded "classifier_start_head" is the value that the case sets afterwards, so the start is held to its definition.
        close(bank.classifier, bank.first(learner.task.classnames)[0].numpy())
        bank.classifier.copy_(torch.from_numpy(seeded().learned(CASE, "classifier", (4, 512))))
    bank.begun = True
    terms = learner.loss(learner.step(images(), labels(4)))
    close(terms.logits, expected["logits_stage2"])
    close(terms.total, expected["loss_stage2"])
    terms.total.backward()
    check(expected, "classifier", bank.classifier.grad)
    assert all(value.grad is None for value in by_their_names(learner).values())
    everything = two_stages()
    everything.load_state_dict(everything.fit_state(learner.state_dict()))
    everything.eval()
    with torch.no_grad():
        logits = everything.logits(everything.features(images()), everything.classifier())
    close(logits, expected["logits"])
    close(F.cross_entropy(logits, labels()), expected["loss"])


def test_rows_go_by_names_whatever_their_order():
    task = golden_task(frozen())
    bank = ClassifierOf(task, TunedTowers(task))
    with torch.no_grad():
        bank.start()
        bank.classifier.normal_(generator=torch.Generator().manual_seed(0))
        bank.eval()
        found = bank(["fox", "pine tree", "dog"])[0]
        assert torch.equal(found[2], F.normalize(bank.classifier[0], dim=-1))
        assert torch.equal(found[1], F.normalize(bank.classifier[4], dim=-1))  # pine_tree
        torch.testing.assert_close(found[0], bank.first(["fox"])[0, 0])
    assert digest("pine_tree") == digest("pine tree") != digest("pine")


def test_kinds_of_first_stage_train_what_the_authors_list():
    names = {}
    for kind in ("norms", "biases", "all"):
        names[kind] = set(by_their_names(two_stages(tensors=kind)))
    ends = {name.rpartition("resblocks.")[2].partition(".")[2] for name in names["biases"] if "resblocks" in name}
    assert ends == {"ln_1.bias", "ln_2.bias", "attn.out_proj.bias", "mlp.c_fc.bias", "mlp.c_proj.bias"}
    around = {name for name in names["biases"] if "resblocks" not in name}
    assert around == {"visual.ln_pre.bias", "visual.ln_post.bias", "ln_final.bias"}
    frozen_names = set(frozen().image.state_dict()) | set(frozen().text.state_dict())
    assert names["all"] == {name for name in frozen_names if not name.startswith(("token_embedding", "attn_mask"))}
    late = by_their_names(two_stages(tensors="biases", vision_start=2, text_start=3 - 1))
    assert "visual.ln_pre.bias" not in late and {"visual.ln_post.bias", "ln_final.bias"} <= set(late)
    assert {name.split("resblocks.")[1][0] for name in late if "resblocks" in name} == {"2"}
    assert all(name.startswith("visual") for name in by_their_names(two_stages(encoder="vision")))
    text_only = two_stages(encoder="text")
    assert text_only.image_is_frozen and not any(name.startswith("visual") for name in by_their_names(text_only))
    with pytest.raises(ConfigError, match="vision_start is 3, but the tower of golden has 3 blocks"):
        two_stages(vision_start=3)


@pytest.mark.parametrize("kind", ["biases", "all"])
def test_tuned_values_are_those_of_a_tower_with_these_weights(kind):
    """The changed tower is the one whose own tensors have the learned values."""
    task = golden_task(copy.deepcopy(golden_clip()))  # changed in place
    bank = TunedTowers(task, kind)
    learner = Learner(task, bank, head=Cosine(task, bank))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in bank.values.parameters():
            value.add_(0.01 * torch.randn(value.shape, generator=generator))
        ours = learner.logits(learner.features(images()), learner.classifier())
        for tower in ("text", "image"):
            held = dict(getattr(task.clip, tower).named_parameters())
            for name, value in bank.values[tower].items():
                held[name.replace("/", ".")].copy_(value)
        plain = task.clip.encode_image(images()) @ task.clip.hard_features([bank.template], task.classnames)[0].T
    torch.testing.assert_close(ours, task.clip.scale * plain, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("peft", ["ln", "lora", "bitfit"])
def test_training_crosses_the_border_inside_an_epoch_and_resumes_to_the_bit(room, peft, tmp_path):
    """9 steps, the first 4 for the towers, so that the classifier begins with the second batch of the second epoch."""
    opts = [*ADAMW, "TRAINER.TWOSFS.PEFT", peft, "OPTIM.MAX_EPOCH", 3, "TRAINER.TWOSFS.FIRST_STAGE", 0.45]

    def build(folder):
        return toy_trainer(room, "TwoSFS", *opts, *three_layers(room), "OUTPUT_DIR", str(tmp_path / folder))

    whole = build("whole")
    assert whole.stages.bounds == (0, 4, 9)
    rates, towers, rows = [], [], []
    learn = whole.forward_backward

    def watched(batch):
        rates.append(whole.get_current_lr())
        out = learn(batch)
        towers.append([p.detach().clone() for p in whole.model.bank.first.parameters()])
        rows.append(whole.model.bank.classifier.detach().clone())
        return out

    whole.forward_backward = watched
    whole.train()
    assert not rows[3].any() and rows[4].any() and not torch.equal(rows[4], rows[8])
    assert any(not torch.equal(a, b) for a, b in zip(towers[2], towers[3], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(towers[3], towers[8], strict=True))
    assert rates[4] == rates[0] == pytest.approx(0.002) and rates[3] < rates[1] and rates[8] < rates[5]
    for stop in (1, 2):
        cut = build(f"cut{stop}")
        cut.after_epoch = lambda cut=cut, stop=stop, after=cut.after_epoch: after() if cut.epoch < stop else _stop()
        with pytest.raises(KeyboardInterrupt):
            cut.train()
        again = build(f"cut{stop}")
        again.train()
        assert again.start_epoch == stop
        for key, value in whole.model.state_dict().items():
            assert torch.equal(again.model.state_dict()[key], value), key
        assert torch.equal(scores(again), scores(whole))


def _stop():
    raise KeyboardInterrupt


def test_new_classes_take_the_tuned_text_tower(room, tmp_path):
    opts = [*ADAMW, "OPTIM.MAX_EPOCH", 2, "OUTPUT_DIR", str(tmp_path)]
    base = toy_trainer(room, "TwoSFS", *opts)
    base.train()
    every = toy_trainer(room, "TwoSFS", *opts, classes="all")
    every.load_model(str(tmp_path), epoch=2)
    with torch.no_grad():
        known, both = base.model.eval().classifier(), every.model.eval().classifier()
        rows = [every.model.task.classnames.index(name) for name in base.model.task.classnames]
        assert torch.equal(both[:, rows], known)
        others = [name for name in every.model.task.classnames if name not in base.model.task.classnames]
        text = base.model.bank.first(others)
        torch.testing.assert_close(both[:, [every.model.task.classnames.index(name) for name in others]], text)


def test_settings_of_another_first_stage_are_refused(room):
    with pytest.raises(ConfigError, match=r"TRAINER.TWOSFS.R .* is for PEFT lora and PEFT is ln"):
        toy_trainer(room, "TwoSFS", "TRAINER.TWOSFS.R", 4)
    with pytest.raises(ConfigError, match=r"VISION_START .* is for PEFT ln and bitfit and PEFT is lora"):
        toy_trainer(room, "TwoSFS", "TRAINER.TWOSFS.PEFT", "lora", "TRAINER.TWOSFS.VISION_START", 1)


def test_a_step_counts_as_one_of_the_last_stage(room):
    behind, before = (toy_trainer(room, "TwoSFS", *ADAMW) for _ in range(2))
    behind.stages.turn_to(behind.stages.bounds[-1])
    counts = {step_gflops(before), step_gflops(behind)}
    assert len(counts) == 1 and None not in counts
