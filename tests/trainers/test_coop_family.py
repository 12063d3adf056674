"""The CoOp family and the generic mixture: ProGrad's projection, CoCoOp's cost, and what the components compute."""

from __future__ import annotations

import math
from types import SimpleNamespace

import open_clip
import pytest
import torch
import torch.nn.functional as F
from promptmix.plugins.router.noisy import chance_of_choice, variation
from promptmix.trainers.prograd import project
from torch.utils.flop_counter import FlopCounterMode

from promptmix.clip import CLIP, Tokenizer
from promptmix.config import get_cfg, merge_file, merge_opts, validate
from promptmix.engine import build_trainer, set_random_seed
from promptmix.errors import ConfigError
from promptmix.plugin_manager import get_plugin_manager
from promptmix.prompts.learner import Learner
from promptmix.prompts.losses import CrossEntropy
from promptmix.prompts.roles import Task
from promptmix.prompts.templates import IMAGENET_80
from promptmix.registry import DISTILLER_REGISTRY, PROMPT_BANK_REGISTRY, ROUTER_REGISTRY, TEXT_SUPERVISION_REGISTRY

WIDTH, JOINT = 64, 32
NAMES = tuple(
    f"{kind} {thing}"
    for kind in ("red", "old", "small", "sea", "toy")
    for thing in ["bus", "cat", "dog", "fox", "hen", "jar", "key", "log", "owl", "pig"]
)
GROUPS = (("a photo of a {}.", "a picture of a {}."), ("a drawing of a {}.",), ("{} at night.",))


def small_task(classes: int = 50) -> Task:
    """A small random CLIP with the real vocabulary and context length, and ``classes`` class names."""
    get_plugin_manager()
    torch.manual_seed(0)
    model = open_clip.CLIP(
        embed_dim=JOINT,
        vision_cfg={"layers": 1, "width": 64, "head_width": 32, "patch_size": 16, "image_size": 32},
        text_cfg={"context_length": 77, "vocab_size": 49408, "width": WIDTH, "heads": 2, "layers": 3},
    )
    clip = CLIP(model, Tokenizer(), "small", mean=(0.5,) * 3, std=(0.5,) * 3, image_size=32)
    names = NAMES[:classes]
    return Task(clip, names, names, tuple(template for group in GROUPS for template in group), GROUPS)


def unit(*shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape), dim=-1)


@pytest.fixture(scope="module")
def task() -> Task:
    return small_task(6)


def made_step(**parts):
    """The parts of a step that one component reads."""
    parts.setdefault("query", parts.get("image"))
    parts.setdefault("frozen_image", parts["query"])
    return SimpleNamespace(**parts)


def bank_of(task: Task, name: str = "Soft", **settings):
    return PROMPT_BANK_REGISTRY.get(name)(task, **settings)


# ProGrad


def test_projection_takes_out_the_conflict():
    torch.manual_seed(1)
    general = torch.randn(1, 4, 8)
    agreeing = general + 0.1 * torch.randn(1, 4, 8)
    assert torch.equal(project(agreeing, general), agreeing)
    conflicting = -agreeing
    aligned = project(conflicting, general)
    assert torch.sum(aligned * general).item() == pytest.approx(0, abs=1e-5)
    part = conflicting - aligned  # along the general direction
    assert F.cosine_similarity(part.flatten(), -general.flatten(), dim=0).item() == pytest.approx(1, abs=1e-5)
    half = project(conflicting, general, 0.5)
    assert torch.allclose(half, conflicting - 0.5 * part, atol=1e-6)
    assert torch.equal(project(conflicting, general, 0.0), conflicting)
    assert torch.allclose(project(conflicting, 1e4 * general), aligned, atol=1e-5)  # only the direction counts
    assert torch.equal(project(conflicting, torch.zeros_like(general)), conflicting)


def emoji(*files: str, opts: tuple[str, ...] = ()):
    cfg = get_cfg()
    for file in files:
        merge_file(cfg, file)
    merge_opts(cfg, ["VERBOSE", "False", "DATASET.NUM_SHOTS", "1", "DATALOADER.TRAIN_X.BATCH_SIZE", "6", *opts])
    validate(cfg)
    set_random_seed(3)
    return build_trainer(cfg)


