"""Yardsticks that train on image features, against the numbers of their authors' code."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from promptmix.plugins.heads.cache import Cache, search
from promptmix.plugins.prompt_bank.hard import Hard, ImageAdapter
from promptmix.prompts.templates import IMAGENET_7
from promptmix.trainers.taskres import Residual

from promptmix.prompts.heads import Cosine
from promptmix.prompts.learner import Learner
from promptmix.prompts.roles import Task
from tests.trainers.golden import close, compare, golden_clip, golden_task, images, labels, numbers, seeded

ROWS = torch.arange(20) // 4  # labels of five classes with four shots


@lru_cache(maxsize=1)
def frozen():
    return golden_clip()


def given(case, name, *shape, std=1.0):
    """A seeded input of a case."""
    return torch.from_numpy(seeded().stream(f"{case}/{name}", shape, std))


def unit(x):
    return F.normalize(x, dim=-1)


def learned(case, name, *shape):
    return torch.from_numpy(seeded().learned(case, name, shape))


def with_rows(task, rows):
    """The task with labels of training pictures."""
    return Task(task.clip, task.classnames, task.all_classnames, task.templates, task.template_groups, tuple(rows.tolist()))


def on_features(learner, features, target=None, text=None):
    """The step of seeded features, and seeded text features (C, D) where the case has its own."""
    step = learner.step(features, target)
    if text is not None:
        step._text = text[None]
    return step


def check_gradient(expected, name, parameter):
    norm = float(expected[f"gradnorm:{name}"])
    close(parameter.grad.norm(), expected[f"gradnorm:{name}"])
    close(parameter.grad.sum(), expected[f"gradsum:{name}"], scale=norm)
    head = expected[f"gradhead:{name}"]
    close(parameter.grad.flatten()[: len(head)], head, scale=norm)


def tip(alpha=1.17, beta=1.0, **settings):
    task = with_rows(golden_task(frozen()), ROWS)
    bank = Hard(task)
    return Learner(task, bank, head=Cache(task, bank, alpha=alpha, beta=beta, **settings))


def test_tip_adapter():
    case, expected = "tip_adapter", numbers("tip_adapter")
    learner = tip(augment_epoch=2)
    views = [given(case, f"cache_{i}", 20, 512) for i in range(2)]
    rounds = iter(views)
    learner.prepare(lambda: [learner.step(part, row) for part, row in zip(next(rounds).split(7), ROWS.split(7), strict=True)])
    close(learner.head.keys.flatten()[:256], expected["keys_head"])
    close(learner.head.keys.sum(), expected["keys_sum"], scale=20.0)
    text, test = unit(given(case, "text", 5, 512)), given(case, "test", 3, 512)
    target = torch.arange(12) % 5
    val = unit(given(case, "val", 12, 512) + 0.5 * views[0][4 * target])
    step = on_features(learner, test, labels(), text)
    close(learner.head.parts(step)[0], expected["zeroshot_logits"])
    close(step.logits, expected["logits"])
    close(F.cross_entropy(step.logits, labels()), expected["loss"])
    on_val = on_features(learner, val, target, text)
    close(learner.head.parts(on_val)[0], expected["zeroshot_logits_val"])
    close(on_val.logits, expected["logits_val"])
    beta, alpha = search(val @ learner.head.keys.T, 100 * val @ text.T, learner.head.values, target, [7, 60], [6, 5])
    assert beta == pytest.approx(float(expected["best_beta"])) and alpha == pytest.approx(float(expected["best_alpha"]))
    learner.head.beta.fill_(beta)
    learner.head.alpha.fill_(alpha)
    close(on_features(learner, test, text=text).logits, expected["logits_best"])


def test_tip_adapter_f():
    case, expected = "tip_adapter_f", numbers("tip_adapter_f")
    learner = tip(learned=True)
    learner.head.keys.data = learned(case, "adapter.weight", 20, 512)
    text, train, test = (unit(given(case, name, n, 512)) for name, n in (("text", 5), ("train", 3), ("test", 3)))
    terms = learner.loss(on_features(learner, train, labels(), text))
    close(terms.logits, expected["logits"])
    close(terms.total, expected["loss"])
    terms.total.backward()
    check_gradient(expected, "adapter.weight", learner.head.keys)
    torch.optim.AdamW(learner.parameters(), lr=0.001, eps=1e-4).step()
    close(learner.head.keys.flatten()[:256], expected["stepped_head"])
    close(learner.head.keys.norm(), expected["stepped_norm"])
    close(on_features(learner, test, text=text).logits, expected["logits_after_step"])


def test_clip_adapter():
    task = golden_task(frozen())
    bank = ImageAdapter(task)
    learner = Learner(task, bank, head=Cosine(task, bank))
    compare("clip_adapter", learner, {f"adapter.fc.{i}.weight": f"bank.adapter.{i}.weight" for i in (0, 2)})
    assert learner.features(images()).norm(dim=-1).max() > 1.5  # unnormalised, as the adapter reads them


def test_taskres():
    task = golden_task(frozen())
    bank = Residual(task, (*IMAGENET_7, "a photo of a {}."))
    compare(
        "taskres",
        Learner(task, bank, head=Cosine(task, bank)),
        {"prompt_learner.text_feature_residuals": "bank.residual"},
    )
    expected = numbers("taskres")
    close(bank.base.norm(dim=-1), expected["base_norm"])
    close(bank.base.flatten()[:256], expected["base_head"])
