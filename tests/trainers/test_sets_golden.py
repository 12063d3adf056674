"""Sets and mixtures of prompts against the numbers of their authors' code: PLOT++, GalLoP, SurPL, TRIP, GMoP."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from itertools import permutations

import pytest
import torch
from promptmix.plugins.distillation.frozen_image import FrozenImageL1
from promptmix.plugins.heads.transport import sinkhorn
from promptmix.plugins.prompt_bank.independent_deep import IndependentDeep
from promptmix.plugins.prompt_bank.soft import Soft
from promptmix.plugins.text_supervision.hard_prompts import L1ToEnsemble
from promptmix.trainers.gallop import EachLocal, GlobalLocal, KeptGlobal, SparseLocal
from promptmix.trainers.gmop import BaseOrNew, Detectors, OpenworldLoss
from promptmix.trainers.plotpp import STARTS, USUAL, PromptSets, TransportOfSets
from promptmix.trainers.surpl import SurrogateScores
from promptmix.trainers.trip import TokenMixture, cluster, pair

from promptmix.data.templates import IMAGENET_60
from promptmix.engine.convert import Learned, to_ours, to_theirs
from promptmix.prompts.learner import Learner
from promptmix.prompts.losses import CrossEntropy
from tests.trainers.golden import (
    close,
    compare,
    golden_clip,
    golden_resnet,
    golden_task,
    images,
    labels,
    numbers,
    seeded,
    set_learned,
)


@lru_cache(maxsize=1)
def frozen():
    return golden_clip()


def test_plotpp():
    task = golden_task(frozen())
    bank = PromptSets(task, USUAL, 4, 2)
    expected = numbers("plotpp")
    close(bank.ctx.sum(dim=-1), expected["init_ctx_sum"])
    learner = Learner(task, bank, head=TransportOfSets(task, bank))
    compare("plotpp", learner, {f"prompt_learner.{name}": f"bank.{name}" for name in ("ctx", "ctx_vision")})
    with torch.no_grad():
        step = learner.step(images())
        assert step.features.shape == (3, 4, 512)  # nobody routes, so the frozen tower does not run
        cosines = torch.einsum("bmd,ncd->bcmn", step.image, step.text)
        plan = sinkhorn(1 - cosines, 0.1, 100, 0.01).flatten(0, 1)
        close(plan.norm(), expected["plan_norm"])
        close(plan.flatten()[:240], expected["plan_head"])


def test_plotpp_reads_the_means_before_they_are_normalised():
    task = golden_task(frozen())
    bank = PromptSets(task, USUAL[:2], 2, 2)
    with torch.no_grad():
        plain = Learner(task, bank, head=TransportOfSets(task, bank)).step(images()).logits
        both = Learner(task, bank, head=TransportOfSets(task, bank, trade_off=True)).step(images()).logits
        raw = torch.stack([task.clip.image(images(), schedule) for schedule in bank.visual()])
        cosine = torch.cosine_similarity(raw.mean(0)[:, None], bank.encode(task.classnames).mean(0)[None], dim=-1)
    assert torch.allclose(both - plain, task.clip.scale * cosine, atol=1e-4)


@pytest.mark.parametrize("whole", [False, True])
def test_plotpp_templates_of_other_lengths(whole):
    """A longer template keeps its last words; a shorter one takes words of the name, as the authors' code does, or none."""
    task = golden_task(frozen())
    tower = task.clip.text
    for start, name in (
        (STARTS["EuroSAT"][2], "sea lion"),
        ("this is a", "sea lion" if whole else "lion"),
        ("one more photo of a big", "sea lion"),
    ):
        first = STARTS["EuroSAT"][0] if "satellite" in start else "a photo of a"
        bank = PromptSets(task, (first, start), 1, 1, whole)
        length = len(first.split())
        tail = " ".join(filter(None, (" ".join(start.split()[length:]), name)))
        with torch.no_grad():
            expected = tower(tower.compose(bank.ctx[1:], tower.tokenizer.class_tokens([f"{tail}."])))
            assert torch.allclose(bank.encode(["sea lion"])[1], expected[0], atol=1e-4)


def gallop(case: str = "gallop"):
    task = golden_task(frozen())
    bank = GlobalLocal(task, 4, 4, "A photo of a")
    head = SparseLocal(task, bank, (2, 4, 8, 12))
    return bank, Learner(task, bank, head=head, loss=KeptGlobal(head, 0.75) + EachLocal(head))


def test_gallop(monkeypatch):
    bank, learner = gallop()
    expected = numbers("gallop")
    close(bank.global_prompt.sum(dim=-1), expected["init_prompt_sum"])
    drawn = torch.from_numpy(expected["dropout_index"]).long()
    monkeypatch.setattr(KeptGlobal, "draw", lambda loss, pictures, device: drawn)
    names = {
        "global_prompt": "bank.global_prompt",
        "local_prompts": "bank.local_prompts",
        "local_proj.linear.weight": "head.local_proj.weight",
    }
    terms = compare("gallop", learner, names, starts=("local_proj.linear.weight",))
    close(terms.parts["global"], expected["loss_global"])
    close(terms.parts["local"], expected["loss_local"])
    with torch.no_grad():
        whole, local = learner.head.similarities(learner.step(images()))
        close(whole, expected["global_similarity"])
        close(local, expected["local_similarity_topk"])


