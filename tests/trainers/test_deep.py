"""Deep prompts as trainers: what they refuse and how they say it, resuming, and precision."""

from __future__ import annotations

import pytest
import torch

from promptmix.config import merge_opts, validate
from promptmix.engine import build_trainer
from promptmix.errors import ConfigError
from tests.trainers.toy import first_step, scores, three_layers, toy_cfg, toy_trainer

VISUAL = ["VPT", "IVLP", "MaPLe", "PromptSRC", "MPL", "PMPO"]
EMBEDDED = ("MODEL.BACKBONE.NAME", "tiny-en", "MODEL.BACKBONE.WEIGHTS", "", "MODEL.BACKBONE.PRETRAINED", False)
RESNET = (
    "MODEL.BACKBONE.NAME",
    "RN50",
    "MODEL.BACKBONE.WEIGHTS",
    "",
    "MODEL.BACKBONE.PRETRAINED",
    False,
    "INPUT.SIZE",
    (224, 224),
)


def refusal(room, trainer, *opts):
    with pytest.raises(ConfigError) as error:
        toy_trainer(room, trainer, *opts)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("trainer", VISUAL)
def test_convolutional_image_tower_is_refused_with_the_trainers_name(room, trainer):
    message = refusal(room, trainer, *EMBEDDED)
    for part in ("MODEL.BACKBONE.NAME is tiny-en", "takes no prompts", "ViT-B/16", "tiny-vit"):
        assert part in message


def test_resnet_is_refused_when_the_model_is_built(room):
    message = refusal(room, "MaPLe", *RESNET)
    assert "MODEL.BACKBONE.NAME is RN50, whose image tower (ModifiedResNet) takes no prompts" in message


@pytest.mark.parametrize(
    ("trainer", "key", "tower"),
    [
        ("VPT", "PROMPT_DEPTH_VISION", "image"),
        ("IVLP", "PROMPT_DEPTH_TEXT", "text"),
        ("IVLP", "PROMPT_DEPTH_VISION", "image"),
        ("PromptSRC", "PROMPT_DEPTH_VISION", "image"),
        ("MaPLe", "PROMPT_DEPTH", "text"),
        ("MPL", "PROMPT_DEPTH", "text"),
        ("PMPO", "PROMPT_DEPTH", "image"),
        ("PMPO", "TEXT_DEPTH", "text"),
    ],
)
def test_depth_above_the_layers_names_key_value_and_limit(room, trainer, key, tower):
    full = f"TRAINER.{trainer.upper()}.{key}"
    assert refusal(room, trainer, full, 13).startswith(f"{full} is 13, but the {tower} tower of ViT-B/16 has 12 layers")
    assert scores(toy_trainer(room, trainer, full, 12)).isfinite().all()


@pytest.mark.parametrize(
    ("trainer", "opts", "parts"),
    [
        ("MaPLe", ("TRAINER.MAPLE.PROMPT_DEPTH", 0), ("TRAINER.MAPLE.PROMPT_DEPTH is 0", "1 or more")),
        ("MaPLe", ("TRAINER.MAPLE.N_CTX", 5), ("TRAINER.MAPLE.N_CTX is 5", "'a photo of a' has only 4 tokens", "CTX_INIT to ''")),
        ("IVLP", ("TRAINER.IVLP.N_CTX_VISION", 0), ("N_CTX_VISION is 0 and", "PROMPT_DEPTH_VISION is 9", "set both to 0")),
        ("IVLP", ("TRAINER.IVLP.N_CTX_TEXT", 5), ("TRAINER.IVLP.N_CTX_TEXT is 5",)),
        ("PromptSRC", ("TRAINER.PROMPTSRC.GPA_STD", 0), ("TRAINER.PROMPTSRC.GPA_STD is 0", "more than 0")),
        ("MPL", ("TRAINER.MPL.N_RM_OP", 2), ("TRAINER.MPL.N_RM_OP is 2", "set it to 1 or less")),
        ("PMPO", ("TRAINER.PMPO.N_PROMPTS", 10), ("TRAINER.PMPO.PROMPT_DEPTH is 9", "N_PROMPTS = 10")),
        ("PMPO", ("TRAINER.PMPO.MANUAL_WEIGHT", 1.0), ("MANUAL_WEIGHT is 1.0", "less than 1")),
        (
            "PMPO",
            ("TRAINER.PMPO.MANUAL_WEIGHT", 0, "TRAINER.PMPO.MANUAL_TEMPLATES", ("a {}.",)),
            ("MANUAL_TEMPLATES would be ignored",),
        ),
        ("VPT", ("TRAINER.VPT.CTX_INIT", "a photo of a {}."), ("TRAINER.VPT.CTX_INIT", "in front of the class name")),
    ],
)
def test_numbers_that_cannot_work_are_refused(room, trainer, opts, parts):
    message = refusal(room, trainer, *opts)
    for part in parts:
        assert part in message


