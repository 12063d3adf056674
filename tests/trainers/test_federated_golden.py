"""pFedMoAP's client against the numbers of its authors' code."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from promptmix.plugins.heads.attention_gate import AttentionGate
from promptmix.plugins.prompt_bank.shared_experts import LocalAndOthers

from promptmix.interpret.mixture import mixtures_of
from promptmix.prompts.learner import Learner
from tests.trainers.golden import close, golden_clip, golden_task, images, labels, numbers, seeded

NAMES = {f"gating.W_{letter}.{kind}": f"head.w_{letter}.{kind}" for letter in "qkvo" for kind in ("weight", "bias")}


@lru_cache(maxsize=1)
def frozen():
    return golden_clip()


def value(name, *shape):
    return torch.from_numpy(seeded().learned("pfedmoap", name, shape))


def client(others=()):
    task = golden_task(frozen())
    bank = LocalAndOthers(task, 4)
    learner = Learner(task, bank, head=AttentionGate(task, bank))
    state = {"bank.ctx": value("prompt_learner.ctx", 4, 512)[None], "bank.others": torch.zeros(0, 4, 512)}
    if len(others):
        state["bank.others"] = torch.stack([value(f"client_{i}.ctx", 4, 512) for i in others])
    state |= {our: value(theirs, *([128, 128] if "weight" in theirs else [128])) for theirs, our in NAMES.items()}
    learner.load_state_dict(dict(learner.fit_state(state)))
    return learner


def test_before_any_download_it_is_coop_and_the_gate_waits():
    learner, expected = client(), numbers("pfedmoap")
    terms = learner.loss(learner.step(images(), labels()))
    close(terms.logits, expected["local_logits"])
    close(terms.total, expected["local_loss"])
    terms.total.backward()
    close(learner.bank.ctx.grad.norm(), expected["local_gradnorm:prompt_learner.ctx"])
    assert all(p.grad is None for p in learner.head.parameters()) and learner.bank.others.grad is None


def test_class_specific_contexts_around_the_name_and_another_gate():
    case, task = "pfedmoap_csc_middle", golden_task(frozen())
    bank = LocalAndOthers(task, 3, csc=True, class_token_position="middle")
    learner = Learner(task, bank, head=AttentionGate(task, bank, gate_dim=64, heads=4, scaling=5.0, lambda_=0.2))
    others = [torch.from_numpy(seeded().learned(case, f"client_{i}.ctx", (5, 3, 512))) for i in range(2)]
    bank.others = torch.nn.Parameter(torch.stack(others), requires_grad=False)
    names = {"prompt_learner.ctx": "bank.ctx"} | NAMES
    ours = dict(learner.named_parameters())
    with torch.no_grad():
        for theirs, our in names.items():
            shape = tuple(ours[our].shape[our == "bank.ctx" :])
            ours[our].copy_(torch.from_numpy(seeded().learned(case, theirs, shape)))
    expected = numbers(case)
    terms = learner.loss(learner.step(images(), labels()))
    close(terms.logits, expected["logits"])
    close(terms.total, expected["loss"])
    terms.total.backward()
    for theirs, our in names.items():
        if f"gradnorm:{theirs}" in expected:
            head = expected[f"gradhead:{theirs}"]
            close(ours[our].grad.flatten()[: len(head)], head, scale=float(expected[f"gradnorm:{theirs}"]))


def test_gate_over_own_and_other_prompts():
    expected = numbers("pfedmoap")
    learner = client(expected["sel:random/0"].astype(int))
    step = learner.step(images(), labels())
    terms = learner.loss(step)
    close(terms.logits, expected["logits"])
    close(terms.total, expected["loss"])
    terms.total.backward()
    ours = dict(learner.named_parameters())
    assert ours.pop("bank.others").grad is None
    for theirs, our in ({"prompt_learner.ctx": "bank.ctx"} | NAMES).items():
        if f"gradnorm:{theirs}" not in expected:
            assert theirs.endswith("bias") and ours[our].grad.norm() < 1e-5  # a shift that a softmax doesn't see
            continue
        norm, head = expected[f"gradnorm:{theirs}"], expected[f"gradhead:{theirs}"]
        close(ours[our].grad.norm(), norm)
        close(ours[our].grad.flatten()[: len(head)], head, scale=float(norm))
    with torch.no_grad():
        _, weights = learner.head.attend(learner.head.pool(step.image), learner.head.pool(step.text))
        close(weights.mean(dim=2).transpose(0, 1), expected["attention"])
        learner.eval()
        close(learner.logits(learner.features(images()), learner.classifier()), expected["logits_eval"])


def test_features_of_others_are_made_once_and_anew_when_others_come():
    learner = client([2, 3])
    first = learner.bank(learner.task.classnames)
    calls = []
    encode = learner.bank._encode
    learner.bank._encode = lambda contexts, *rest: calls.append(len(contexts)) or encode(contexts, *rest)
    assert torch.equal(learner.bank(learner.task.classnames), first) and calls == [1]
    with torch.no_grad():
        learner.bank.others.mul_(2)
    assert not np.allclose(learner.bank(learner.task.classnames)[1:].detach(), first[1:].detach()) and calls == [1, 1, 2]


@torch.no_grad()
def test_interpret_takes_the_gate_for_a_mixture():
    assert mixtures_of(client()) == []
    learner = client([1, 2])
    (mixed,) = mixtures_of(learner)
    features, text = learner.features(images()), learner.classifier()
    routing = mixed.routing(features, text)
    assert len(mixed.names) == 3 and torch.allclose(routing.dense.sum(dim=1), torch.ones(3))
    assert torch.equal(mixed.trained(features, text), learner.logits(features, text))
    head, second = learner.head, torch.eye(3)[[1, 1, 1]]
    value = head.w_o(head.w_v(head.pool(text[1])))
    by_hand = learner.clip.scale * (0.5 * features @ text[0].T + head.pool(features) @ value.T)
    torch.testing.assert_close(mixed.weighed(features, text, second), by_hand)
