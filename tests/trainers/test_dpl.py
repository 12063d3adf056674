"""DPL: the authors' numbers of search and training, the search's alternation, and the hand-over of the lengths."""

from __future__ import annotations

import json
from functools import lru_cache

import pytest
import torch
from promptmix.plugins.distillation.zeroshot_kl import ZeroshotKL
from promptmix.trainers.dpl import CUSTOM, Choices, Chosen, KeyPrompts, averaged

from promptmix.cli import main
from promptmix.clip.reference import plain_towers
from promptmix.config import source_of
from promptmix.config.flags import make_config
from promptmix.data.templates import IMAGENET_60
from promptmix.engine import load_checkpoint, save_checkpoint
from promptmix.errors import ConfigError, DataError
from promptmix.predict import load
from promptmix.prompts.heads import Cosine
from promptmix.prompts.learner import Learner
from promptmix.runs.run import run
from tests.trainers.golden import FOLDER, close, compare, golden_clip, golden_task, images, labels, numbers, seeded, set_learned
from tests.trainers.toy import first_step, scores, three_layers, toy_cfg, toy_trainer

SUBNET = json.loads((FOLDER / "dpl_subnet.json").read_text())
DEFAULT = ("a photo of a {}.",)


@lru_cache(maxsize=1)
def frozen():
    return golden_clip()


def learner_of(image, text, templates=DEFAULT, **more):
    task = golden_task(frozen())
    bank = KeyPrompts(task, text, image, templates, **more)
    return Learner(task, bank, head=Cosine(task, bank))


def supernet(vision=2, text=3):
    clip = frozen()
    return learner_of(Choices(clip.image.width, 3, vision, uniform=False), Choices(clip.text.width, 3, text, uniform=True))


SEARCH_NAMES = {
    f"prompt_learner.{theirs}": ours
    for tower, ours_tower, longest in (("img", "image", 2), ("txt", "text", 3))
    for theirs, ours in [
        (f"alphas_{tower}", f"bank.{ours_tower}.alpha"),
        *((f"ctx_{tower}_lst.{i}.{c}", f"bank.{ours_tower}.prompts.{i}.{c}") for i in range(3) for c in range(longest)),
    ]
}


def set_search(learner):
    parameters = set_learned("dpl_search", learner, SEARCH_NAMES)
    with torch.no_grad():
        for tower in ("img", "txt"):
            parameters[f"prompt_learner.alphas_{tower}"].mul_(20)
    return parameters


def check_gradients(expected, parameters):
    for name, parameter in parameters.items():
        norm = float(expected[f"gradnorm:{name}"])
        close(parameter.grad.norm(), expected[f"gradnorm:{name}"])
        head = expected[f"gradhead:{name}"]
        close(parameter.grad.flatten()[: len(head)], head, scale=norm)


def test_search():
    learner, expected = supernet(), numbers("dpl_search")
    parameters = set_search(learner)
    for tower, ours in (("img", learner.bank.image), ("txt", learner.bank.text)):
        close(ours.alpha.softmax(dim=-1), expected[f"weights_{tower}"])
    terms = learner.loss(learner.step(images(), labels()))
    close(terms.logits, expected["logits"])
    close(terms.total, expected["loss"])
    terms.total.backward()
    check_gradients(expected, parameters)
    assert learner.bank.text.lengths() == expected["weights_txt"].argmax(axis=1).tolist()


