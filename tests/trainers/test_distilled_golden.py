"""Methods that learn from sentences, frozen features or teachers, against their authors' numbers: CoPrompt, HiCroPL, PromptKD."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
import torch
from promptmix.plugins.distillation.frozen_image import FrozenImageCosine
from promptmix.plugins.prompt_bank.hierarchical import Hierarchical
from promptmix.plugins.prompt_bank.independent_deep import IndependentDeep
from promptmix.plugins.prompt_bank.student import Student
from promptmix.plugins.text_supervision.hard_prompts import CosineToHard
from promptmix.trainers.coprompt import AdaptedCoupled, SentenceConsistency, ViewConsistency
from promptmix.trainers.hicropl import HiCroPL, Rewriting
from promptmix.trainers.promptkd import PromptKD, TeacherKL

from promptmix.data.descriptions import Descriptions
from promptmix.engine.layout import INDEPENDENT, rename
from promptmix.prompts.heads import Cosine
from promptmix.prompts.learner import Learner
from promptmix.prompts.losses import CrossEntropy
from promptmix.prompts.teachers import Teacher
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


class GoldenTeacher(Teacher):
    """PromptKD's teacher: IVLP's prompts on a larger CLIP."""

    def __init__(self):
        note = json.loads((FOLDER / "promptkd.json").read_text())
        clip = golden_clip(**note["teacher_spec"])
        task = golden_task(clip)
        self.bank = IndependentDeep(task, n_ctx_vision=4, n_ctx_text=4, prompt_depth_vision=3, prompt_depth_text=3)
        self.learner = Learner(task, self.bank, head=Cosine(task, self.bank))
        tensors = dict(self.learner.named_parameters())
        with torch.no_grad():
            for theirs, shape in note["frozen"].items():
                name = theirs.removeprefix("teacher.").removeprefix("prompt_learner.")
                value = seeded().learned("promptkd", theirs, tuple(shape))
                tensors[rename(INDEPENDENT, name)[0]].copy_(torch.from_numpy(value))
        self.name, self.width, self.scale = "golden", clip.embed_dim, clip.scale.item()

    def vectors(self, names):
        with torch.no_grad():
            return self.bank(names)[0]

    def image(self, images):
        with torch.no_grad():
            return self.learner.step(images).image


def test_promptkd():
    task = golden_task()
    teacher = GoldenTeacher()
    bank = Student(task, teacher, None, 4, 3, True)
    learner = Learner(task, bank, head=Cosine(task, bank), loss=1000.0 * TeacherKL(bank, 1.0))
    shapes = json.loads((FOLDER / "promptkd.json").read_text())["learned"]
    names = {name: rename(PromptKD.layout.rules, name)[0] for name in shapes}
    set_learned("promptkd", learner, names, starts=("VPT_image_trans.conv1.1.weight",))
    expected = numbers("promptkd")
    learner.train()
    terms = learner.loss(learner.step(images()))
    close(terms.logits, expected["logits"])
    close(terms.total, expected["loss"])
    close(teacher.scale * teacher.image(images()) @ bank.class_vectors(task.classnames).T, expected["teacher_logits"])
    close(bank.class_vectors(task.classnames)[:, :64], expected["teacher_text_head"])
    terms.total.backward()
    ours = dict(learner.named_parameters())
    for theirs in names:
        if f"gradnorm:{theirs}" in expected:  # the bias in front of the batch norm has none
            gradient, norm = ours[names[theirs]].grad, float(expected[f"gradnorm:{theirs}"])
            # Batch norm over three pictures amplifies rounding.
            assert gradient.double().norm().item() == pytest.approx(norm, rel=5e-4)
            head = expected[f"gradhead:{theirs}"]
            assert abs(gradient.flatten()[: len(head)].double().numpy() - head).max() <= 5e-4 * norm
    norm = bank.projector.conv1[1]
    close(norm.running_mean[:64], expected["bn_running_mean_head"])
    close(norm.running_var[:64], expected["bn_running_var_head"])
    with torch.no_grad():
        close(learner.eval().step(images()).logits, expected["logits_eval"])
