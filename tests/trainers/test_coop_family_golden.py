"""CoCoOp, KgCoOp and MoPD against the numbers of their authors' code."""

from __future__ import annotations

import pytest
import torch

from promptmix.plugin_manager import get_plugin_manager
from promptmix.prompts.learner import Mixture
from promptmix.registry import DISTILLER_REGISTRY, PROMPT_BANK_REGISTRY, TEXT_SUPERVISION_REGISTRY
from tests.trainers.golden import close, compare, golden_clip, golden_task, images, labels, numbers

MEDIA = ("photo", "picture", "image")
EUROSAT_1 = ("a centered satellite photo of {}.",)
EUROSAT_12 = tuple(f"a centered satellite {medium} of {{}}." for medium in MEDIA) + tuple(
    f"a centered satellite {medium}, {verb} as {{}}." for medium in MEDIA for verb in ("classified", "categorized", "labeled")
)
META_NET = {
    f"prompt_learner.meta_net.{layer}.{kind}": f"bank.meta_net.{layer}.{kind}"
    for layer in ("linear1", "linear2")
    for kind in ("weight", "bias")
}


@pytest.fixture(scope="module")
def clip():
    get_plugin_manager()
    return golden_clip()


def soft(task):
    return PROMPT_BANK_REGISTRY.get("Soft")(task, n_ctx=4)


def cocoop(clip, **settings):
    task = golden_task(clip)
    return Mixture(task, PROMPT_BANK_REGISTRY.get("InstanceConditional")(task, n_ctx=4, **settings))


def kgcoop(clip):
    task = golden_task(clip, templates=EUROSAT_1)
    bank = soft(task)
    return Mixture(task, bank, supervision=TEXT_SUPERVISION_REGISTRY.get("CosineToHard")(task, bank), text_weight=8.0)


def mopd(clip):
    task = golden_task(clip, templates=EUROSAT_12)
    bank = soft(task)
    distiller = DISTILLER_REGISTRY.get("GatedHardPrompts")(task, bank, k=2, mpd_weight=0.5, mps_weight=0.1)
    return Mixture(task, bank, distiller=distiller, ce_weight=0.5)


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


def test_mopd(clip):
    learner = mopd(clip)
    compare("mopd", learner, {"prompt_learner.ctx": "bank.ctx", "prompt_learner.gate": "distiller.gate"})
    expected = numbers("mopd")
    with torch.no_grad():
        features = learner.encode_images(images())
        logits = learner.logits(features, learner.classifier())
        for ours, name in zip(learner.distiller.terms(features, logits, labels()), ("mpd", "mps"), strict=True):
            close(ours, expected[name])
        assert learner.distiller.route(features).experts.tolist() == expected["kept"].astype(int).tolist()


@pytest.mark.parametrize("build", [cocoop, kgcoop, mopd])
def test_short_training_equals_the_plain_tower(build, monkeypatch):
    """Five SGD steps through the prefix-shared tower and through the plain one end at the same loss, and learn."""
    finals = []
    for plain in (False, True):
        clip = golden_clip()
        monkeypatch.setattr(clip.text, "shares_prefix", not plain)
        torch.manual_seed(0)
        learner = build(clip)
        optimizer = torch.optim.SGD(learner.parameters(), lr=0.05, momentum=0.9)
        features = learner.encode_images(images())
        losses = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = learner.loss(features, labels()).total
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        finals.append(losses[-1])
    assert finals[0] == pytest.approx(finals[1], rel=1e-3)
