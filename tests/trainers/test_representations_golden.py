"""MMRL and MMRL++ against the numbers of their authors' code, and what they score at test."""

from __future__ import annotations

from functools import lru_cache, partial

import pytest
import torch
from promptmix.plugins.distillation.frozen_image import FrozenImageCosine
from promptmix.plugins.heads.representation import ClassAndRepresentation
from promptmix.plugins.prompt_bank.representations import Representations
from promptmix.plugins.text_supervision.hard_prompts import CosineToHard
from promptmix.trainers.mmrl import OwnProjection
from promptmix.trainers.mmrlpp import LowRankBeside, SharedAligner

from promptmix.clip import reference
from promptmix.errors import SettingError
from promptmix.prompts.learner import Learner
from promptmix.prompts.losses import CrossEntropy
from tests.trainers.golden import close, compare, golden_clip, golden_task, images, numbers
from tests.trainers.toy import scores, toy_trainer

THEIRS = "representation_learner."
TOWERS = (("r2v", "image"), ("r2t", "text"))
ALIGNERS = {
    "mmrl": {
        f"{THEIRS}compound_rep_tokens_{theirs}proj.{i}.{kind}": f"bank.{ours}.{i}.{kind}"
        for theirs, ours in TOWERS
        for i in (0, 1)
        for kind in ("weight", "bias")
    }
    | {"image_encoder.proj_rep": "head.projection.proj_rep"},
    "mmrlpp": {f"{THEIRS}srra_{theirs}proj.weight": f"bank.{ours}.weight" for theirs, ours in TOWERS}
    | {
        f"{THEIRS}srra_{theirs}proj.srra.{i}.{name}": f"bank.{ours}.{own}"
        for theirs, ours in TOWERS
        for i in (0, 1)
        for name, own in (("A", f"residuals.{i}.A"), ("B", f"residuals.{i}.B"), ("bias", f"biases.{i}"))
    }
    | {f"image_encoder.{side}": f"head.projection.change.{side}" for side in "AB"},
}
NAMES = {case: {f"{THEIRS}compound_rep_tokens": "bank.tokens", **names} for case, names in ALIGNERS.items()}


@lru_cache(maxsize=1)
def frozen():
    return golden_clip(vision_layers=3, text_layers=3)


def learner(case: str, fuses: bool = False, rep_layers=(2, 3)) -> Learner:
    task = golden_task(frozen(), templates=("a photo of a {}, a type of pet.",))
    kinds = {
        "mmrl": (Representations, OwnProjection),
        "mmrlpp": (
            partial(Representations, beta=0.9, aligner=partial(SharedAligner, rank=4)),
            partial(LowRankBeside, rank=64),
        ),
    }
    make_bank, make_projection = kinds[case]
    bank = make_bank(task, rep_layers=rep_layers)
    head = ClassAndRepresentation(task, bank, make_projection(task), alpha=0.7, fuses=fuses)
    own, tokens = CrossEntropy(head.class_scores), CrossEntropy(head.token_scores, "ce_rep")
    image, text = FrozenImageCosine(task, bank).named("image"), CosineToHard(task, bank)
    return Learner(task, bank, head=head, loss=0.7 * own + 0.3 * tokens + 0.5 * image + 0.5 * text)


@pytest.mark.parametrize("case", list(NAMES))
def test_scores_loss_and_gradients_are_the_authors(case):
    ours, expected = learner(case).eval(), numbers(case)
    terms = compare(case, ours, NAMES[case])
    for part, name in (("ce", "ce"), ("ce_rep", "ce_rep"), ("image", "reg_image"), ("text", "reg_text")):
        close(terms.parts[part], expected[name])
    with torch.no_grad():
        step = ours.step(images())
        close(ours.head.token_scores(step), expected["logits_rep"])
        close(step.image[:, :32], expected["image_features"])
        close(step.text[0, :, :32], expected["text_features"])
        close(step.frozen_image[:, :32], expected["frozen_image"])
        close(ours.bank.references(ours.task.classnames)[0, :, :32], expected["frozen_text"])
        close(ours.train().step(images()).logits, expected["logits_fusion"])
        ours.head.fuses = True
        close(ours.eval().step(images()).logits, expected["logits_fusion_eval"])


@pytest.mark.parametrize("layers", [(1,), (1, 3), (2,), (1, 2, 3)])
@pytest.mark.parametrize("case", list(NAMES))
def test_shared_prefix_is_exact_and_tokens_pass_layers_without_any(case, layers):
    bank = learner(case, rep_layers=layers).bank
    tower, names = frozen().text, bank.task.classnames
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.normal_(std=0.1)
        prompts, steps = tower.compose_text(bank.template, names), bank.schedule(bank.text)
        assert torch.allclose(tower(prompts, steps), reference.encode_plain(tower, prompts, steps), atol=1e-4)


def test_image_tokens_join_behind_the_first_norm():
    ours = learner("mmrl", rep_layers=(1,))
    norm, seen = frozen().image.visual.ln_pre, []
    handle = norm.register_forward_hook(lambda module, args, out: seen.append(args[0].shape[1]))
    try:
        with torch.no_grad():
            assert ours.step(images()).image.shape == (3, 512)
    finally:
        handle.remove()
    assert seen == [1 + (64 // 16) ** 2]


def test_layers_must_be_in_order():
    for layers in ((), (2, 2), (3, 2)):
        with pytest.raises(SettingError, match="rep_layers"):
            learner("mmrl", rep_layers=layers)


@pytest.mark.parametrize(
    ("task", "classes", "source", "fuses"),
    [
        ("B2N", "base", "ImageNet", True),
        ("B2N", "new", "ImageNet", False),
        ("B2N", "all", "ImageNet", False),
        ("FS", "new", "ImageNet", True),
        ("CD", "all", "ImageNet", False),
        ("CD", "all", "ToyPictures", True),
    ],
)
def test_both_scores_count_for_what_was_trained_on(room, task, classes, source, fuses):
    settings = ["TRAINER.MMRL.TASK", task, "TRAINER.MMRL.SOURCE", source]
    trainer = toy_trainer(room, "MMRL", *settings, classes=classes)
    assert trainer.model.head.fuses is fuses
    fused = scores(trainer)
    trainer.model.head.fuses = not fuses
    assert not torch.equal(fused, scores(trainer))
