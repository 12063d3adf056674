"""Methods of the kin against the numbers of their authors' code: TCP, PLOT, CLIP-LoRA."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from promptmix.plugins.heads.transport import Transport, sinkhorn
from promptmix.plugins.prompt_bank.attributes import AttributePrompts, CoupledAttributes
from promptmix.plugins.prompt_bank.low_rank import LowRank, layers_of
from promptmix.plugins.prompt_bank.soft import Soft
from promptmix.plugins.text_supervision.hard_prompts import CosineToHard
from promptmix.trainers.plot import PLOT, PooledSoft, TransportAndGlobal
from promptmix.trainers.proda import Orthogonality, PromptDistribution, UpperBound, positions
from promptmix.trainers.tcp import ClassAware

from promptmix.clip import reference
from promptmix.errors import SettingError
from promptmix.prompts.heads import Cosine
from promptmix.prompts.learner import Learner
from promptmix.prompts.losses import CrossEntropy
from tests.trainers.golden import close, compare, golden_clip, golden_task, images, labels, numbers, set_learned

LINEAR = [f"meta_net.{layer}.{kind}" for layer in ("linear1", "linear2") for kind in ("weight", "bias")]


@lru_cache(maxsize=1)
def frozen():
    return golden_clip()


def test_tcp():
    task = golden_task(golden_clip(text_layers=12))
    bank = ClassAware(task, 4, "", 8, "{}, a type of pet.", "a photo of a {}, a type of pet.")
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


def test_tcp_starts_from_words():
    task = golden_task(frozen())
    bank = ClassAware(task, 16, "a photo of", 2, "{}.", "a photo of a {}.")
    assert torch.equal(bank.ctx[0], task.clip.text.embed(task.clip.text.tokenizer.encode("a photo of")))
    assert bank.class_tokens(task.classnames).shape == (1, 5, 3, 512)


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


def test_plot_with_the_class_name_in_the_middle():
    learner = PLOT.compose(None, golden_task(frozen()), n=1, n_ctx=5, class_token_position="middle")
    compare("plot_middle", learner, {"prompt_learner.ctx": "bank.ctx"})


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
    assert layers_of("top2", 12) == [10, 11]
    assert layers_of("top3", 12) == [9, 10, 11]
    assert layers_of("bottom", 12) == [0, 1, 2, 3]
    assert layers_of("mid", 12) == [4, 5, 6, 7]
    assert layers_of("up", 12) == [8, 9, 10, 11]
    assert layers_of("half-up", 12) == [6, 7, 8, 9, 10, 11]
    assert layers_of("top1", 4) == [3]
    assert layers_of("top3", 3) == [2]


def test_coop_atp():
    learner = Learner(golden_task(frozen()), AttributePrompts(golden_task(frozen()), attributes=("shape", "size")))
    names = {
        f"prompt_learner.ctx{theirs}": ours
        for theirs, ours in (("", "bank.ctx"), ("_att1", "bank.att.0"), ("_att2", "bank.att.1"))
    }
    compare("coop_atp", learner, names)
    one = Learner(golden_task(frozen()), AttributePrompts(golden_task(frozen()), attributes=("shape",)))
    one.bank.load_state_dict({name: value for name, value in learner.bank.state_dict().items() if name != "att.1"})
    with torch.no_grad():
        close(one.step(images()).logits, numbers("coop_atp")["one/logits"])


def test_coop_atp_with_words_of_different_lengths():
    task = golden_task(frozen())
    bank = AttributePrompts(task, 2, attributes=("pattern", "color", "design"), n_atts=(1, 3, 2))
    names = {"prompt_learner.ctx": "bank.ctx", **{f"prompt_learner.ctx_att{i + 1}": f"bank.att.{i}" for i in range(3)}}
    compare("coop_atp_lengths", Learner(task, bank), names)
    with pytest.raises(SettingError, match="there are 1 attribute words; give a number for each"):
        AttributePrompts(task, attributes=("shape",), n_atts=(1, 3))


def test_attribute_words_may_have_several_tokens():
    bank = AttributePrompts(golden_task(frozen()), attributes=("playfulness", "energy"))
    assert [len(word) for word in bank.words] == [2, 1] and bank.span == 11


def test_maple_atp():
    task = golden_task(frozen())
    bank = CoupledAttributes(task, n_ctx=2, n_att=2, attributes=("shape", "size"), prompt_depth=3)
    names = {
        "prompt_learner.ctx": "bank.ctx",
        **{f"prompt_learner.ctx_att{i}": f"bank.att.{i - 1}" for i in (1, 2)},
        **{f"prompt_learner.compound_prompts_text.{i}": f"bank.deeper.{i}" for i in (0, 1)},
        **{f"prompt_learner.proj.{kind}": f"bank.couple.0.{kind}" for kind in ("weight", "bias")},
        **{
            f"prompt_learner.compound_prompt_projections.{i}.{kind}": f"bank.couple.{i + 1}.{kind}"
            for i in (0, 1)
            for kind in ("weight", "bias")
        },
    }
    compare("maple_atp", Learner(task, bank, head=Cosine(task, bank)), names)


def test_proda():
    task = golden_task(frozen())
    bank = PromptDistribution(task, 8, 16, 8)
    learner = Learner(task, bank, loss=UpperBound() + 0.1 * Orthogonality(bank))
    terms = compare("proda", learner, {"prompt_learner.ctx": "bank.ctx"})
    expected = numbers("proda")
    close(terms.parts["upper"], expected["loss_upper"])
    close(terms.parts["diversity"], expected["loss_diversity"])
    with torch.no_grad():
        close(UpperBound().scores(learner.step(images(), labels())), expected["logits_train"])
        close(learner.classifier().mean(dim=0).norm(dim=-1), expected["text_mean_norm"])
    assert [["front", "middle", "end"].index(place) for place in positions(8)] == expected["position"].astype(int).tolist()


def test_proda_takes_each_prompt_once_before_any_twice():
    task = golden_task(frozen())
    bank = PromptDistribution(task, 8, 2, 4).train()
    seen = []
    bank.encode_some = lambda names, prompts: seen.append(prompts) or torch.zeros(len(prompts), 5, 512)
    for _ in range(4):
        bank(task.classnames)
    assert [sorted(seen[i] + seen[i + 1]) for i in (0, 2)] == [list(range(8))] * 2
    with torch.no_grad():
        bank.eval()(task.classnames)
    assert seen[-1] == list(range(8))
