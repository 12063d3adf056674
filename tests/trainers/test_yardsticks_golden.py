"""Yardsticks that train on image features, against the numbers of their authors' code."""

from __future__ import annotations

import json
import math
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from promptmix.plugins.heads.cache import Cache, search
from promptmix.plugins.heads.linear import LinearHead
from promptmix.plugins.prompt_bank.hard import Hard, ImageAdapter
from promptmix.trainers.clap import Constraint, Prototypes
from promptmix.trainers.cross_modal import CrossModal, ImageTextCrossEntropy, RawHard
from promptmix.trainers.lp_plus_plus import BlendedProbe, descent
from promptmix.trainers.prolip import NearStart, TunedProjection
from promptmix.trainers.taskres import Residual

from promptmix.data.templates import IMAGENET_7
from promptmix.errors import CheckpointError
from promptmix.prompts.heads import Cosine
from promptmix.prompts.learner import Learner
from promptmix.prompts.losses import CrossEntropy
from promptmix.prompts.roles import Task
from tests.trainers.golden import FOLDER, close, compare, golden_clip, golden_task, images, labels, numbers, seeded

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


def test_taskres_with_an_enhanced_base(tmp_path):
    weight = torch.from_numpy(seeded().stream("taskres_enhanced/weight", (512, 512))) * 0.05
    torch.save({"state_dict": {"weight": weight}}, tmp_path / "base.pth")
    task, template = golden_task(frozen()), ("a photo of a {}, a type of pet.",)
    bank = Residual(task, template, 1.0, str(tmp_path / "base.pth"))
    names = {"prompt_learner.text_feature_residuals": "bank.residual"}
    compare("taskres_enhanced", Learner(task, bank, head=Cosine(task, bank)), names)
    torch.save({"state_dict": {"weight": weight[:3]}}, tmp_path / "base.pth")
    with pytest.raises(
        CheckpointError, match=r"'weight' of the enhanced base is \(3, 512\), but this backbone needs \(512, 512\)"
    ):
        Residual(task, template, 1.0, str(tmp_path / "base.pth"))


