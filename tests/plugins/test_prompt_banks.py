"""Prompt banks: what prompts per image cost, what they refuse, and every bank with every router."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from promptmix.errors import ConfigError
from promptmix.prompts.learner import Learner
from promptmix.prompts.losses import CrossEntropy, RouterLoss
from promptmix.registry import DISTILLER_REGISTRY, ROUTER_REGISTRY, TEXT_SUPERVISION_REGISTRY
from tests.plugins.small import JOINT, bank_of, small_task, unit


def test_cocoop_needs_a_tenth_of_the_flops(monkeypatch):
    task = small_task()
    learner = Learner(task, bank_of(task, "InstanceConditional", n_ctx=4))
    features, labels = unit(4, JOINT), torch.arange(4)
    flops, gradients = [], []
    for shared in (True, False):
        monkeypatch.setattr(task.clip.text, "shares_prefix", shared)
        learner.zero_grad()
        with FlopCounterMode(display=False) as counter:
            learner.loss(learner.step(features, labels)).total.backward()
        flops.append(counter.get_total_flops())
        gradients.append(learner.bank.ctx.grad.clone())
    assert torch.allclose(*gradients, atol=1e-5)
    assert flops[1] >= 10 * flops[0]


def test_cocoop_bounds_what_it_encodes_at_once(task, monkeypatch):
    bank = bank_of(task, "InstanceConditional", image_chunk=2, n_prompts=3)
    sizes = []
    encode = type(task.clip.text).forward
    monkeypatch.setattr(
        type(task.clip.text), "forward", lambda self, prompts: sizes.append(len(prompts.prefix)) or encode(self, prompts)
    )
    features = unit(5, JOINT)
    with torch.no_grad():
        chunked = bank(task.classnames, features)
    assert sizes == [6, 6, 3]
    together = bank(task.classnames, features)
    assert sizes[3:] == [15]
    assert chunked.shape == (5, 3, 6, JOINT)
    assert torch.allclose(chunked, together, atol=1e-6)
    with pytest.raises(ValueError, match="need image features"):
        bank(task.classnames)


def test_prompts_per_image_refuse_a_supervision_of_one_text(task):
    bank = bank_of(task, "InstanceConditional")
    with pytest.raises(ConfigError, match="GroupedContrastive takes one set of text features"):
        Learner(task, bank, loss=CrossEntropy() + TEXT_SUPERVISION_REGISTRY.get("GroupedContrastive")(task, bank))


@pytest.mark.parametrize("router", ["HardPromptTopK", "TopK", "NoisyTopK", "Soft", "Uniform", "none"])
@pytest.mark.parametrize(
    ("bank", "settings"),
    [
        ("Soft", {"n_prompts": 3}),
        ("TemplateGroups", {}),
        ("InstanceConditional", {"n_prompts": 3}),
        ("CoupledDeep", {"n_prompts": 3, "prompt_depth": 1}),
        ("IndependentDeep", {"n_prompts": 3, "prompt_depth_vision": 1, "prompt_depth_text": 2}),
    ],
)
def test_every_bank_with_every_router_and_loss(task, bank, settings, router):
    experts = bank_of(task, bank, **settings)
    routes = None if router == "none" else ROUTER_REGISTRY.get(router)(task, experts)
    losses = ["FrozenImageL1", "GatedHardPrompts", "ZeroshotKL"]
    loss = CrossEntropy() + RouterLoss(routes) + TEXT_SUPERVISION_REGISTRY.get("L1ToEnsemble")(task, experts)
    for name in losses:
        loss += DISTILLER_REGISTRY.get(name)(task, experts).named(name)
    learner = Learner(task, experts, routes, loss=loss)
    terms = learner.loss(learner.step(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 5])))
    assert set(losses) < set(terms.parts)
    terms.total.backward()
    assert terms.logits.shape == (4, 6)
    assert all(parameter.grad is not None for parameter in learner.parameters() if parameter.numel())
