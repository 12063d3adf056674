"""CoOp and MoCoOp against the numbers of their authors' code."""

from __future__ import annotations

import pytest
import torch

from promptmix.plugin_manager import get_plugin_manager
from promptmix.prompts.learner import Mixture
from promptmix.registry import PROMPT_BANK_REGISTRY, ROUTER_REGISTRY, TEXT_SUPERVISION_REGISTRY
from tests.trainers.golden import close, compare, golden_clip, golden_task, images, labels, numbers

TEMPLATES = (
    "a photo of a {}, a type of animal.",
    "a photo of a {}.",
    "a photo of many {}.",
    "a good photo of the {}.",
    "a low resolution photo of a {}.",
)


def coop(case: str, clip=None) -> Mixture:
    get_plugin_manager()
    _, position, *csc = case.split("_")
    task = golden_task(clip)
    return Mixture(task, PROMPT_BANK_REGISTRY.get("Soft")(task, n_ctx=4, csc=bool(csc), class_token_position=position))


def mocoop(classes: int, clip=None) -> Mixture:
    get_plugin_manager()
    task = golden_task(clip, classes)
    bank = PROMPT_BANK_REGISTRY.get("TemplateGroups")(task, TEMPLATES, (1, 2, 2))
    router = ROUTER_REGISTRY.get("HardPromptTopK")(task, bank)
    supervision = TEXT_SUPERVISION_REGISTRY.get("GroupedContrastive")(task, bank)
    return Mixture(task, bank, router, supervision, text_weight=5.0)


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
        routing = learner.router(learner.encode_images(images()))
    close(routing.logits, expected["gate_logits"])
    assert routing.experts.tolist() == expected["experts"].astype(int).tolist()


@pytest.mark.parametrize("build", [lambda clip: coop("coop_end", clip), lambda clip: mocoop(3, clip)], ids=["coop", "mocoop"])
def test_short_training_equals_the_plain_tower(build, monkeypatch):
    """Five SGD steps through the prefix-shared tower and through the plain one end at the same loss, and learn."""
    finals = []
    for plain in (False, True):
        clip = golden_clip()
        if plain:
            monkeypatch.setattr(clip.text, "shares_prefix", False)
        torch.manual_seed(0)
        learner = build(clip)
        optimizer = torch.optim.SGD(learner.parameters(), lr=0.05, momentum=0.9)
        features, target = learner.encode_images(images()), labels(3)
        losses = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = learner.loss(features, target).total
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        finals.append(losses[-1])
    assert finals[0] == pytest.approx(finals[1], rel=1e-3)
