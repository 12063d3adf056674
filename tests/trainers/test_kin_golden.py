"""Methods of the kin against the numbers of their authors' code: TCP, PLOT, CLIP-LoRA."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from promptmix.plugins.heads.transport import Transport, sinkhorn
from promptmix.plugins.prompt_bank.low_rank import LowRank, layers_of
from promptmix.plugins.prompt_bank.soft import Soft
from promptmix.plugins.text_supervision.hard_prompts import CosineToHard
from promptmix.trainers.plot import PooledSoft, TransportAndGlobal
from promptmix.trainers.tcp import ClassAware

from promptmix.clip import reference
from promptmix.prompts.heads import Cosine
from promptmix.prompts.learner import Learner
from promptmix.prompts.losses import CrossEntropy
from tests.trainers.golden import close, compare, golden_clip, golden_task, images, numbers, set_learned

LINEAR = [f"meta_net.{layer}.{kind}" for layer in ("linear1", "linear2") for kind in ("weight", "bias")]


@lru_cache(maxsize=1)
def frozen():
    return golden_clip()


def test_tcp():
    task = golden_task(golden_clip(text_layers=12))
    bank = ClassAware(task, 4, 8, "{}, a type of pet.", "a photo of a {}, a type of pet.")
    learner = Learner(task, bank, head=Cosine(task, bank), loss=CrossEntropy() + 8.0 * CosineToHard(task, bank))
    names = {f"prompt_learner.{name}": f"bank.{name}" for name in ("ctx", *LINEAR)}
    terms = compare("tcp", learner, names)
    expected = numbers("tcp")
    close(terms.parts["ce"], expected["ce"])
    close(terms.parts["text"], expected["score"])
    with torch.no_grad():
        close(bank.class_tokens(task.classnames)[0, :, :, :16], expected["class_tokens"])
        close(learner.classifier()[0, :, :64], expected["text_features"])
        close(bank.references(task.classnames)[0, :, :64], expected["hard_features"])


@pytest.mark.parametrize(
    ("case", "kind", "head", "n", "m"),
    [("plot", Soft, Transport, 4, 16), ("plot_imagenet", PooledSoft, TransportAndGlobal, 2, 8)],
)
def test_plot(case, kind, head, n, m):
    task = golden_task(frozen())
    bank = kind(task, m, n_prompts=n)
    learner = Learner(task, bank, head=head(task, bank))
    compare(case, learner, {"prompt_learner.ctx": "bank.ctx"})
    expected = numbers(case)
    with torch.no_grad():
        step = learner.step(images())
        cosines = torch.einsum("bmd,ncd->bcmn", step.tokens, step.text[:n])
        plan = sinkhorn(1 - cosines, 0.1, 100, 0.01).flatten(0, 1)
        close(plan.norm(), expected["plan_norm"])
        close(plan.flatten()[:256], expected["plan_head"])
        # The rule that ends the rounds looks at the whole batch.
        alone = torch.cat([learner.step(images()[i : i + 1]).logits for i in range(3)])
        close(alone, expected["logits_one_by_one"])


def test_transport_moves_all_mass_evenly():
    torch.manual_seed(0)
    plan = sinkhorn(torch.rand(2, 3, 7, 4), 0.1, 100, 1e-6)
    assert torch.allclose(plan.sum(dim=-1), torch.full((2, 3, 7), 1 / 7), atol=1e-4)
    assert torch.allclose(plan.sum(dim=-2), torch.full((2, 3, 4), 1 / 4), atol=1e-4)


MATRICES = {f"{letter}_proj": letter for letter in "qkv"}
FACTORS = {
    f"{prefix}transformer.resblocks.{i}.attn.{theirs}.w_lora_{side}": f"bank.factors.{tower}_{i}_{ours}_{side}"
    for tower, prefix in (("text", ""), ("visual", "visual."))
    for i in range(3)
    for theirs, ours in MATRICES.items()
    for side in "AB"
}


def clip_lora(dropout: float = 0.0) -> Learner:
    task = golden_task(frozen())
    bank = LowRank(task, dropout=dropout)
    return Learner(task, bank, head=Cosine(task, bank, scale=100.0))


def test_clip_lora():
    learner = clip_lora()
    expected = numbers("clip_lora")
    with torch.no_grad():
        close(learner.step(images()).logits, expected["zeroshot_logits"])  # B starts at zero
    compare("clip_lora", learner, FACTORS)
    learner.eval()
    with torch.no_grad():
        close(learner.step(images()).logits / 100, expected["merged_cosines"])


def test_low_rank_branches_are_the_merged_weights_and_drop_in_training_only(monkeypatch):
    learner = clip_lora(dropout=0.25)
    set_learned("clip_lora", learner, FACTORS)
    with torch.no_grad():
        dropped = [learner.train().step(images()).logits for _ in range(2)]
        assert not torch.equal(*dropped)
        merged = learner.eval().step(images()).logits
        assert torch.equal(merged, learner.step(images()).logits)
        learner.train()
        monkeypatch.setattr(torch.nn.functional, "dropout", lambda x, p: x)
        assert torch.allclose(learner.step(images()).logits, merged, atol=2e-3)


def test_low_rank_text_tower_shares_its_prefix_exactly():
    learner = clip_lora()
    set_learned("clip_lora", learner, FACTORS)
    tower, bank = frozen().text, learner.bank
    prompts = tower.compose_text(bank.template, learner.task.classnames)
    with torch.no_grad():
        ours = tower(prompts, weights=bank.weights("text"))
        plain = reference.encode_plain(tower, prompts, weights=bank.weights("text"))
    assert torch.allclose(ours, plain, atol=1e-4)


def test_positions_follow_the_depth():
    assert layers_of("top3", 12) == [9, 10, 11]
    assert layers_of("bottom", 12) == [0, 1, 2, 3]
    assert layers_of("mid", 12) == [4, 5, 6, 7]
    assert layers_of("up", 12) == [8, 9, 10, 11]
    assert layers_of("half-up", 12) == [6, 7, 8, 9, 10, 11]
    assert layers_of("top1", 4) == [3]
