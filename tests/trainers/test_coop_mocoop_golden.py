"""CoOp and MoCoOp against the numbers of their authors' code."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from promptmix.plugins.prompt_bank.soft import Soft
from promptmix.plugins.prompt_bank.template_groups import TemplateGroups
from promptmix.plugins.router.topk import HardPromptTopK
from promptmix.plugins.text_supervision.grouped import GroupedContrastive

from promptmix.prompts.learner import Learner
from promptmix.prompts.losses import CrossEntropy, RouterLoss
from tests.trainers.golden import close, compare, golden_clip, golden_task, images, labels, numbers, set_learned

TEMPLATES = (
    "a photo of a {}, a type of animal.",
    "a photo of a {}.",
    "a photo of many {}.",
    "a good photo of the {}.",
    "a low resolution photo of a {}.",
)


def coop(case: str, clip=None) -> Learner:
    _, position, *csc = case.split("_")
    task = golden_task(clip)
    return Learner(task, Soft(task, n_ctx=4, csc=bool(csc), class_token_position=position))


def mocoop(classes: int, clip=None, chosen_only: bool = False) -> Learner:
    task = replace(golden_task(clip, classes), template_groups=(TEMPLATES[:1], TEMPLATES[1:3], TEMPLATES[3:]))
    bank = TemplateGroups(task)
    router = HardPromptTopK(task, bank)
    text = GroupedContrastive(task, bank, chosen_only)
    return Learner(task, bank, router, loss=CrossEntropy() + RouterLoss(router) + 5.0 * text)


MOCOOP_NAMES = {
    **{f"prompt_learner.ctx_{side}_{i}": f"bank.{side}.{i}" for side in ("before", "after") for i in range(3)},
    "prompt_learner.w": "bank.correction",
    "prompt_learner.gate.weight": "router.gate.weight",
    "prompt_learner.gate.bias": "router.gate.bias",
}


@pytest.mark.parametrize("case", ["coop_end", "coop_middle", "coop_front", "coop_end_csc"])
def test_coop(case):
    compare(case, coop(case), {"prompt_learner.ctx": "bank.ctx"})


@pytest.mark.parametrize(("case", "classes"), [("mocoop", 5), ("mocoop_base", 3)])
def test_mocoop(case, classes):
    learner = mocoop(classes)
    terms = compare(case, learner, MOCOOP_NAMES, classes)
    expected = numbers(case)
    close(terms.parts["text"], expected["text_loss"])
    with torch.no_grad():
        close(learner.classifier(), expected["expert_features"])
        close(learner.bank.references(learner.task.all_classnames), expected["prototypes"])
        routing = learner.step(images()).routing
    close(routing.logits, expected["gate_logits"])
    assert routing.experts.tolist() == expected["experts"].astype(int).tolist()


@pytest.mark.parametrize("sparse", [True, False])
def test_mocoop_at_batch_1_supervises_the_chosen_experts_only(sparse):
    """The others' features count as zero, each adding the constant ln C; they get no gradient of the supervision."""
    learner = mocoop(5, chosen_only=True)
    learner.sparse_experts = sparse  # what saves work changes no number
    parameters = set_learned("mocoop_batch1", learner, MOCOOP_NAMES)
    expected = numbers("mocoop_batch1")
    assert learner.skips_experts
    terms = learner.loss(learner.step(images()[:1], labels()[:1]))
    close(terms.logits, expected["logits"])
    close(terms.total, expected["loss"])
    close(terms.parts["text"], expected["text_loss"])
    terms.total.backward()
    for theirs, parameter in parameters.items():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        close(gradient.norm(), expected.get(f"gradnorm:{theirs}", torch.zeros(()).numpy()), scale=1.0)
    chosen = expected["experts"].astype(int).ravel().tolist()
    for i in range(3):  # those without a gradient are passed over by the optimizer, momentum and all
        assert all(
            (parameters[f"prompt_learner.ctx_{side}_{i}"].grad is None) is (i not in chosen) for side in ("before", "after")
        )


@pytest.mark.parametrize("build", [lambda clip: coop("coop_end", clip), lambda clip: mocoop(3, clip)], ids=["coop", "mocoop"])
def test_short_training_equals_the_plain_tower(build, monkeypatch):
    """Two SGD steps through the prefix-shared tower and through the plain one have the same losses, and learn."""
    finals = []
    for plain in (False, True):
        clip = golden_clip()
        if plain:
            monkeypatch.setattr(clip.text, "shares_prefix", False)
        torch.manual_seed(0)
        learner = build(clip)
        optimizer = torch.optim.SGD(learner.parameters(), lr=0.05, momentum=0.9)
        target = labels(3)
        losses = []
        for _ in range(2):
            optimizer.zero_grad()
            loss = learner.loss(learner.step(images(), target)).total
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        finals.append(losses)
    assert finals[0] == pytest.approx(finals[1], rel=1e-3)


def test_contexts_of_as_many_vectors_as_the_authors_count_words():
    clip = golden_clip()
    groups = (("{} texture.",), ("itap of a {}.",), ("a {} in a video game.",), ("a photo of a {}, a type of pet.",))
    task = replace(golden_task(clip), template_groups=groups)
    theirs, ours = TemplateGroups(task, count_words=True), TemplateGroups(task)
    assert [(len(b), len(a)) for b, a in zip(theirs.before, theirs.after, strict=True)] == [(0, 2), (3, 0), (1, 5), (4, 5)]
    eot = clip.text.embed(clip.text.tokenizer.after)
    assert torch.equal(theirs.after[0][1:], eot) and torch.equal(theirs.after[2][4:], eot)
    found = theirs.encode(task.classnames)
    assert torch.allclose(found, ours.encode(task.classnames), atol=1e-4)  # the same words, of which other ones are learned
    found.sum().backward()
    assert theirs.after[0].grad[1].abs().max() > 0


def test_counted_words_in_a_training_on_base_classes():
    """The vector that stands for EOT behind "in a video game" stands for the full stop in the supervision over all names."""
    task = replace(golden_task(golden_clip(), 3), template_groups=(("a {} in a video game.",), ("itap of a {}.",)))
    bank = TemplateGroups(task, count_words=True)
    router = HardPromptTopK(task, bank)
    learner = Learner(task, bank, router, loss=CrossEntropy() + RouterLoss(router) + 5.0 * GroupedContrastive(task, bank))
    compare("mocoop_words", learner, {name: ours for name, ours in MOCOOP_NAMES.items() if not name.endswith("_2")}, 3)
