"""TPT: the authors' numbers on seeded views, what a picture's views follow from, and runs that learn nothing."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
import torch
from PIL import Image
from promptmix.plugins.prompt_bank.soft import Soft
from promptmix.trainers.tpt import MarginalEntropy, confident

from promptmix.cost.estimate import estimate
from promptmix.data.reading.views import Views
from promptmix.engine.convert import read, write_ours
from promptmix.errors import ConfigError, UserError
from promptmix.predict import load
from promptmix.prompts.heads import Cosine
from promptmix.prompts.step import Step
from promptmix.prompts.testtime import TestTimeLearner
from promptmix.runs.run import run
from tests.trainers.golden import close, golden_clip, golden_task, numbers, seeded
from tests.trainers.toy import scores, toy_cfg, toy_trainer

CASE = "tpt"
FEW = ("TRAINER.TPT.VIEWS", 4, "TRAINER.TPT.KEEP", 0.5)


@lru_cache(maxsize=1)
def frozen():
    return golden_clip()


def tpt(steps=1, keep=0.3, lr=0.005):
    task = golden_task(frozen())
    bank = Soft(task, n_ctx=4)
    with torch.no_grad():
        bank.ctx.copy_(torch.from_numpy(seeded().learned(CASE, "prompt_learner.ctx", (4, 512)))[None])
    return TestTimeLearner(
        task,
        bank,
        MarginalEntropy(),
        lambda tuned: torch.optim.AdamW(tuned, lr=lr, weight_decay=0.01),
        steps,
        lambda step: confident(step, keep),
        Cosine(task, bank),
    ).eval()


def views():
    return torch.from_numpy(seeded().stream(f"{CASE}/views", (16, 3, 64, 64)))


def test_one_step_on_a_picture():
    learner, expected = tpt(), numbers(CASE)
    features = learner.features(views()[None])
    assert features.shape == (1, 16, 512)
    ctx = learner.bank.ctx.detach().clone().requires_grad_()
    step = learner._scores(features[0], {"ctx": ctx})
    close(step.logits, expected["view_logits"])
    logs = step.logits.detach().log_softmax(dim=-1)
    close(-(logs.exp() * logs).sum(dim=-1), expected["entropies"])
    chosen = confident(step, 0.3)
    assert chosen.tolist() == expected["selected"].astype(int).tolist()
    loss = learner.loss(Step(learner, None, features=features[0, chosen], text=step.text)).total
    close(loss, expected["loss"])
    loss.backward()
    close(ctx.grad.norm(), expected["gradnorm:prompt_learner.ctx"])
    norm = float(expected["gradnorm:prompt_learner.ctx"])
    close(ctx.grad.flatten()[:256], expected["gradhead:prompt_learner.ctx"], scale=norm)
    start = learner.bank.ctx.clone()
    tuned = learner.tune(features[0])["ctx"]
    large = np.abs(expected["gradhead:prompt_learner.ctx"]) > 1e-3 * norm  # the first step is near lr * sign(gradient)
    assert large.sum() > 200
    close(tuned.flatten()[:256][torch.from_numpy(large)], expected["stepped_head"][large])
    with torch.no_grad():
        close(learner.logits(features, learner.classifier()), expected["logits"])
        close(tpt(steps=0).logits(features, None), expected["logits_before"])
    assert torch.equal(learner.bank.ctx, start) and learner.bank.ctx.grad is None


def test_more_steps_keep_the_first_choice_of_views():
    """The same as tuning by hand on the views chosen at the start."""
    learner = tpt(steps=3, lr=0.05)
    features = learner.features(views()[None])[0]
    ctx = learner.bank.ctx.detach().clone().requires_grad_()
    chosen = confident(learner._scores(features, {"ctx": ctx}), 0.3)
    optimizer = torch.optim.AdamW([ctx], lr=0.05, weight_decay=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        text = learner.bank.__class__.forward(_with(learner.bank, ctx), learner.task.classnames)[0]
        p = (learner.clip.scale * features[chosen] @ text.T).softmax(dim=-1).mean(dim=0)
        (-(p * p.log()).sum()).backward()
        optimizer.step()
    assert not torch.equal(confident(learner._scores(features, {"ctx": ctx.detach()}), 0.3), chosen)
    torch.testing.assert_close(learner.tune(features)["ctx"], ctx, rtol=1e-3, atol=1e-4)


def _with(bank, ctx):
    other = Soft(bank.task, n_ctx=4)
    other._parameters["ctx"] = ctx
    return other


@pytest.mark.parametrize("kind", ["crops", "augmix"])
def test_views_follow_from_seed_and_pixels_alone(room, kind):
    cfg = toy_cfg(room, "TPT", *FEW)
    pixels = np.random.RandomState(0).randint(0, 255, (40, 30, 3)).astype(np.uint8)
    picture, other = Image.fromarray(pixels), Image.fromarray(255 - pixels)
    make = Views(cfg, 6, kind)
    np.random.seed(5), torch.manual_seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    found = make(picture)
    assert torch.equal(torch.get_rng_state(), before[0]) and np.random.get_state()[1].tolist() == before[1]
    np.random.seed(6), torch.manual_seed(6)
    make(other)
    assert torch.equal(make(picture), found) and found.shape == (6, 3, 32, 32)
    assert torch.equal(found[0], make.plain(picture))
    assert len({row.numpy().tobytes() for row in found}) == 6
    cfg.SEED = 2
    again = Views(cfg, 6, kind)
    assert not torch.equal(again(picture)[1:], found[1:]) and torch.equal(again(picture)[0], found[0])
    assert repr(again) != repr(make) and " at 0x" not in repr(make)


def test_crops_and_augmix_have_the_same_crops(room):
    """AugMix is a mixture of a crop with changes of it, so that its values lie within those of pictures."""
    cfg = toy_cfg(room, "TPT")
    picture = Image.fromarray(np.random.RandomState(0).randint(0, 255, (40, 30, 3)).astype(np.uint8))
    low, high = (Views(cfg, 2, "crops").to_tensor(Image.new("RGB", (4, 4), (v, v, v))).amin((1, 2)) for v in (0, 255))
    for view in Views(cfg, 30, "augmix")(picture)[1:]:
        assert (view.amin((1, 2)) >= low - 1e-4).all() and (view.amax((1, 2)) <= high + 1e-4).all()


def test_a_run_tests_and_keeps_the_start(room, tmp_path):
    cfg = toy_cfg(
        room, "TPT", *FEW, "OUTPUT_DIR", str(tmp_path / "run"), "MODEL.BACKBONE.WEIGHTS", str(room / "clip.safetensors")
    )
    result = run(cfg)
    assert 0 <= result.metrics["test"]["accuracy"] <= 100 and result.learned_parameters == 0
    again = run(toy_cfg(room, "TPT", *FEW, "OUTPUT_DIR", str(tmp_path / "other"), "DATALOADER.TEST.BATCH_SIZE", 1))
    assert again.metrics == result.metrics
    more = toy_cfg(room, "TPT", *FEW, "OUTPUT_DIR", str(tmp_path / "more"), "TRAINER.TPT.STEPS", 2)
    later = run(more, eval_only=True, model_dir=str(tmp_path / "run"))  # how a test learns is the evaluation's to say
    assert later.config["TRAINER"]["TPT"]["STEPS"] == 2
    predictor = load(tmp_path / "run", weights=room / "clip.safetensors")
    path = next((room / "toy").glob("test-*.png"))
    (found,) = predictor.predict(str(path), ["owl", "bus", "tree", "cat"])
    assert sum(found.probabilities) == pytest.approx(1, abs=1e-4)


def test_starts_from_a_prompt_of_coop(room, tmp_path):
    source = ["TRAINER.COOP.N_CTX", 16, "OPTIM.MAX_EPOCH", 1, "OUTPUT_DIR", str(tmp_path / "coop")]
    coop = toy_trainer(room, "CoOp", *source)
    coop.train()
    write_ours(read(tmp_path / "coop"), tmp_path / "converted")
    files = (tmp_path / "coop/prompt_learner/model.pth.tar-1", tmp_path / "converted/prompt_learner/model.safetensors")
    for file in files:
        prompt = ["TRAINER.TPT.CTX_INIT", "", "TRAINER.TPT.N_CTX", 16, "TRAINER.TPT.STEPS", 0, "MODEL.INIT_WEIGHTS", str(file)]
        subject = toy_trainer(room, "TPT", *FEW, *prompt)
        assert torch.equal(subject.model.bank.ctx, coop.model.bank.ctx)
        torch.testing.assert_close(scores(subject), scores(coop), rtol=1e-4, atol=1e-4)  # no step: CoOp's own scores


def test_views_that_none_is_left_of_are_refused(room):
    with pytest.raises(ConfigError, match=r"TRAINER.TPT.KEEP is 0.1, but of 4 views not one is left"):
        toy_trainer(room, "TPT", "TRAINER.TPT.VIEWS", 4)


def test_imagenet_has_crops_and_others_augmix(room):
    subject = toy_trainer(room, "TPT")
    assert subject.test_transform().kind == "augmix"
    subject.cfg.defrost()
    subject.cfg.DATASET.NAME = "ImageNetV2"
    assert subject.test_transform().kind == "crops"
    subject.cfg.TRAINER.TPT.VIEW_KIND = "augmix"
    assert subject.test_transform().kind == "augmix"


def test_has_no_step_to_estimate(room):
    with pytest.raises(UserError, match="TPT learns nothing by steps of a training"):
        estimate(toy_trainer(room, "TPT"))
