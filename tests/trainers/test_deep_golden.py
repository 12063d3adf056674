"""Deep prompts against the numbers of their authors' code, and their checks."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from promptmix.plugins.distillation.frozen_image import FrozenImageL1
from promptmix.plugins.distillation.zeroshot_kl import ZeroshotKL
from promptmix.plugins.prompt_bank.coupled_deep import CoupledDeep
from promptmix.plugins.prompt_bank.independent_deep import IndependentDeep
from promptmix.plugins.text_supervision.hard_prompts import L1ToEnsemble
from promptmix.trainers.mpl import ModularPrompts
from promptmix.trainers.pmpo import PartitionedPrompts, block_of
from promptmix.trainers.vpt import HardWithVision

from promptmix.data.templates import IMAGENET_60
from promptmix.prompts.average import GaussianAverage
from promptmix.prompts.deep import TextPrompts, VisionPrompts
from promptmix.prompts.heads import Cosine
from promptmix.prompts.learner import Learner
from promptmix.prompts.losses import CrossEntropy
from tests.trainers.golden import close, compare, golden_clip, golden_task, images, labels, numbers, set_learned

DEPTH = 3
INDEPENDENT = {
    "prompt_learner.ctx": "bank.text.ctx",
    "image_encoder.VPT": "bank.vision.layers.0",
    **{f"image_encoder.transformer.resblocks.{i}.VPT_shallow": f"bank.vision.layers.{i}" for i in (1, 2)},
    **{f"text_encoder.transformer.resblocks.{i}.VPT_shallow": f"bank.text.deeper.{i - 1}" for i in (1, 2)},
}
KINDS = ("weight", "bias")
TEXT = {
    "prompt_learner.ctx": "bank.text.ctx",
    **{f"prompt_learner.compound_prompts_text.{i}": f"bank.text.deeper.{i}" for i in (0, 1)},
}
NAMES = {
    "vpt": {theirs: ours for theirs, ours in INDEPENDENT.items() if theirs.startswith("image_encoder")},
    "ivlp": INDEPENDENT,
    "promptsrc": INDEPENDENT,
    "maple": {
        **TEXT,
        **{f"prompt_learner.proj.{kind}": f"bank.couple.0.{kind}" for kind in KINDS},
        **{
            f"prompt_learner.compound_prompt_projections.{i}.{kind}": f"bank.couple.{i + 1}.{kind}"
            for i in (0, 1)
            for kind in KINDS
        },
    },
    "mpl": {
        **TEXT,
        **{f"prompt_learner.proj.{kind}": f"bank.couple.{kind}" for kind in KINDS},
        **{
            f"prompt_learner.txt2img_proj.{group}.{layer}.{kind}": f"bank.add.{layer}.{group}.{kind}"
            for group in (0, 1)
            for layer in (0, 1)
            for kind in KINDS
        },
    },
}


def text_prompts(task, n_ctx, fixed, depth=DEPTH):
    tower = task.clip.text
    return TextPrompts(task, torch.zeros(n_ctx, tower.width).normal_(std=0.02), tower.tokenizer.encode(fixed), depth)


@lru_cache(maxsize=1)
def frozen():
    return golden_clip()


def build(case, templates=IMAGENET_60):
    task = golden_task(frozen())
    depths = {"prompt_depth_vision": DEPTH, "prompt_depth_text": DEPTH}
    banks = {
        "ivlp": lambda: IndependentDeep(task, **depths),
        "promptsrc": lambda: IndependentDeep(task, **depths),
        "maple": lambda: CoupledDeep(task, prompt_depth=DEPTH),
        "mpl": lambda: ModularPrompts(task, text_prompts(task, 1, "a photo of a"), 2, 1),
        "vpt": lambda: HardWithVision(task, "a photo of a {}.", VisionPrompts(task.clip.image.width, 4, DEPTH)),
        "pmpo": lambda: PartitionedPrompts(
            task, TextPrompts(task, torch.zeros(2, 2, task.clip.text.width).normal_(std=0.02), (), 2), DEPTH
        ),
    }
    bank = banks[case]()
    loss = CrossEntropy()
    if case == "promptsrc":
        loss += 25.0 * L1ToEnsemble(task, bank, templates).named("text_l1", weighted=True)
        loss += 10.0 * FrozenImageL1(task, bank).named("image_l1", weighted=True)
        loss += ZeroshotKL(task, bank, templates, raw=True, over_classes=True).named("logit_kl")
    return Learner(task, bank, head=Cosine(task, bank), loss=loss)


@pytest.mark.parametrize("case", list(NAMES))
def test_golden(case):
    learner = build(case)
    terms = compare(case, learner, NAMES[case])
    expected = numbers(case)
    ours = dict(learner.named_parameters())
    for theirs, our in NAMES[case].items():
        # The sum cancels, so its error is measured by the norm.
        close(ours[our].grad.sum(), expected[f"gradsum:{theirs}"], scale=float(expected[f"gradnorm:{theirs}"]))
    for name, part in terms.parts.items():
        close(part, expected[name])
    assert set(terms.parts) == ({"ce", "text_l1", "image_l1", "logit_kl"} if case == "promptsrc" else set())


def test_template_ensemble_is_the_authors():
    expected = torch.from_numpy(numbers("promptsrc")["fixed_embeddings"])
    close(build("promptsrc").losses.text_l1.hard, torch.nn.functional.normalize(expected, dim=-1).numpy())


@pytest.mark.parametrize("case", ["ivlp", "promptsrc", "maple", "mpl", "pmpo"])
def test_short_training_equals_the_plain_tower(case, monkeypatch):
    """Two SGD steps through the prefix-shared tower and through the plain one have the same losses, and learn."""
    runs = []
    for shared in (True, False):
        torch.manual_seed(0)
        learner = build(case, IMAGENET_60[:2])
        monkeypatch.setattr(frozen().text, "shares_prefix", shared)
        if case in NAMES:
            set_learned(case, learner, NAMES[case])
        runs.append(train(learner, 2))
        monkeypatch.undo()
    assert runs[0][-1] < runs[0][0]
    assert runs[0] == pytest.approx(runs[1], rel=1e-3)


def train(learner, steps, lr=0.0035):
    optimizer = torch.optim.SGD(learner.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = learner.loss(learner.step(images(), labels())).total
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_vpt_learns_over_hard_text_features():
    """VPT is the image side of IVLP in front of the hard prompts' features."""
    learner, other = build("vpt"), build("ivlp")
    other.bank.vision = learner.bank.vision
    hard = learner.clip.hard_features(["a photo of a {}."], learner.task.classnames)
    features = other.encode_images(images())
    close(learner.logits(learner.encode_images(images()), learner.classifier()), (other.logits(features, hard)).detach().numpy())
    losses = train(learner, 4, lr=0.0025)
    assert losses[-1] < losses[0]


