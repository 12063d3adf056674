"""CoCoOp, KgCoOp, MoPD and ProGrad against the numbers of their authors' code."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from promptmix.plugins.distillation.gated_hard_prompts import GatedHardPrompts
from promptmix.plugins.distillation.zeroshot_kl import ZeroshotKL
from promptmix.plugins.prompt_bank.instance_conditional import InstanceConditional
from promptmix.plugins.prompt_bank.soft import Soft
from promptmix.plugins.text_supervision.hard_prompts import CosineToHard
from promptmix.trainers.prograd import ProGrad, project

from promptmix.errors import ConfigError
from promptmix.prompts.learner import Learner
from promptmix.prompts.losses import CrossEntropy
from tests.trainers.golden import FOLDER, close, compare, golden_clip, golden_task, images, labels, numbers, set_learned

HARD = json.loads((FOLDER / "mopd_templates.json").read_text(encoding="utf-8"))
EUROSAT_1 = ("a centered satellite photo of {}.",)
META_NET = {
    f"prompt_learner.meta_net.{layer}.{kind}": f"bank.meta_net.{layer}.{kind}"
    for layer in ("linear1", "linear2")
    for kind in ("weight", "bias")
}


@pytest.fixture(scope="module")
def clip():
    return golden_clip()


def cocoop(clip, **settings):
    task = golden_task(clip)
    return Learner(task, InstanceConditional(task, n_ctx=4, **settings))


def kgcoop(clip):
    task = golden_task(clip, templates=EUROSAT_1)
    bank = Soft(task, n_ctx=4)
    return Learner(task, bank, loss=CrossEntropy() + 8.0 * CosineToHard(task, bank))


def mopd(clip, dataset="EuroSAT", k=2, w=0.5, w2=0.1):
    task = golden_task(clip, templates=tuple(HARD[dataset]))
    bank = Soft(task, n_ctx=4)
    return Learner(task, bank, loss=w * CrossEntropy() + GatedHardPrompts(task, bank, k=k, mpd_weight=1 - w, mps_weight=w2))


def prograd(clip):
    task = golden_task(clip)
    bank = Soft(task, n_ctx=4)
    return Learner(task, bank, measures={"kl": ZeroshotKL(task, bank)})


def test_cocoop(clip):
    learner = cocoop(clip)
    compare("cocoop", learner, {"prompt_learner.ctx": "bank.ctx", **META_NET})
    with torch.no_grad():
        features = learner.encode_images(images())
        together = learner.logits(features, learner.classifier())
        learner.bank.image_chunk = 2
        assert torch.allclose(learner.logits(features, learner.classifier()), together, atol=1e-5)


def test_kgcoop(clip):
    terms = compare("kgcoop", kgcoop(clip), {"prompt_learner.ctx": "bank.ctx"})
    close(terms.parts["text"], numbers("kgcoop")["score"])


@pytest.mark.parametrize(("case", "settings"), [("mopd", ("EuroSAT", 2, 0.5, 0.1)), ("mopd_pets", ("OxfordPets", 3, 0.8, 0.5))])
def test_mopd(clip, case, settings):
    learner = mopd(clip, *settings)
    compare(case, learner, {"prompt_learner.ctx": "bank.ctx", "prompt_learner.gate": "losses.distill.gate"})
    expected = numbers(case)
    with torch.no_grad():
        features = learner.encode_images(images())
        logits = learner.logits(features, learner.classifier())
        for ours, name in zip(learner.losses.distill.terms(features, logits, labels()), ("mpd", "mps"), strict=True):
            close(ours, expected[name])
        assert learner.losses.distill.route(features).experts.tolist() == expected["kept"].astype(int).tolist()


@pytest.mark.parametrize("conflict", ["", "conflict_"])
def test_prograd_gradient_is_the_projected_one(clip, conflict):
    """For the case's labels the two gradients agree; for ``conflict_labels`` they contradict and one is projected."""
    learner = prograd(clip)
    ctx = set_learned("prograd", learner, {"prompt_learner.ctx": "bank.ctx"})["prompt_learner.ctx"]
    expected = numbers("prograd")
    target = torch.from_numpy(expected["conflict_labels"]).long() if conflict else labels()
    features = learner.encode_images(images())
    with torch.no_grad():
        close(learner.logits(features, learner.classifier()), expected["logits"])
        hard = clip.ensemble(["a photo of a {}."], learner.task.classnames)
        teacher = clip.scale * features @ hard.T
        close(teacher, expected["zeroshot_logits"])
    terms = learner.loss(learner.step(features, target))
    close(terms.total, expected[f"{conflict}loss"])
    probability = teacher.softmax(dim=-1)
    entropy = -(probability * probability.log()).sum(dim=-1).mean()  # the authors' term keeps it, ours is the divergence
    close(terms.parts["kl"] + entropy, expected[f"{conflict}kl"])
    (specific,) = torch.autograd.grad(terms.total, [ctx], retain_graph=True)
    (general,) = torch.autograd.grad(terms.parts["kl"], [ctx])
    close(torch.cosine_similarity(specific.flatten(), general.flatten(), dim=0), expected[f"{conflict}cosine"], scale=1.0)
    assert (expected[f"{conflict}cosine"] < 0) == bool(conflict)
    ours, norm = project(specific, general), float(expected[f"gradnorm:{conflict}prompt_learner.ctx"])
    close(ours.norm(), expected[f"gradnorm:{conflict}prompt_learner.ctx"])
    close(ours.flatten()[:256], expected[f"gradhead:{conflict}prompt_learner.ctx"], scale=norm)
    close(ours.sum(), expected[f"gradsum:{conflict}prompt_learner.ctx"], scale=norm)


