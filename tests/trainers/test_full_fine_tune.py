"""FullFineTune is what training the tower's own tensors would be: gradients, steps, scores; and both heads."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from promptmix.plugins.heads.linear import LinearHead
from promptmix.plugins.prompt_bank.tuned_towers import TunedTowers

from promptmix.errors import ConfigError
from promptmix.prompts.heads import Cosine
from promptmix.prompts.learner import Learner
from promptmix.runs.execute import execute
from promptmix.runs.protocols import Job
from tests.trainers.golden import golden_clip, golden_task, images, labels
from tests.trainers.toy import first_step, scores, toy_trainer


@pytest.mark.parametrize("head", ["linear", "text"])
def test_steps_are_those_of_a_tower_that_is_trained_itself(head):
    """Two steps of AdamW with much decay: losses, gradients and weights of an unfrozen copy of the tower."""
    task = golden_task(golden_clip())
    bank = TunedTowers(task, "all", "vision")
    ours = Learner(task, bank, head=LinearHead(task, bank) if head == "linear" else Cosine(task, bank))
    other = copy.deepcopy(golden_clip())  # trained in place
    text = other.hard_features([bank.template], task.classnames)[0]
    tower, weight = other.image.requires_grad_(True), torch.nn.Parameter(text.clone())
    theirs = dict(tower.named_parameters())
    learned = {name.replace("/", "."): value for name, value in bank.values["image"].items()}
    assert set(learned) == set(theirs)
    more = [weight] if head == "linear" else []
    optimizers = [torch.optim.AdamW(p, lr=1e-3, weight_decay=0.5) for p in (list(ours.parameters()), [*theirs.values(), *more])]
    for _ in range(2):
        for optimizer in optimizers:
            optimizer.zero_grad()
        terms = ours.loss(ours.step(images(), labels()))
        logits = other.scale * F.normalize(tower(images()), dim=-1) @ (weight if more else text).T
        expected = F.cross_entropy(logits, labels())
        torch.testing.assert_close(terms.logits, logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(terms.total, expected, rtol=1e-4, atol=1e-4)
        terms.total.backward()
        expected.backward()
        for name, value in theirs.items():
            assert (learned[name].grad - value.grad).norm() <= 1e-4 * value.grad.norm() + 1e-7, name
        for optimizer in optimizers:
            optimizer.step()
    moved = sum((learned[name] - value).square().sum() for name, value in theirs.items()).sqrt()
    length = sum((value - held).square().sum() for value, held in zip(theirs.values(), task.clip.image.parameters(), strict=True))
    assert moved <= 1e-2 * length.sqrt()  # Adam's first steps are signs, which rounding turns where gradients are near zero
    assert all(p.grad is None and not p.requires_grad for p in task.clip.parameters())


def test_starts_as_the_zero_shot_model_whatever_the_head(room):
    zero = scores(toy_trainer(room, "ZeroshotCLIP"))
    for head in ("linear", "text"):
        torch.testing.assert_close(scores(toy_trainer(room, "FullFineTune", "TRAINER.FULLFINETUNE.HEAD", head)), zero)
    random = toy_trainer(room, "FullFineTune", "TRAINER.FULLFINETUNE.START", "random")
    assert not torch.allclose(scores(random), zero, atol=0.1)


def test_text_of_an_unchanged_tower_is_encoded_once(room, monkeypatch):
    subject = toy_trainer(room, "FullFineTune", "TRAINER.FULLFINETUNE.HEAD", "text")
    first_step(subject)
    monkeypatch.setattr(subject.clip.text, "forward", None)
    assert first_step(subject)["loss"].isfinite()


def test_later_blocks_alone(room):
    subject = toy_trainer(room, "FullFineTune", "TRAINER.FULLFINETUNE.VISION_START", 10)
    names = [name.replace("/", ".") for name in subject.model.bank.values["image"]]
    inside = {name.split("resblocks.")[1].split(".")[0] for name in names if "resblocks" in name}
    assert inside == {"10", "11"}
    assert {name for name in names if "resblocks" not in name} == {"visual.ln_post.weight", "visual.ln_post.bias", "visual.proj"}
    first_step(subject)
    assert all(p.grad.any() for p in subject.model.parameters())


def test_a_head_of_text_serves_new_classes_and_a_linear_one_is_refused(room, tmp_path):
    file = "configs/trainers/FullFineTune/tiny.yaml"

    def job(folder, *more):
        settings = ("OPTIM.MAX_EPOCH", 1, *more)
        return Job(
            "base-to-new", "FullFineTune", "EmojiFamilies", str(tmp_path / folder), 1, 1, config_file=file, settings=settings
        )

    found = execute(job("text"))
    assert len(found) == 2 and all(0 <= result.metrics["test"]["accuracy"] <= 100 for result in found)
    with pytest.raises(ConfigError, match="which learns weights for each class"):
        execute(job("linear", "TRAINER.FULLFINETUNE.HEAD", "linear"))


def test_features_that_change_are_not_kept_and_idle_settings_refused(room):
    with pytest.raises(ConfigError, match=r"INPUT.CACHED_VIEWS is 2, but FullFineTune trains the image side"):
        toy_trainer(room, "FullFineTune", "INPUT.CACHED_VIEWS", 2).train()
    with pytest.raises(ConfigError, match=r"START \(set by .*\) would be ignored, since HEAD is text"):
        toy_trainer(room, "FullFineTune", "TRAINER.FULLFINETUNE.HEAD", "text", "TRAINER.FULLFINETUNE.START", "zeroshot")