def test_cross_modal(monkeypatch):
    case, expected = "cross_modal", numbers("cross_modal")
    task = golden_task(frozen())
    text, image, test = (given(case, name, n, 512) for name, n in (("text", 10), ("image", 4), ("test", 3)))
    zeroshot = unit(text.unflatten(0, (5, 2)).mean(dim=1))
    close(zeroshot.flatten()[:256], expected["zero_shot_weights_head"])
    close(zeroshot.norm(dim=-1), expected["zero_shot_weights_norm"])
    bank = RawHard(task)
    head = LinearHead(task, bank, zeroshot_share=0.5, scale=100.0)
    torch.testing.assert_close(head.weight.data, bank.encode(task.classnames)[0])
    head.zeroshot.copy_(zeroshot)
    head.weight.data.copy_(learned(case, "head.weight", 5, 512))
    loss = ImageTextCrossEntropy(head, text, torch.arange(10) // 2)
    monkeypatch.setattr(loss, "draw", lambda count: torch.tensor([1, 2, 5, 8])[:count])
    learner = Learner(task, bank, head=head, loss=loss)
    terms = learner.loss(learner.step(unit(image), torch.tensor([0, 3, 1, 3])))
    close(terms.logits, expected["train_logits"][:4])
    close(head.scores(loss.texts[[1, 2, 5, 8]]), expected["train_logits"][4:])
    close(terms.total, expected["loss"])
    terms.total.backward()
    check_gradient(expected, "head.weight", head.weight)
    close(head.scores(unit(test)), expected["logits"])
    learner.eval()
    close(head.scores(unit(test)), expected["logits_wiseft"])


def test_cross_modal_adapter_and_partial_finetuning(monkeypatch):
    """Both at once: the adapter reads features of an image tower whose last block learns, and texts beside them."""
    case, expected = "cross_modal_adapter", numbers("cross_modal_adapter")
    note = json.loads((FOLDER / f"{case}.json").read_text())
    learner = CrossModal.compose(
        None, golden_task(frozen()), note["settings"]["templates"], 0.2, 1, zeroshot_share=0.5, scale=math.exp(4.0)
    ).train()
    ours = dict(learner.named_parameters())
    names = {"head.1.weight": "head.weight", **{f"head.0.fc.{i}.weight": f"head.adapter.{i}.weight" for i in (0, 2)}}
    towers = {name: name.removeprefix("image.") for name in note["learned"] if name.startswith("image.")}
    for name, held in towers.items():
        held = held.replace("transformer_encoder.", "transformer.resblocks.").replace(".", "/")
        names[name] = f"bank.values.image.visual/{held}"
    assert set(names.values()) == set(ours) and set(names) == set(note["learned"])
    with torch.no_grad():
        for name, shape in note["learned"].items():
            start = torch.zeros(shape) if name.startswith("head.0.") else ours[names[name]]
            ours[names[name]].copy_(start + 0.2 * learned(case, name, *shape))
    rows = torch.tensor(note["settings"]["rows"])
    monkeypatch.setattr(learner.losses["ce"], "draw", lambda count: rows)
    terms = learner.loss(learner.step(images(), labels()))
    close(terms.logits, expected["logits"])
    close(terms.total, expected["loss"])
    terms.total.backward()
    for name in names:
        if f"gradnorm:{name}" in expected:
            norm, head = float(expected[f"gradnorm:{name}"]), expected[f"gradhead:{name}"]
            close(ours[names[name]].grad.norm(), expected[f"gradnorm:{name}"])
            close(ours[names[name]].grad.flatten()[: len(head)], head, scale=norm)
    with torch.no_grad():
        close(learner.eval().step(images()).logits, expected["wiseft"])


def test_lp_plus_plus():
    case, expected = "lp_plus_plus", numbers("lp_plus_plus")
    shift = given(case, "shift", 1, 512, std=1.5)
    text = unit(given(case, "text", 5, 512) + 0.3 * shift)
    train, test = (unit(given(case, name, n, 512) + shift) for name, n in (("train", 20), ("test", 3)))
    task = golden_task(frozen())
    head = BlendedProbe(task)
    learner = Learner(task, Hard(task), head=head)
    head.bias.data.copy_(learned(case, "classifier.bias", 5))
    rows = list(zip(train.split(8), ROWS.split(8), strict=True))
    head.prepare(lambda: [on_features(learner, part, row, text) for part, row in rows])
    close(head.weight.flatten()[:256], expected["init_weight_head"])
    close(head.weight.norm(), expected["init_weight_norm"])
    close(head.alpha, expected["init_alpha"])
    for rate, name in zip(head.rates, ("lr_w", "lr_alpha"), strict=True):
        close(rate, expected[name])
    optimizer = descent(learner, *head.rates, every=10)
    for epoch in range(1, 21):
        optimizer.zero_grad()
        terms = learner.loss(on_features(learner, train, ROWS, text))
        terms.total.backward()
        if epoch == 1:
            close(terms.logits, expected["train_logits"])
            close(terms.total, expected["loss"])
            names = {"classifier.weight": head.weight, "classifier.bias": head.bias, "alpha_vec": head.alpha}
            for name, parameter in names.items():
                check_gradient(expected, name, parameter)
        optimizer.step()
        if epoch in (1, 10, 20):
            close(terms.total, expected[f"loss_{epoch}"])
            close(head.alpha, expected[f"alpha_{epoch}"])
            logits = "logits" if epoch == 20 else f"logits_{epoch}"
            close(on_features(learner, test, text=text).logits, expected[logits])


def test_clap():
    case, expected = "clap", numbers("clap")
    task = golden_task(frozen(), templates=("a centered satellite photo of {}.",))
    bank = Prototypes(task)
    constraint = Constraint(bank, "l2", views=1)
    learner = Learner(task, bank, head=Cosine(task, bank), loss=CrossEntropy() + constraint)
    train = unit(given(case, "train", 20, 512))
    close(bank.base.norm(dim=-1), expected["base_norm"])
    close(bank.base.flatten()[:256], expected["base_head"])
    close(learner.step(train).logits, expected["zeroshot_train_logits"])
    with torch.no_grad():
        constraint.prepare(lambda: [learner.step(part, row) for part, row in zip(train.split(6), ROWS.split(6), strict=True)])
        close(constraint.multipliers, expected["multipliers"])
        bank.prototypes.add_(learned(case, "adapter.prototypes", 5, 512))
    terms = learner.loss(learner.step(train, ROWS))
    close(terms.logits, expected["train_logits"])
    close(terms.total, expected["loss"])
    close(terms.parts["ce"], expected["ce"])
    close(terms.parts["constraint"], expected["constraint"])
    terms.total.backward()
    check_gradient(expected, "adapter.prototypes", bank.prototypes)
    with torch.no_grad():
        close(learner.logits(learner.features(images()), learner.classifier()), expected["logits"])


def test_clap_with_an_adaptive_constraint_on_cosines():
    """Three epochs of full batches, the outer step behind each; the published model is for EuroSAT's template."""
    case, expected = "clap_adaptive", numbers("clap_adaptive")
    task = golden_task(frozen(), templates=("a centered satellite photo of {}.",))
    bank = Prototypes(task)
    constraint = Constraint(bank, "l2", views=1, distance="cosine", adaptive=True)
    learner = Learner(task, bank, head=Cosine(task, bank), loss=CrossEntropy() + constraint)
    train = unit(given(case, "train", 20, 512))
    with torch.no_grad():
        constraint.prepare(lambda: [learner.step(train, ROWS)])
    optimizer = torch.optim.SGD([bank.prototypes], lr=3.0, momentum=0.9)  # so that the distances count
    for epoch in range(3):
        optimizer.zero_grad()
        loss = learner.loss(learner.step(train, ROWS)).total
        loss.backward()
        optimizer.step()
        constraint.update()
        close(loss, expected["losses"][epoch])
        close(constraint.multipliers, expected["multipliers"][epoch])
    close(bank.prototypes.flatten()[:256], expected["prototypes_head"])
    random = Prototypes(task, start="random").prototypes
    assert random.std().item() == pytest.approx((2 / 512) ** 0.5, rel=0.1)


def test_prolip():
    case, expected = "prolip", numbers("prolip")
    task = golden_task(frozen())
    bank = TunedProjection(task)
    bank.projection.data += 0.1 * learned(case, "vit_proj", 768, 512)
    learner = Learner(task, bank, head=Cosine(task, bank, 100.0), loss=CrossEntropy() + 0.25 * NearStart(bank))
    views, text = [given(case, f"view_{i}", 20, 768) for i in range(2)], unit(given(case, "text", 5, 512))
    test = given(case, "test", 3, 768)
    close(on_features(learner, test, text=text).logits, expected["logits"])
    optimizer = torch.optim.Adam(learner.parameters(), lr=1e-5, eps=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2)
    for view, loss in ((views[1], "loss"), (views[0], "loss_2")):
        optimizer.zero_grad()
        terms = learner.loss(on_features(learner, view, ROWS, text))
        close(terms.total, expected[loss])
        terms.total.backward()
        if loss == "loss":
            close(terms.logits, expected["train_logits"])
            close(terms.parts["ce"], expected["ce"])
            close(terms.parts["distance"], expected["mse"])
            check_gradient(expected, "vit_proj", bank.projection)
        optimizer.step()
        schedule.step()
        if loss == "loss":
            close(bank.projection.flatten()[:256], expected["stepped_head"])
    close(on_features(learner, test, text=text).logits, expected["logits_after_2"])