def test_mpl_context_grows_by_what_is_added_over_what_is_removed():
    learner = build("mpl")
    seen = []
    blocks = learner.clip.image.visual.transformer.resblocks
    hooks = [block.register_forward_pre_hook(lambda block, args: seen.append(args[0].shape[1])) for block in blocks]
    learner.encode_images(images())
    for hook in hooks:
        hook.remove()
    assert [length - 17 for length in seen] == [1, 2, 3]


def test_partition_is_contiguous_and_equal():
    assert [block_of(k, 9, 4) for k in range(9)] == [0, 0, 0, 1, 1, 2, 2, 3, 3]
    assert [block_of(k, 6, 3) for k in range(6)] == [0, 0, 1, 1, 2, 2]
    assert [block_of(k, 4, 4) for k in range(4)] == [0, 1, 2, 3]


def test_each_pmpo_prompt_reaches_only_its_block():
    learner = build("pmpo")
    (steps,) = learner.bank.visual()
    for layer, step in steps.items():
        (gradient,) = torch.autograd.grad(step.tokens.sum(), learner.bank.text.ctx, retain_graph=True)
        assert [bool(part.any()) for part in gradient] == [block_of(layer, DEPTH, 2) == k for k in range(2)]


@pytest.mark.parametrize(("mean", "std", "epochs"), [(15, 1, 20), (30, 30, 50), (6, 10, 20)])
def test_gaussian_average_is_the_weighted_sum(mean, std, epochs):
    """The running mean is the authors' sum of weights that are normalised over all epochs."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    average = GaussianAverage(layer, mean, std)
    weights = torch.exp(-0.5 * ((torch.arange(1, epochs + 1, dtype=torch.float64) - mean) / std) ** 2)
    weights /= weights.sum()
    total = torch.zeros(2, 3, dtype=torch.float64)
    for epoch in range(1, epochs + 1):
        torch.nn.init.normal_(layer.weight)
        total += weights[epoch - 1] * layer.weight.detach()
        average.update(layer, epoch)
    average.write_to(layer)
    close(layer.weight, total.numpy())


def test_gaussian_average_where_all_weights_underflow():
    layer = torch.nn.Linear(1, 1)
    average = GaussianAverage(layer, 1000, 1)
    for epoch in (1, 2):
        torch.nn.init.constant_(layer.weight, epoch)
        average.update(layer, epoch)
    average.write_to(layer)
    assert layer.weight.item() == pytest.approx(2)