def test_random_start_takes_any_number_of_tokens(room):
    trainer = toy_trainer(room, "MaPLe", "TRAINER.MAPLE.CTX_INIT", "", "TRAINER.MAPLE.N_CTX", 6)
    assert trainer.model.bank.text.ctx.shape == (6, 64)
    assert first_step(trainer)["loss"].isfinite()


def test_language_prompts_alone_run_on_any_image_tower(room):
    alone = ("TRAINER.IVLP.N_CTX_VISION", 0, "TRAINER.IVLP.PROMPT_DEPTH_VISION", 0, "TRAINER.IVLP.PROMPT_DEPTH_TEXT", 4)
    cfg = toy_cfg(room, "IVLP", *alone, *EMBEDDED)
    merge_opts(cfg, ["INPUT.SIZE", (64, 64)], source="the test")
    validate(cfg)
    trainer = build_trainer(cfg)
    assert trainer.model.image_is_frozen
    assert {key.split(".")[1] for key in trainer.model.state_dict()} == {"text"}
    assert first_step(trainer)["loss"].isfinite()


@pytest.mark.parametrize("trainer", VISUAL)
def test_bf16_stays_near_fp32(room, trainer):
    exact, rounded = (scores(toy_trainer(room, trainer, "TRAINER.PREC", prec)) for prec in ("fp32", "bf16"))
    assert (exact - rounded).abs().max() < 0.05 * 14  # the largest score is the temperature, 14
    assert first_step(toy_trainer(room, trainer, "TRAINER.PREC", "bf16"))["loss"].isfinite()


def test_average_of_weights_survives_a_resume(room, tmp_path):
    """An interrupted run ends at the very weights of one that ran through, which are the average and not the last ones."""
    settings = ("TRAINER.PROMPTSRC.GPA_MEAN", 2, "OPTIM.MAX_EPOCH", 3, "OPTIM.LR_SCHEDULER", "cosine", "TEST.NO_TEST", True)
    settings += ("TRAIN.CHECKPOINT_FREQ", 1, "DATALOADER.TRAIN_X.SAMPLER", "SequentialSampler", *three_layers(room))
    settings += ("TRAINER.PROMPTSRC.PROMPT_DEPTH_TEXT", 2, "TRAINER.PROMPTSRC.PROMPT_DEPTH_VISION", 2)

    def run(folder, epochs):
        trainer = toy_trainer(room, "PromptSRC", *settings, "OUTPUT_DIR", str(tmp_path / folder))
        last = {}
        written = trainer.average.write_to

        def write_to(learner):
            last.update({name: p.detach().clone() for name, p in learner.named_parameters()})
            written(learner)

        trainer.average.write_to = write_to
        for epoch in range(trainer.resume_model_if_exist(trainer.output_dir), epochs):
            trainer.epoch = epoch
            trainer.run_epoch()
            trainer.after_epoch()
        return dict(trainer.model.named_parameters()), last

    through, last = run("through", 3)
    for stop in (1, 2):
        run(f"resumed {stop}", stop)
        resumed, _ = run(f"resumed {stop}", 3)
        assert all(torch.equal(value, through[name]) for name, value in resumed.items())
    assert not any(torch.equal(value, last[name]) for name, value in through.items())