def test_gallop_on_a_resnet(monkeypatch):
    """Its local features are values of the pool without positions."""
    task = golden_task(golden_resnet())
    bank = GlobalLocal(task, 3, 2, "A photo of a")
    head = SparseLocal(task, bank, (1, 3))
    monkeypatch.setattr(KeptGlobal, "draw", lambda *_: torch.from_numpy(numbers("gallop_resnet")["dropout_index"]).long())
    names = {name: f"bank.{name}" for name in ("global_prompt", "local_prompts")}
    names["local_proj.linear.weight"] = "head.local_proj.weight"
    learner = Learner(task, bank, head=head, loss=KeptGlobal(head, 0.5) + EachLocal(head))
    compare("gallop_resnet", learner, names, starts=("local_proj.linear.weight",))


def test_gallop_draws_one_prompt_of_four_for_each_picture():
    _, learner = gallop()
    torch.manual_seed(0)
    drawn = learner.losses["global"].draw(400, torch.device("cpu"))
    assert drawn.shape == (400, 1)
    assert drawn.unique().tolist() == [0, 1, 2, 3]


def test_gallop_learns_from_kept_features():
    """What is cached is frozen: the learned projection comes behind it."""
    _, learner = gallop()
    kept = learner.features(images())
    with torch.no_grad():
        learner.head.local_proj.weight.mul_(2).add_(0.01)
        assert torch.allclose(learner.step(kept).logits, learner.step(images()).logits)


VPT = "resblocks.{}.VPT_shallow"
SFG = ["attn.in_proj_weight", "attn.in_proj_bias"] + [
    f"{part}.{kind}" for part in ("attn.out_proj", "ln_1", "ln_2", "mlp.c_fc", "mlp.c_proj") for kind in ("weight", "bias")
]
SURPL = {
    "prompt_learner.ctx": "bank.text.ctx",
    "image_encoder.VPT": "bank.vision.layers.0",
    **{f"image_encoder.transformer.{VPT.format(i)}": f"bank.vision.layers.{i}" for i in (1, 2)},
    **{f"text_encoder.transformer.{VPT.format(i)}": f"bank.text.deeper.{i - 1}" for i in (1, 2)},
    "fg_signals": "head.fg_signals",
    "feature_proj.linear.weight": "head.feature_proj.weight",
    **{f"SFG.{name}": f"head.SFG.{name}" for name in SFG},
}


def test_surpl():
    task = golden_task(frozen())
    bank = IndependentDeep(task, 4, 4, "a photo of a", 3, 3)
    head = SurrogateScores(task, bank, 4, 10)
    text, image = L1ToEnsemble(task, bank, IMAGENET_60), FrozenImageL1(task, bank)
    scores = CrossEntropy(head.plain) + CrossEntropy(head.instance, "instance") + CrossEntropy(head.fine, "fine")
    loss = scores + 25.0 * text.named("text", weighted=True) + 10.0 * image.named("image", weighted=True)
    learner = Learner(task, bank, head=head, loss=loss)
    starts = ("SFG.ln_1.weight", "SFG.ln_2.weight", "feature_proj.linear.weight")
    terms = compare("surpl", learner, SURPL, starts=starts)
    expected = numbers("surpl")
    for ours, theirs in (("ce", "global"), ("instance", "instance"), ("text", "text"), ("image", "image")):
        close(terms.parts[ours], expected[f"loss_{theirs}"])
    close(terms.parts["fine"], expected["loss_fine"].mean())
    gradient = head.SFG.attn.in_proj_weight.grad
    close(gradient[1024:].flatten()[:256], expected["gradhead_value:SFG.attn.in_proj_weight"], scale=float(gradient.norm()))
    with torch.no_grad():
        step = learner.step(images())
        assert step.tokens.shape[1] == expected["local_tokens"]
        close(head.plain(step), expected["logits_global"])
        close(head.instance(step), expected["logits_instance"])
        close(head.fine(step), expected["logits_fine"])


def test_surpl_checkpoints_have_the_authors_names():
    learned = Learned("SurPL", {"prompt_learner": {ours: torch.zeros(1) for ours in SURPL.values()}}, "here")
    theirs = to_theirs(learned)
    assert set(theirs) == set(SURPL)
    more = {"prompt_learner.ZS_image_encoder.proj": torch.zeros(1), "image_encoder.proj": torch.zeros(1)}
    assert to_ours("SurPL", theirs | more, "there").models == learned.models


