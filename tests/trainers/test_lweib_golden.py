"""LwEIB against the numbers of its authors' code; its draws, the classes that it scores, and what it may leave out."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from promptmix.trainers.lweib import Convolutions, SampledCosine

from promptmix.clip import reference
from promptmix.data.descriptions import Descriptions
from promptmix.errors import ConfigError, DataError, SettingError
from promptmix.prompts.learner import Learner
from tests.trainers.golden import FOLDER, close, compare, golden_clip, golden_task, images, labels, numbers, set_learned
from tests.trainers.toy import toy_trainer

NAMES = {
    f"adapter_learner.{theirs}_adapter.{layer}.{kind}_conv.conv.weight": f"bank.{ours}.{layer}.{kind}.weight"
    for theirs, ours in (("text", "text"), ("visual", "image"))
    for layer in (1, 2, 3)
    for kind in ("att", "mlp")
}


@lru_cache(maxsize=1)
def frozen():
    return golden_clip(vision_layers=3, text_layers=3)


def learner(ratio: int = -1, **settings) -> Learner:
    sentences = Descriptions(json.loads((FOLDER / "lweib.json").read_text())["descriptions"], "lweib.json")
    task = replace(golden_task(frozen()), descriptions=sentences)
    given = {"adapter_end": 3, "adapter_scale": 0.1, "slow_fast_ratio": 1.0, **settings}
    bank = Convolutions(task, **given)
    return Learner(task, bank, head=SampledCosine(task, bank, ratio))


def test_scores_loss_and_gradients_are_the_authors(monkeypatch):
    # The recorded run's sentences: of column j the j mod 2-th.
    monkeypatch.setattr(torch, "randint", lambda low, high, size: torch.arange(size[1])[None] % high)
    ours, expected = learner(), numbers("lweib")
    set_learned("lweib", ours, NAMES)
    with torch.no_grad():
        ours.eval()
        close(ours.step(images()).logits, expected["logits_eval"])
        close(ours.classifier()[0, :, :64], expected["text_features_eval"])
    terms = compare("lweib", ours.train(), NAMES)
    close(terms.logits, expected["logits"])
    assert [name for name, p in ours.named_parameters() if p.grad is None] == ["bank.image.3.mlp.weight"]


def test_draws_are_the_authors_in_their_order():
    """A step with everything drawn, against the same numbers drawn here as their program does it."""
    ours = learner(ratio=1, adapter_scale_factor=2.5, slow_fast_ratio=0.5)
    set_learned("lweib", ours, NAMES)
    batch, targets = images()[:2], labels()[:2]
    torch.manual_seed(5)
    terms = ours.loss(ours.step(batch, targets))
    after = torch.rand(1)

    torch.manual_seed(5)
    own, renumbered = targets.unique(return_inverse=True)
    others = [i for i in range(5) if i not in own.tolist()]
    classes = own.tolist() + [others[i] for i in torch.multinomial(torch.ones(len(others)), 2).tolist()]
    sentence = torch.randint(0, 2, (1, 4))[0].tolist()
    scales = [[0.25 if torch.rand(1) > 0.5 else 0.1 for _ in range(3)] for _ in range(2)]
    assert torch.rand(1) == after  # not a number more was drawn
    assert len({scale for row in scales for scale in row}) == 2
    bank, names = ours.bank, [ours.task.classnames[i] for i in classes]
    bank.scales = lambda depth: scales.pop(0)
    prompts = bank.prompts(names, [row[i] for row, i in zip(bank.sentences(names), sentence, strict=True)])
    text = F.normalize(frozen().text(prompts, actions=bank.actions(bank.text, bank.over_positions, 3)), dim=-1)[0]
    logits = frozen().scale * frozen().encode_image(batch, **bank.image_changes()) @ text.T
    close(terms.total, F.cross_entropy(logits, renumbered).detach().double().numpy())
    close(terms.logits[:, classes], logits.detach().double().numpy())
    assert terms.logits.isneginf().sum() == 2


@pytest.mark.parametrize(("ratio", "pictures", "scored"), [(-1, 2, 5), (0, 2, 2), (1, 2, 4), (7, 2, 5), (0, 3, 3), (1, 5, 5)])
def test_classes_that_a_step_scores(ratio, pictures, scored):
    head = learner(ratio).head
    drawn = head.draw(torch.arange(pictures), 5) if ratio >= 0 else None
    found = list(range(5)) if drawn is None else drawn.tolist()
    assert len(found) == len(set(found)) == scored
    assert set(range(pictures)) <= set(found)


def test_evaluation_scores_all_classes_at_the_slow_scale():
    ours = learner(ratio=0, slow_fast_ratio=0.0).eval()
    assert ours.bank.scales(3) == [0.1] * 3
    with torch.no_grad():
        assert ours.step(images()[:1], labels()[:1]).logits.isfinite().all()
    assert ours.train().bank.scales(3) == [0.25] * 3


def test_padding_beyond_the_convolutions_reach_is_left_out_exactly(monkeypatch):
    ours = learner().eval()
    set_learned("lweib", ours, NAMES)
    tower, bank = frozen().text, ours.bank
    prompts = bank.prompts(ours.task.classnames, [row[1] for row in bank.sentences(ours.task.classnames)])
    lengths, pad = [], tower.pad

    def watched(*args, **kwargs):
        x, ends = pad(*args, **kwargs)
        lengths.append(x.shape[2])
        return x, ends

    monkeypatch.setattr(tower, "pad", watched)
    known, unknown = (bank.actions(bank.text, bank.over_positions, 3, ahead=ahead) for ahead in (2, None))
    less = {i: replace(action, ahead=0) for i, action in known.items()}
    with torch.no_grad():
        short, long = tower(prompts, actions=known), tower(prompts, actions=unknown)
        assert not torch.allclose(tower(prompts, actions=less), long, atol=1e-5)
        assert torch.allclose(reference.encode_plain(tower, prompts, actions=known), long, atol=1e-5)
    assert torch.allclose(short, long, atol=1e-5)
    longest = prompts.prefix.shape[1] + max(prompts.lengths)
    assert lengths[:3] == [longest + 6, 77, longest]


def test_classes_of_similar_length_go_together_and_come_back_in_order(monkeypatch):
    ours = learner().eval()
    set_learned("lweib", ours, NAMES)
    tower, bank = frozen().text, ours.bank
    names = [f"{'very ' * (5 * i % 7)}small thing {i}" for i in range(9)]
    prompts = bank.prompts(names, ["It is one."] * 9)
    monkeypatch.setattr("promptmix.clip.text._PART", 2)
    parts, pad = [], tower.pad

    def watched(*args, **kwargs):
        x, ends = pad(*args, **kwargs)
        parts.append(x.shape[1:3])
        return x, ends

    monkeypatch.setattr(tower, "pad", watched)
    known, unknown = (bank.actions(bank.text, bank.over_positions, 3, ahead=ahead) for ahead in (2, None))
    with torch.no_grad():
        assert torch.allclose(tower(prompts, actions=known), tower(prompts, actions=unknown), atol=1e-5)
    start = prompts.prefix.shape[1]
    ordered = sorted(prompts.lengths)
    expected = [(len(part), start + part[-1] + 6) for part in (ordered[i : i + 2] for i in range(0, 9, 2))]
    assert [tuple(part) for part in parts] == [*expected, (9, 77)]


def test_last_image_block_runs_for_the_class_token_alone():
    ours = learner().eval()
    set_learned("lweib", ours, NAMES)
    actions = ours.bank.image_changes()["actions"]
    everywhere = {i: replace(action, spares_first=False) for i, action in actions.items()}
    seen = []

    def watched(x):
        seen.append(x.shape[1])
        return everywhere[2].hidden(x)

    with torch.no_grad():
        first = frozen().image(images(), actions={**actions, 2: replace(actions[2], hidden=watched)})
        whole = frozen().image(images(), actions={**everywhere, 2: replace(everywhere[2], hidden=watched)})
    assert seen == [17]
    assert torch.allclose(first, whole, atol=1e-5)


def test_long_sentences_are_cut_as_clip_does():
    task = golden_task(frozen())
    task = replace(task, descriptions=Descriptions({name: ["very " * 100] for name in task.classnames}))
    prompts = Convolutions(task, adapter_end=3).prompts(task.classnames, ["very " * 100] * 5)
    assert {prompts.prefix.shape[1] + length for length in prompts.lengths} == {77}


def test_what_does_not_fit_is_refused_in_one_line(room, tmp_path):
    with pytest.raises(SettingError, match="adapter_start"):
        learner(adapter_start=3, adapter_end=2)
    path = tmp_path / "some.json"
    path.write_text('{"barn owl": ["An owl."], "pine tree": ["A tree.", "It is green."], "Red double decker bus": ["A bus."]}')
    with pytest.raises(DataError, match=r"1 sentences for 'barn owl' but 2 for 'pine_tree'"):
        toy_trainer(room, "LwEIB", "DATASET.DESCRIPTIONS", str(path))
    path.write_text('{"barn owl": ["An owl."], "pine tree": ["A tree."]}')
    with pytest.raises(DataError, match=r"some.json has no sentences for 1 of 3 classes: 'red double decker bus'") as refusal:
        toy_trainer(room, "LwEIB", "DATASET.DESCRIPTIONS", str(path))
    assert "\n" not in str(refusal.value)


def test_pictures_must_be_square(monkeypatch):
    monkeypatch.setattr(type(frozen().image), "patches", 15)
    with pytest.raises(ConfigError, match="15 patches, which are not a square grid"):
        learner()