def test_a_whole_search_step():
    learner, expected = supernet(), numbers("dpl_search")
    parameters = set_search(learner)
    alphas = [learner.bank.image.alpha, learner.bank.text.alpha]
    outer = torch.optim.Adam(alphas, lr=0.0035, betas=(0.5, 0.999))
    others = [p for p in learner.parameters() if p is not alphas[0] and p is not alphas[1]]
    inner = torch.optim.SGD(others, lr=0.0035, momentum=0.9, weight_decay=5e-4)
    val = torch.from_numpy(seeded().stream("images_val", (3, 3, 64, 64))), torch.tensor([2, 4, 0])
    loss = learner.loss(learner.step(*val)).total
    close(loss, expected["step_loss_val"])
    loss.backward(inputs=alphas)
    outer.step()
    loss = learner.loss(learner.step(images(), labels())).total
    close(loss, expected["step_loss_train"])
    loss.backward()
    inner.step()
    for tower in ("img", "txt"):
        close(parameters[f"prompt_learner.alphas_{tower}"], expected[f"step_alphas_{tower}"])
    for key in ("ctx_txt_lst.1.0", "ctx_img_lst.2.1"):
        close(parameters[f"prompt_learner.{key}"].flatten()[:64], expected[f"step_value:prompt_learner.{key}"])


def subnet(templates=DEFAULT, **more):
    clip, lengths = frozen(), SUBNET["lengths"]
    return learner_of(Chosen(clip.image.width, lengths["image"]), Chosen(clip.text.width, lengths["text"]), templates, **more)


SUBNET_NAMES = {
    f"prompt_learner.ctx_{theirs}_lst.{i}": f"bank.{ours}.{i}"
    for theirs, ours in (("img", "image"), ("txt", "text"))
    for i in range(3)
}


def test_training_with_found_lengths():
    learner = subnet()
    compare("dpl_subnet", learner, SUBNET_NAMES)
    assert tuple(SUBNET["templates"]) == IMAGENET_60


@pytest.mark.parametrize(
    ("kind", "templates", "tokens"),
    [("", DEFAULT, False), ("custom/", (CUSTOM["OxfordPets"],), False), ("ensemble/", IMAGENET_60, True)],
)
def test_words_and_the_divergence_from_the_zero_shot_model(kind, templates, tokens):
    learner, expected = subnet(templates, tokens=tokens), numbers("dpl_subnet")
    set_learned("dpl_subnet", learner, SUBNET_NAMES)
    terms = learner.loss(learner.step(images(), labels()))
    close(terms.logits, expected[f"{kind}logits"])
    close(terms.total, expected[f"{kind}loss"])
    task = learner.task
    kl = ZeroshotKL(task, learner.bank, IMAGENET_60[-1:], over_classes=True)
    step = learner.step(images(), labels())
    close(kl.scale * step.frozen_image @ kl.teacher.T, expected[f"{kind}zero_shot_logits"])
    close(kl(step), expected[f"{kind}kl"])
    if kind:
        terms.total.backward()
        joint = torch.stack([p.grad.norm() for p in learner.parameters() if p.numel()]).norm()
        close(joint, expected[f"gradnorm:{kind}all"])


def test_ensemble_ends_where_the_last_template_does():
    task = golden_task(frozen())
    prompts = averaged(task, IMAGENET_60, task.classnames)
    ends = [prompts.prefix.shape[1] + length - 1 for length in prompts.lengths]
    assert ends == numbers("dpl_subnet")["ensemble/eot"].astype(int).tolist()
    one = averaged(task, ["a photo of a {}."], task.classnames)
    usual = task.clip.text.compose_text("a photo of a {}.", task.classnames)
    assert torch.equal(one.prefix, usual.prefix) and torch.equal(one.tail, usual.tail) and one.lengths == usual.lengths


@pytest.mark.parametrize("tokens", [True, False])
def test_prefix_shared_and_plain_towers_agree(tokens):
    learner = subnet(IMAGENET_60[:4], tokens=tokens)
    with torch.no_grad():
        ours = learner.step(images()).logits
        with plain_towers(learner.clip):
            torch.testing.assert_close(learner.step(images()).logits, ours, rtol=1e-4, atol=1e-4)


SMALL = ("TRAINER.DPLSEARCH.N_CTX_VISION", 2, "TRAINER.DPLSEARCH.N_CTX_TEXT", 3, "DATALOADER.TEST.BATCH_SIZE", 2)


