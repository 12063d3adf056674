"""Routers against their papers' equations."""

from __future__ import annotations

import pytest
import torch
from promptmix.plugins.router.noisy import chance_of_choice, variation

from promptmix.errors import ConfigError
from promptmix.prompts.learner import Learner
from promptmix.registry import ROUTER_REGISTRY
from tests.plugins.small import JOINT, bank_of, made_step, unit


def test_soft_router_weighs_all_and_uniform_equally(task):
    bank = bank_of(task, "TemplateGroups")
    features = unit(5, JOINT)
    soft = ROUTER_REGISTRY.get("Soft")(task, bank)
    routing = soft(made_step(query=features))
    assert torch.allclose(routing.dense, soft.gate(features).softmax(dim=-1), atol=1e-6)
    uniform = ROUTER_REGISTRY.get("Uniform")(task, bank)
    assert torch.allclose(uniform(made_step(query=features)).dense, torch.full((5, 3), 1 / 3))
    assert not list(uniform.parameters())
    losses = [
        each.loss(each.step(features, torch.arange(5))).total for each in (Learner(task, bank, uniform), Learner(task, bank))
    ]
    assert torch.allclose(*losses)


def test_noisy_router_is_noisy_in_training_only(task):
    router = ROUTER_REGISTRY.get("NoisyTopK")(task, bank_of(task, n_prompts=4))
    step = made_step(query=unit(8, JOINT))
    assert not torch.equal(router(step).logits, router(step).logits)
    router.eval()
    assert torch.equal(router(step).logits, router(step).clean)
    with pytest.raises(ConfigError, match=r"k is 5, but must be from 1 to the number of experts, 4"):
        ROUTER_REGISTRY.get("NoisyTopK")(task, bank_of(task, n_prompts=4), k=5)


def test_noisy_load_is_the_chance_of_being_chosen(task):
    """P(x, i) against drawing expert i's noise many times, with the others' as they fell."""
    torch.manual_seed(2)
    router = ROUTER_REGISTRY.get("NoisyTopK")(task, bank_of(task, n_prompts=4), k=2)
    torch.nn.init.normal_(router.gate)
    torch.nn.init.normal_(router.noise)
    routing = router(made_step(query=unit(3, JOINT)))
    chance = chance_of_choice(routing, 2)
    for image in range(3):
        for expert in range(4):
            others = routing.logits[image].index_select(0, torch.tensor([e for e in range(4) if e != expert]))
            drawn = routing.clean[image, expert] + torch.randn(20000) * routing.spread[image, expert]
            share = (drawn > others.topk(2).values[-1]).float().mean()
            assert chance[image, expert].item() == pytest.approx(share.item(), abs=0.015)


def test_noisy_loss_is_zero_in_balance_and_grows_without(task):
    assert variation(torch.full((4,), 7.0)).item() == 0
    assert variation(torch.tensor([4.0, 0, 0, 0])).item() == pytest.approx(3)
    bank = bank_of(task, n_prompts=4)
    router = ROUTER_REGISTRY.get("NoisyTopK")(task, bank, k=1).eval()
    features, labels = unit(6, JOINT).abs(), torch.zeros(6, dtype=torch.long)
    with torch.no_grad():
        router.gate[:, 0] = 9.0  # everything goes to expert 0
    step = made_step(query=features, labels=labels)
    loss = router.loss(made_step(query=features, routing=router(step)))
    assert loss.item() == pytest.approx(0.1 * 3 + 0.1 * 3, rel=1e-3)
    everyone = ROUTER_REGISTRY.get("NoisyTopK")(task, bank, k=4).eval()
    assert everyone.loss(made_step(query=features, routing=everyone(step))).item() == pytest.approx(0, abs=1e-6)
