"""Experts of the image tower: each picture goes through those it chose alone, and heads over patches take them."""

from __future__ import annotations

import pytest
import torch
from promptmix.plugins.heads.transport import Transport
from torch.utils.flop_counter import FlopCounterMode

from promptmix.errors import ConfigError
from promptmix.prompts.learner import Learner
from tests.trainers.toy import first_step, three_layers, toy_trainer

#: Prompts in the first two layers of three.
LOW = {
    "IndependentDeep": [f"PROMPT_BANK.INDEPENDENTDEEP.PROMPT_DEPTH_{tower}" for tower in ("TEXT", "VISION")],
    "CoupledDeep": ["PROMPT_BANK.COUPLEDDEEP.PROMPT_DEPTH"],
}


def mixture(room, bank, head, k, *opts):
    low = [part for key in LOW[bank] for part in (key, 2)]
    experts = (f"PROMPT_BANK.{bank.upper()}.N_PROMPTS", 4, "ROUTER.NAME", "TopK", "ROUTER.TOPK.K", k, "HEAD.NAME", head)
    return toy_trainer(
        room, "Mixture", "PROMPT_BANK.NAME", bank, *experts, *low, *three_layers(room), "OPTIM.WEIGHT_DECAY", 0.01, *opts
    )


@pytest.mark.parametrize(
    ("bank", "head", "text"),
    [
        ("IndependentDeep", "WeightedScores", "none"),
        ("CoupledDeep", "WeightedScores", "CosineToHard"),  # which needs all experts' text
        ("CoupledDeep", "Transport", "none"),
    ],
)
def test_pictures_go_through_the_experts_they_chose_alone(room, bank, head, text):
    flops, losses, learned = [], [], []
    for sparse in (False, True):
        trainer = mixture(room, bank, head, 1, "TEXT_SUPERVISION.NAME", text, "MODEL.SPARSE_EXPERTS", sparse)
        assert trainer.model.skips_images is sparse
        encoded = []
        trainer.clip.image.register_forward_pre_hook(lambda _, args, encoded=encoded: encoded.append(len(args[0])))
        with FlopCounterMode(display=False) as counter:
            losses += [first_step(trainer)["loss"] for _ in range(2)]  # momentum and weight decay too
        assert sum(encoded) == 2 * (4 + (4 if sparse else 4 * 4))  # the frozen tower's first
        flops.append(counter.get_total_flops())
        learned.append(dict(trainer.model.named_parameters()))
    torch.testing.assert_close(losses[2:], losses[:2], rtol=1e-5, atol=1e-5)
    for name, value in learned[0].items():
        torch.testing.assert_close(learned[1][name], value, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(learned[1][name].grad, value.grad, rtol=1e-3, atol=1e-5)
    assert flops[1] < 0.5 * flops[0]


@torch.no_grad()
@pytest.mark.parametrize(("bank", "head", "k"), [("IndependentDeep", "WeightedScores", 1), ("CoupledDeep", "Transport", 2)])
def test_evaluation_encodes_pictures_by_the_experts_they_chose_alone(room, bank, head, k):
    # A loss that looks at all experts' pictures keeps training dense, and evaluation does not ask for losses.
    trainer = mixture(room, bank, head, k, "DISTILLER.NAME", "FrozenImageL1" if head == "WeightedScores" else "none")
    trainer.set_model_mode("eval")
    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    frozen = trainer.clip.encode_image(images)
    trainer.model.router.gate.weight.copy_(100 * (frozen - frozen.mean(dim=0))[:4])  # the first pictures go their own ways
    encoded = []
    trainer.clip.image.register_forward_pre_hook(lambda _, args: encoded.append(len(args[0])))
    found, seen = [], []
    for sparse in (False, True):
        trainer.model.sparse_experts = sparse
        with trainer._evaluating("test"):
            found.append(trainer.model_inference(images))
            seen.append(trainer.kept_beside_scores())
    assert sum(encoded[:5]) == 5 * 6 and sum(encoded[5:]) == (1 + k) * 6  # the frozen tower's first
    assert max(encoded[6:]) < 6
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-6)
    assert all(torch.equal(seen[1][name], seen[0][name]) for name in ("expert", "expert_weight", "router_logit"))


def test_a_loss_on_every_experts_pictures_keeps_all_of_them(room):
    assert not mixture(room, "IndependentDeep", "WeightedScores", 1, "DISTILLER.NAME", "FrozenImageL1").model.skips_images
    assert mixture(room, "IndependentDeep", "WeightedScores", 1, "DISTILLER.NAME", "ZeroshotKL").model.skips_images


@torch.no_grad()
def test_transport_moves_each_experts_patches_to_its_own_prompt(room):
    model = mixture(room, "IndependentDeep", "Transport", 2).model.eval()
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    step = model.step(images)
    wanted = torch.zeros(3, len(model.task.classnames))
    for expert, schedule in enumerate(model.bank.visual()):
        _, patches = model.clip.encode_both(images, schedule)
        scores = model.clip.scale * (patches @ step.text[expert].T).mean(dim=1)  # one prompt: every patch counts alike
        wanted += step.routing.dense[:, expert, None] * scores
    assert step.tokens.shape == (3, 4, 16, model.clip.embed_dim)
    torch.testing.assert_close(step.logits, wanted, rtol=1e-4, atol=1e-4)
    features = model.encode_images(images)
    assert features.shape == (3, 1 + 4 * (1 + 16), model.clip.embed_dim)
    torch.testing.assert_close(model.logits(features, model.classifier()), step.logits)
    assert model.expert_names == ("1", "2", "3", "4")
    both = torch.tensor([[0.5, 0.5, 0.0, 0.0]]).expand(3, -1)
    assert model.weighed(features, model.classifier(), both).isfinite().all()


def test_patches_and_images_mixed_with_frozen_ones_are_refused(room):
    bank = toy_trainer(room, "HiCroPL").model.bank
    with pytest.raises(ConfigError, match="Transport reads patches, and Hierarchical mixes features of whole images alone"):
        Learner(bank.task, bank, head=Transport(bank.task, bank))