@pytest.mark.parametrize("build", [cocoop, kgcoop, mopd])
def test_short_training_equals_the_plain_tower(build, monkeypatch):
    """Two SGD steps through the prefix-shared tower and through the plain one have the same losses, and learn."""
    finals = []
    for plain in (False, True):
        clip = golden_clip()
        monkeypatch.setattr(clip.text, "shares_prefix", not plain)
        torch.manual_seed(0)
        learner = build(clip)
        optimizer = torch.optim.SGD(learner.parameters(), lr=0.05, momentum=0.9)
        losses = []
        for _ in range(2):
            optimizer.zero_grad()
            loss = learner.loss(learner.step(images(), labels())).total
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        finals.append(losses)
    assert finals[0] == pytest.approx(finals[1], rel=1e-3)


@pytest.mark.parametrize("say", [True, False], ids=["words", "data set"])
def test_a_context_of_as_many_vectors_as_the_authors_count_words(clip, say):
    """Of nine tokens that are eight words the last one is not learned; it stands between context and name."""
    words = "a type of pet, a photo of a"
    data = SimpleNamespace(cfg=SimpleNamespace(DATASET=SimpleNamespace(NAME="OxfordPets")))
    given = {"ctx_init": words, "count_words": True, "templates": (f"{words} {{}}.",)}
    learner = ProGrad.compose(data, golden_task(clip), n_ctx=16, **(given if say else {"ctx_init": "data set"}))
    expected = numbers("prograd_words")
    close(learner.bank.ctx.norm(dim=-1), expected["start_norm"])
    close(learner.bank.ctx.flatten()[-256:], expected["start_head"])
    compare("prograd_words", learner, {"prompt_learner.ctx": "bank.ctx"})
    with pytest.raises(ConfigError, match="count_words is True, but then the name stands at the end"):
        Soft(golden_task(clip), ctx_init=words, count_words=True, class_token_position="front")
    with pytest.raises(ConfigError, match="count_words is True, but CTX_INIT has no words"):
        Soft(golden_task(clip), count_words=True)
    with pytest.raises(ConfigError, match="ctx_init is 'a {}.', but must be the words before the class name alone"):
        Soft(golden_task(clip), ctx_init="a {}.")
    with pytest.raises(ConfigError, match="must be the words before the class name alone"):
        Soft(golden_task(clip), ctx_init="a\x07photo")