def test_alpha_learns_on_val_batches_in_turn_and_before_the_prompts(room):
    """One step of the trainer is that of two optimizers by hand, on the val part's second batch in the second step."""
    ours, other = (toy_trainer(room, "DPLSearch", *SMALL, *three_layers(room)) for _ in range(2))
    ours.set_model_mode("train")
    ours.num_batches = 9
    batches = [next(iter(ours.train_loader_x)) for _ in range(2)]
    val = list(other.val_loader)
    assert [len(batch["label"]) for batch in val] == [2, 1]
    model = other.model.train()
    alphas, inner = other.outer_parameters(model), other._optims["prompt_learner"]
    outer = torch.optim.Adam(alphas, lr=0.0035, betas=(0.5, 0.999))
    for i in range(3):
        ours.epoch, ours.batch_idx = 0, i
        summary = ours.forward_backward(batches[i % 2])
        loss = model.loss(model.step(*other.parse_batch_test(val[i % 2]))).total
        outer.zero_grad()
        loss.backward(inputs=alphas)
        outer.step()
        assert summary["loss_val"] == loss
        inner.zero_grad()
        model.loss(model.step(*other.parse_batch_train(batches[i % 2]))).total.backward()
        inner.step()
    for name, value in model.state_dict().items():
        assert torch.equal(ours.model.state_dict()[name], value), name


def test_a_search_resumes_to_the_bit_and_needs_val_pictures(room, tmp_path):
    def build(folder):
        return toy_trainer(
            room, "DPLSearch", *SMALL, *three_layers(room), "OPTIM.MAX_EPOCH", 2, "OUTPUT_DIR", str(tmp_path / folder)
        )

    whole = build("whole")
    whole.train()
    cut = build("cut")
    after = cut.after_epoch
    cut.after_epoch = lambda: after() if cut.epoch < 1 else _stop()
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    again = build("cut")
    again.train()
    assert again.start_epoch == 1
    for name, value in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name
    lengths = json.loads((tmp_path / "whole" / "lengths.json").read_text())
    assert lengths == {"vision": whole.model.bank.image.lengths(), "text": whole.model.bank.text.lengths(), "epoch": 2}
    assert json.loads((tmp_path / "cut" / "lengths.json").read_text()) == lengths
    whole.val_loader = None
    with pytest.raises(ConfigError, match="DPLSearch learns on val pictures too"):
        whole.train()


def _stop():
    raise KeyboardInterrupt


def found(folder, vision, text):
    folder.mkdir(exist_ok=True)
    (folder / "lengths.json").write_text(json.dumps({"vision": vision, "text": text, "epoch": 1}))
    return str(folder)


def test_training_takes_the_lengths_of_a_search_and_predictions_those_of_the_checkpoint(room, tmp_path):
    vision, text = [0, 1, 2] * 4, [3, 0] * 6
    search = found(tmp_path / "search", vision, text)
    opts = ["TRAINER.DPL.SEARCH", search, "OPTIM.MAX_EPOCH", 1, "OUTPUT_DIR", str(tmp_path / "run")]
    run(toy_cfg(room, "DPL", *opts))
    subject = toy_trainer(room, "DPL", *opts)
    assert [len(prompt) for prompt in subject.model.bank.image.parameters()] == vision
    assert [len(prompt) for prompt in subject.model.bank.text.parameters()] == text
    subject.load_model(str(tmp_path / "run"))
    other = toy_trainer(room, "DPL")  # knows of no search
    other.load_model(str(tmp_path / "run"))
    assert torch.equal(scores(other), scores(subject))
    (tmp_path / "search" / "lengths.json").unlink()
    predictor = load(tmp_path / "run", weights=room / "clip.safetensors")
    (found_,) = predictor.predict(str(next((room / "toy").glob("test-*.png"))), ["owl", "cat"])
    assert sum(found_.probabilities) == pytest.approx(1, abs=1e-4)
    evaluated = run(
        toy_cfg(room, "DPL", "OUTPUT_DIR", str(tmp_path / "new"), classes="new"), eval_only=True, model_dir=str(tmp_path / "run")
    )
    assert 0 <= evaluated.metrics["test"]["accuracy"] <= 100
    assert evaluated.config["TRAINER"]["DPL"]["SEARCH"] == ""


