"""Methods that learn from sentences, frozen features or teachers, against their authors' numbers: CoPrompt, HiCroPL."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
import torch
from promptmix.plugins.distillation.frozen_image import FrozenImageCosine
from promptmix.plugins.prompt_bank.hierarchical import Hierarchical
from promptmix.plugins.text_supervision.hard_prompts import CosineToHard
from promptmix.trainers.coprompt import AdaptedCoupled, SentenceConsistency, ViewConsistency
from promptmix.trainers.hicropl import HiCroPL, Rewriting

from promptmix.data.descriptions import Descriptions
from promptmix.engine.layout import rename
from promptmix.prompts.heads import Cosine
from promptmix.prompts.learner import Learner
from promptmix.prompts.losses import CrossEntropy
from tests.trainers.golden import FOLDER, close, compare, golden_clip, golden_task, images, labels, numbers, seeded, set_learned


def described_task(case: str):
    """The golden task with the sentences of a case."""
    note = json.loads((FOLDER / f"{case}.json").read_text())
    return replace(golden_task(golden_clip(**note["spec"])), descriptions=Descriptions(note["descriptions"], case))


COPROMPT = {
    "prompt_learner.ctx": "bank.text.ctx",
    **{f"prompt_learner.proj.{kind}": f"bank.couple.0.{kind}" for kind in ("weight", "bias")},
    **{f"prompt_learner.compound_prompts_text.{i}": f"bank.text.deeper.{i}" for i in (0, 1)},
    **{
        f"prompt_learner.compound_prompt_projections.{i}.{kind}": f"bank.couple.{i + 1}.{kind}"
        for i in (0, 1)
        for kind in ("weight", "bias")
    },
    **{
        f"adapter_{tower}.fc.{place}.weight": f"bank.adapter_{tower}.{name}.weight"
        for tower in ("image", "text")
        for place, name in ((0, "down"), (2, "up"))
    },
}


def coprompt(distance: str = "cosine") -> Learner:
    task = described_task("coprompt")
    bank = AdaptedCoupled(task, 0.1, 0.2, n_ctx=2, prompt_depth=3)
    loss = CrossEntropy() + 4.0 * (SentenceConsistency(task, distance) + ViewConsistency(distance))
    return Learner(task, bank, head=Cosine(task, bank), loss=loss)


def two_views():
    """The golden pictures and the second view of each."""
    return torch.stack([images(), torch.from_numpy(seeded().stream("images2", (3, 3, 64, 64)))])


def test_coprompt(monkeypatch):
    monkeypatch.setattr(random, "randint", lambda low, high: 1)
    learner = coprompt()
    expected = numbers("coprompt")
    terms = compare("coprompt", learner, COPROMPT, pictures=two_views())
    close(terms.parts["ce"], expected["ce"])
    close(terms.parts["text"], expected["distill_text"])
    close(terms.parts["image"], expected["distill_image"])
    with torch.no_grad():
        close(learner.losses["text"].sentences[..., :16], expected["descriptions"])
        close(learner.classifier()[0, :, :64], expected["text_features"])
        close(learner.step(images()).image[:, :64], expected["image_features"])
        close(learner.step(images()).logits, expected["logits_eval"])


def test_coprompt_draws_one_sentence_for_all_classes_and_mse_is_its_other_distance(monkeypatch):
    learner = coprompt("mse")
    seen = []
    monkeypatch.setattr(random, "randint", lambda low, high: seen.append((low, high)) or 0)
    with torch.no_grad():
        step = learner.step(two_views(), labels())
        terms = learner.loss(step)
        frozen = learner.clip.encode_image(two_views()[1])
    assert seen == [(0, 1)]
    sentences = learner.losses["text"].sentences[0]
    assert terms.parts["text"].item() == pytest.approx(((step.text[0] - sentences) ** 2).mean().item(), rel=1e-5)
    assert terms.parts["image"].item() == pytest.approx(((step.image - frozen) ** 2).mean().item(), rel=1e-5)


def hicropl_names() -> dict[str, str]:
    """The authors' names -> ours, by the table that checkpoints are read with."""
    names = json.loads((FOLDER / "hicropl.json").read_text())["learned"]
    return {name: rename(HiCroPL.layout.rules, name.removeprefix("prompt_learner."))[0] for name in names}


def hicropl(mapping: str) -> Learner:
    task = described_task("hicropl")
    bank = Hierarchical(task, n_ctx=4, ctx_init="a photo of a", prompt_depth=4, cross_layer=2, mapping=mapping)
    loss = CrossEntropy() + 12.0 * (CosineToHard(task, bank) + FrozenImageCosine(task, bank).named("image"))
    return (Rewriting if mapping == "written" else Learner)(task, bank, head=Cosine(task, bank), loss=loss)


def test_hicropl_with_mappers_that_learn():
    learner = hicropl("learned")
    terms = compare("hicropl_flow", learner, hicropl_names(), values="hicropl")
    expected = numbers("hicropl_flow")
    close(terms.parts["ce"], expected["ce"])
    close((terms.parts["text"] + terms.parts["image"]), expected["distill"])
    with torch.no_grad():
        before = {name: value.clone() for name, value in learner.state_dict().items()}
        close(learner.bank.references(learner.task.classnames)[0, :, :64], expected["fixed_text"])
        close(learner.logits(learner.features(images()), learner.classifier()), expected["logits_eval"])
    assert all(torch.equal(value, before[name]) for name, value in learner.state_dict().items())


def test_hicropl_as_published_overwrites_its_prompts_in_each_pass():
    learner = hicropl("written")
    expected = numbers("hicropl")
    names = hicropl_names()
    parameters = set_learned("hicropl", learner, names)
    terms = learner.loss(learner.step(images(), labels()))
    close(terms.logits, expected["logits"])
    close(terms.total, expected["loss"])
    close(terms.parts["ce"], expected["ce"])
    terms.total.backward()
    gradients = {name: parameter.grad for name, parameter in parameters.items()}
    assert {name for name, gradient in gradients.items() if gradient is not None} == {
        key.removeprefix("gradnorm:") for key in expected if key.startswith("gradnorm:")
    }
    for name, gradient in gradients.items():
        if gradient is not None:
            norm = expected[f"gradnorm:{name}"]
            close(gradient.double().norm(), norm)
            close(gradient.flatten()[:256], expected[f"gradhead:{name}"], scale=float(norm))
    for key in (key for key in expected if key.startswith("mapped:")):
        close(parameters[key.removeprefix("mapped:")][:, :96], expected[key])
    with torch.no_grad():
        close(learner.logits(learner.features(images()), learner.classifier()), expected["logits_second_forward"])