def test_gmop():
    task = golden_task(frozen(), classes=3)
    bank = Soft(task, 4)
    own = OpenworldLoss(task, bank, 3, 16, 0.5, 1.0)
    learner = Learner(task, bank, head=BaseOrNew(task, bank, own.detectors), loss=CrossEntropy() + own)
    expected = numbers("gmop")
    with torch.no_grad():
        bank.ctx.copy_(torch.from_numpy(seeded().learned("gmop", "coop_prompter.ctx", (4, 512))))
        contexts = [torch.from_numpy(seeded().learned("gmop", f"ood_prompter.{i}.ctx", (16, 512))) for i in range(3)]
        own.detectors.ctx.copy_(torch.stack(contexts))
    step = learner.step(images(), labels(3))
    assert [own.detectors.labels(i, torch.arange(3)).tolist() for i in range(3)] == expected["detector_labels"].tolist()
    close(step.logits, expected["logits"])
    warm, auc = own.terms(step)
    close(warm, expected["loss_warm_each"])
    close(auc, expected["loss_auc_each"])
    terms = learner.loss(step)
    close(terms.parts["ce"], expected["loss_id"])
    close(terms.total, expected["loss"])
    terms.total.backward()
    for theirs, gradient in (
        ("coop_prompter.ctx", bank.ctx.grad),
        *((f"ood_prompter.{i}.ctx", own.detectors.ctx.grad[i]) for i in range(3)),
    ):
        norm = expected[f"gradnorm:{theirs}"]
        close(gradient.norm(), norm)
        close(gradient.flatten()[:256], expected[f"gradhead:{theirs}"], scale=float(norm))
    close(own.detectors.base_scores(step.image), expected["score"])


def test_gmop_classifies_new_classes_by_the_frozen_model():
    whole = golden_task(frozen())
    task = replace(whole, classnames=whole.classnames[3:])
    bank = Soft(task, 4)
    learner = Learner(task, bank, head=BaseOrNew(task, bank, Detectors(task, 3, 16)))
    with torch.no_grad():
        close(learner.step(images()).logits, numbers("gmop")["logits_new"])


def test_trip(monkeypatch):
    learner = TokenMixture(golden_task(frozen()), 4, 4, 1.0, (1.0, 2.0))
    expected = numbers("trip")
    first = torch.from_numpy(expected["init_tokens"]).long()
    monkeypatch.setattr(learner, "first_tokens", lambda count: first)
    learner.keys.copy_(torch.from_numpy(seeded().stream("trip/keys", (4, 768))))
    names = {f"prompt_learner.VPTctxList.{i}": f"bank.{i}" for i in range(4)}
    parameters = set_learned("trip", learner, names)
    with torch.no_grad():
        states = frozen().image.states(images())
        tokens = torch.cat([states.first[:, None], states.patches], dim=1)
        close(tokens.norm(dim=-1), expected["token_norm"])
        for mode, factor in (("train", 1.0), ("infer", 2.0)):
            assert [cluster(own, first, factor)[0].tolist() for own in tokens] == expected[f"assignment_{mode}"].tolist()
        features = learner.features(images())
        close(features[:, 512:516], expected["weights_train"])
        close(features[:, 516:], expected["weights_infer"])
        close(learner.eval().logits(features, None), expected["logits"])
    terms = learner.train().loss(learner.step(images(), labels()))
    close(terms.logits, expected["logits_train"])
    close(terms.parts["ce"], expected["loss_ce"])
    close(terms.parts["teacher"], expected["loss_kl"])
    close(terms.total, expected["loss"])
    terms.total.backward()
    for theirs, parameter in parameters.items():
        norm = expected[f"gradnorm:{theirs}"]
        close(parameter.grad.norm(), norm)
        close(parameter.grad.flatten()[:256], expected[f"gradhead:{theirs}"], scale=float(norm))


def test_trip_with_twelve_experts_around_the_class_name(monkeypatch):
    learner = TokenMixture(golden_task(frozen()), 12, 3, 0.5, (0.5, 1.5), "middle")
    expected = numbers("trip_middle")
    monkeypatch.setattr(learner, "first_tokens", lambda count: torch.from_numpy(expected["init_tokens"]).long())
    learner.keys.copy_(torch.from_numpy(seeded().stream("trip/keys", (12, 768))))
    features = learner.encode_images(images())
    close(features[:, 512:524], expected["weights_train"])
    close(features[:, 524:], expected["weights_infer"])
    monkeypatch.setattr(learner, "encode_images", lambda pictures: features)
    learner.eval()
    names = {f"prompt_learner.VPTctxList.{i}": f"bank.{i}" for i in range(12)}
    parameters = set_learned("trip_middle", learner, names)
    with torch.no_grad():
        close(learner.logits(features, None), expected["logits"])
    terms = learner.train().loss(learner.step(images(), labels()))
    close(terms.total, expected["loss"])
    terms.total.backward()
    for theirs, parameter in parameters.items():
        norm = float(expected[f"gradnorm:{theirs}"])
        close(parameter.grad.flatten()[:256], expected[f"gradhead:{theirs}"], scale=norm)


def test_trip_pairs_clusters_and_keys_at_the_least_cost():
    torch.manual_seed(0)
    for count in (1, 2, 6):
        costs = torch.randn(count, count, dtype=torch.float64)
        found = pair(costs.tolist())
        assert sorted(found) == list(range(count))
        ways = torch.tensor(list(permutations(range(count))))
        assert costs[range(count), found].sum() == pytest.approx(float(costs[torch.arange(count), ways].sum(dim=1).min()))