def test_a_record_names_no_search(room, tmp_path):
    """What a run's record names is not opened."""
    record = tmp_path / "run_config.yaml"
    record.write_text(f"TRAINER: {{NAME: DPL, DPL: {{SEARCH: {tmp_path}}}}}\n")
    with pytest.raises(ConfigError, match=r"TRAINER.DPL.SEARCH is .* which only the record of a run names"):
        make_config(["", str(record)], {}, [], [])
    cfg = make_config(["", str(record)], {}, ["TRAINER.DPL.SEARCH", str(tmp_path)], [])
    assert source_of(cfg, "TRAINER.DPL.SEARCH") == "command line"


def test_lengths_that_do_not_fit_are_refused(room, tmp_path):
    with pytest.raises(ConfigError, match=r"TRAINER.DPL.LENGTHS_TEXT is \[1, 2\], but the tower has 12 layers"):
        toy_trainer(room, "DPL", "TRAINER.DPL.LENGTHS_TEXT", (1, 2))
    with pytest.raises(DataError, match=r"no .*lengths.json; name the output folder of a run of DPLSearch"):
        toy_trainer(room, "DPL", "TRAINER.DPL.SEARCH", str(tmp_path))
    for text in ([1] * 11, [-1] * 12, ["1"] * 12, None):
        search = found(tmp_path / "search", [1] * 12, text)
        with pytest.raises(DataError, match="gives no 12 lengths for text"):
            toy_trainer(room, "DPL", "TRAINER.DPL.SEARCH", search)
    with pytest.raises(ConfigError, match=r"LENGTHS_TEXT \(set by .*\) would be ignored, since TRAINER.DPL.SEARCH"):
        toy_trainer(room, "DPL", "TRAINER.DPL.SEARCH", search, "TRAINER.DPL.LENGTHS_TEXT", (1,))


@pytest.mark.parametrize("ctx_init", ["default", "custom", "ensemble", "features"])
def test_every_kind_of_words_and_the_divergence_train(room, ctx_init):
    subject = toy_trainer(room, "DPL", "TRAINER.DPL.CTX_INIT", ctx_init, "TRAINER.DPL.KL_WEIGHT", 0.5, *three_layers(room))
    assert first_step(subject)["loss"].isfinite()
    assert all(prompt.grad.any() for prompt in subject.model.parameters())


def test_layout_of_the_authors(room, tmp_path):
    """Their checkpoint holds the frozen towers and those of the teacher too."""
    subject = toy_trainer(room, "DPL", "TRAINER.DPL.LENGTHS_VISION", (2, *[1] * 11))
    state = {
        f"prompt_learner.ctx_{theirs}_lst.{name}": prompt.detach()
        for theirs, tower in (("img", subject.model.bank.image), ("txt", subject.model.bank.text))
        for name, prompt in tower.named_parameters()
    }
    visual = subject.clip.image.visual.state_dict()
    state |= {
        f"{prefix}{name}": value for name, value in visual.items() for prefix in ("prompt_learner.ZS_image.", "image_encoder.")
    }
    state |= {"logit_scale": subject.clip.logit_scale.detach(), "text_encoder.positional_embedding": torch.zeros(77, 64)}
    save_checkpoint({"state_dict": state, "epoch": 40}, tmp_path / "theirs" / "MultiModalPromptLearner")
    other = toy_trainer(room, "DPL", seed=2)
    other.load_model(str(tmp_path / "theirs"), epoch=40)
    assert torch.equal(scores(other), scores(subject))
    ours, back = tmp_path / "ours", tmp_path / "back"
    assert main(["convert", str(tmp_path / "theirs"), str(ours), "--trainer", "DPL"]) == 0
    assert main(["convert", str(ours), str(back), "--to", "coop"]) == 0
    again = load_checkpoint(next(back.glob("MultiModalPromptLearner/model.pth.tar-*")))["state_dict"]
    assert set(again) == {name for name in state if "ctx_" in name}
    assert all(torch.equal(again[name], state[name]) for name in again)
