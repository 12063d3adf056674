"""Text supervisions and distillers against their papers' equations."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from promptmix.data.templates import IMAGENET_80
from promptmix.errors import ConfigError
from promptmix.registry import DISTILLER_REGISTRY, TEXT_SUPERVISION_REGISTRY
from tests.plugins.small import JOINT, bank_of, made_step, unit


def test_distances_to_hard_prompts(task):
    bank = bank_of(task, n_prompts=2)
    features = bank(task.classnames)
    cosine = TEXT_SUPERVISION_REGISTRY.get("CosineToHard")(task, bank)
    hard = task.clip.hard_features(task.templates[:1], task.classnames)
    assert torch.allclose(cosine(made_step(text=features, query=None)), 1 - (features * hard).sum(dim=-1).mean(), atol=1e-6)
    assert cosine(made_step(text=hard.expand(2, -1, -1), query=None)).item() == pytest.approx(0, abs=1e-6)
    assert not cosine.state_dict()  # hard features depend on the class names, so no checkpoint keeps them
    l1 = TEXT_SUPERVISION_REGISTRY.get("L1ToEnsemble")(task, bank)
    tower = task.clip.text
    with torch.no_grad():
        raw = torch.stack([tower(tower.compose_text(template, task.classnames))[0] for template in IMAGENET_80])
    target = raw.mean(dim=0) / raw.mean(dim=0).norm(dim=-1, keepdim=True)
    assert torch.allclose(l1(made_step(text=features, query=None)), F.l1_loss(features, target.expand_as(features)), atol=1e-6)


def test_zeroshot_kl_is_the_divergence(task):
    distiller = DISTILLER_REGISTRY.get("ZeroshotKL")(task, bank_of(task), t=2.0)
    features, labels = unit(3, JOINT), torch.zeros(3, dtype=torch.long)
    taught = task.clip.scale * features @ task.clip.ensemble(task.templates[:1], task.classnames).T
    assert distiller(made_step(image=features, logits=taught, labels=labels)).item() == pytest.approx(0, abs=1e-6)
    student = torch.randn(3, 6)
    p, q = (taught / 2).softmax(dim=-1), (student / 2).softmax(dim=-1)
    expected = 4 * (p * (p / q).log()).sum(dim=1).mean()
    assert distiller(made_step(image=features, logits=student, labels=labels)).item() == pytest.approx(expected.item(), rel=1e-5)


def test_gated_teachers_are_few_and_weighed(task):
    distiller = DISTILLER_REGISTRY.get("GatedHardPrompts")(task, bank_of(task), k=2, t=2.0)
    assert not distiller.gate.any()
    assert list(distiller.state_dict()) == ["gate"]
    torch.nn.init.normal_(distiller.gate)
    features, student, labels = unit(3, JOINT), torch.randn(3, 6), torch.tensor([0, 4, 5])
    hard = task.clip.hard_features(task.templates, task.classnames)
    mpd = mps = 0.0
    for b in range(3):
        values, kept = (features[b] @ distiller.gate).topk(2)
        for a, j in zip(values.softmax(dim=0), kept, strict=True):
            h = task.clip.scale * hard[j] @ features[b]
            p, q = (h / 2).softmax(dim=0), (student[b] / 2).softmax(dim=0)
            mpd += (a * 4 * (p * (p / q).log()).sum()).item() / 3
            mps += (a * F.cross_entropy(h, labels[b])).item() / 3
    found = distiller.terms(features, student, labels)
    assert [term.item() for term in found] == pytest.approx([mpd, mps], rel=1e-4)
    both = distiller(made_step(image=features, logits=student, labels=labels))
    assert math.isclose(both.item(), 0.2 * mpd + 0.1 * mps, rel_tol=1e-4)
    with pytest.raises(ConfigError, match="k is 5, but must be from 1 to the number of hard templates, 4"):
        DISTILLER_REGISTRY.get("GatedHardPrompts")(task, bank_of(task), k=5)