def test_prograd_steps_along_the_projected_gradient():
    trainer = emoji(
        "configs/trainers/ProGrad/tiny.yaml",
        opts=("OPTIM.LR", "0.5", "OPTIM.MOMENTUM", "0.0", "OPTIM.WEIGHT_DECAY", "0.0", "TRAINER.PROGRAD.N_CTX", "16"),
    )
    ctx = trainer.model.bank.ctx
    assert ctx.shape[:2] == (1, 16)
    assert not ctx[0, :12].any()  # the words "a photo of a" fill the last four vectors
    with torch.no_grad():
        ctx.add_(0.3 * torch.randn_like(ctx))
    batch = next(iter(trainer.train_loader_x))
    trainer.num_batches, trainer.batch_idx = 10, 0
    features = trainer.encode_images(batch["img"])
    logits = trainer.model.logits(features, trainer.model.classifier())
    teacher = trainer.clip.ensemble(trainer.node.TEMPLATES, trainer.model.task.classnames)
    taught = (trainer.clip.scale * features @ teacher.T).softmax(dim=-1)
    (specific,) = torch.autograd.grad(F.cross_entropy(logits, batch["label"]), ctx, retain_graph=True)
    # The authors' form, without the teacher's entropy.
    (general,) = torch.autograd.grad(-(taught * logits.log_softmax(dim=-1)).sum(dim=1).mean(), ctx)
    expected, before = project(specific, general), ctx.detach().clone()
    rate = trainer.get_current_lr()
    summary = trainer.forward_backward(batch)
    assert torch.allclose(ctx.grad, expected, rtol=1e-4, atol=1e-4 * expected.abs().max())
    assert torch.allclose(before - rate * expected, ctx, atol=1e-6)
    assert summary["loss"].item() == pytest.approx(F.cross_entropy(logits, batch["label"]).item(), rel=1e-5)
    assert summary["kl"] > 0


def test_prograd_refuses_more_words_than_vectors():
    with pytest.raises(ConfigError, match="N_CTX is 2, but CTX_INIT 'a photo of a' has 4 tokens"):
        emoji("configs/trainers/ProGrad/tiny.yaml", opts=("TRAINER.PROGRAD.N_CTX", "2"))


# CoCoOp


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


# The generic mixture


@pytest.mark.parametrize("method", ["KgCoOp", "MoPD", "MoCoOp"])
def test_mixture_in_yaml_is_the_method(method):
    # The quick start has its own text weight for MoCoOp; the mixture states the paper's.
    paper = ("TRAINER.MOCOOP.TEXT_WEIGHT", "5.0") if method == "MoCoOp" else ()
    theirs = emoji(f"configs/trainers/{method}/tiny.yaml", opts=paper)
    ours = emoji(f"configs/trainers/Mixture/{method.lower()}.yaml")
    assert type(ours).__name__ == "Mixture"
    batch = next(iter(theirs.train_loader_x))
    for trainer in (theirs, ours):
        trainer.num_batches, trainer.batch_idx = 2, 0
    for _ in range(3):
        expected, found = theirs.forward_backward(batch), ours.forward_backward(batch)
        assert found["loss"].item() == pytest.approx(expected["loss"].item(), rel=1e-6)
    assert list(ours.model.state_dict()) == list(theirs.model.state_dict())


@pytest.mark.parametrize("name", ["mocoop_mopd", "noisy_experts", "conditional_experts", "deep_experts", "tiny"])
def test_unpublished_combinations_learn(name):
    trainer = emoji(f"configs/trainers/Mixture/{name}.yaml", opts=("OPTIM.LR", "0.02", "OPTIM.WARMUP_EPOCH", "-1"))
    batch = next(iter(trainer.train_loader_x))
    trainer.num_batches, trainer.batch_idx = 10, 0
    losses = []
    for _ in range(5):
        trainer.set_model_mode("eval")  # without the noise of a router
        with torch.no_grad():
            losses.append(trainer.model.loss(trainer.model.step(batch["img"], batch["label"])).total.item())
        trainer.set_model_mode("train")
        trainer.forward_backward(batch)
    learned = [parameter for parameter in trainer.model.parameters() if parameter.numel()]
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in learned)
    assert losses[-1] < losses[0]
    with torch.no_grad():
        assert trainer.model_inference(batch["img"]).shape == (len(batch["label"]), trainer.num_classes)


def test_mixture_refuses_what_nobody_reads():
    with pytest.raises(ConfigError, match="DISTILL_WEIGHT .* DISTILLER.NAME names no part"):
        emoji("configs/trainers/Mixture/kgcoop.yaml", opts=("TRAINER.MIXTURE.DISTILL_WEIGHT", "0.5"))
    with pytest.raises(ConfigError, match="PROMPT_BANK.NAME is 'none'"):
        emoji("configs/trainers/Mixture/tiny.yaml", opts=("PROMPT_BANK.NAME", "none"))


@pytest.mark.parametrize("router", ["HardPromptTopK", "TopK", "NoisyTopK", "Soft", "Uniform", "none"])
@pytest.mark.parametrize(
    ("bank", "settings"), [("Soft", {"n_prompts": 3}), ("TemplateGroups", {}), ("InstanceConditional", {"n_prompts": 3})]
)
def test_every_bank_with_every_router(task, bank, settings, router):
    experts = bank_of(task, bank, **settings)
    routes = None if router == "none" else ROUTER_REGISTRY.get(router)(task, experts)
    learner = Learner(task, experts, routes, loss=CrossEntropy() + DISTILLER_REGISTRY.get("ZeroshotKL")(task, experts))
    terms = learner.loss(learner.step(unit(4, JOINT), torch.tensor([0, 1, 2, 5])))
    terms.total.backward()
    assert terms.logits.shape == (4, 6)
    assert all(parameter.grad is not None for parameter in learner.parameters() if parameter.numel())


# Routers


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


# Text supervision and distillers


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
