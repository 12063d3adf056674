"""ProGrad's projection, and the generic mixture in YAML."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from promptmix.plugins.router.topk import HardPromptTopK
from promptmix.trainers.prograd import project

from promptmix.config import get_cfg, merge_file, merge_opts, validate
from promptmix.engine import build_trainer, set_random_seed
from promptmix.errors import ConfigError
from promptmix.registry import TRAINER_REGISTRY, name_of
from tests.trainers.toy import toy_trainer

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
    for _ in range(2):
        expected, found = theirs.forward_backward(batch), ours.forward_backward(batch)
        assert found["loss"].item() == pytest.approx(expected["loss"].item(), rel=1e-6)
    assert list(ours.model.state_dict()) == list(theirs.model.state_dict())


@pytest.mark.parametrize("name", ["mocoop_mopd", "noisy_experts", "conditional_experts", "deep_experts", "tiny"])
def test_unpublished_combinations_learn(name):
    trainer = emoji(f"configs/trainers/Mixture/{name}.yaml", opts=("OPTIM.LR", "0.02", "OPTIM.WARMUP_EPOCH", "-1"))
    batch = next(iter(trainer.train_loader_x))
    trainer.num_batches, trainer.batch_idx = 10, 0
    losses = []
    for _ in range(3):
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


def test_default_parts_go_by_class_or_by_name(room, monkeypatch):
    method = TRAINER_REGISTRY.get("MoCoOp")
    names = {role: name_of(part) for role, part in method.roles.items()}
    assert names == {"PROMPT_BANK": "TemplateGroups", "ROUTER": "HardPromptTopK", "TEXT_SUPERVISION": "GroupedContrastive"}
    monkeypatch.setattr(method, "roles", names)
    assert isinstance(toy_trainer(room, "MoCoOp").model.router, HardPromptTopK)
