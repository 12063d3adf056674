"""What methods promise, beyond the registry-wide tests, that learn from sentences, several views of a picture, or teachers."""

from __future__ import annotations

import pytest
import torch

from promptmix.config import validate
from promptmix.errors import ConfigError, DataError
from tests.trainers.toy import CLASSES, first_step, scores, toy_cfg, toy_trainer

VIEWS = ("DATALOADER.K_TRANSFORMS", 2, "INPUT.TRANSFORMS", ("randaugment", "normalize"))


def trained(room, folder, name, *settings, stop_after=0, epochs=3):
    """Train and return the learned tensors and buffers; with ``stop_after`` an interrupted run is resumed by a second one."""
    always = ("OPTIM.MAX_EPOCH", epochs, "TEST.NO_TEST", True, "TRAIN.CHECKPOINT_FREQ", 1, "OUTPUT_DIR", str(folder))
    trainer = toy_trainer(room, name, *always, *settings)
    if stop_after:

        def interrupted(save_progress=trainer.save_progress):
            save_progress()
            if trainer.epoch + 1 == stop_after:
                raise KeyboardInterrupt

        trainer.save_progress = interrupted
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        trainer = toy_trainer(room, name, *always, *settings)
    trainer.train()
    return trainer.model.state_dict()


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def test_two_views_and_drawn_sentences_resume_bitwise(room, tmp_path):
    through = trained(room, tmp_path / "through", "CoPrompt", *VIEWS)
    assert same(through, trained(room, tmp_path / "resumed", "CoPrompt", *VIEWS, stop_after=2))
    assert not same(through, trained(room, tmp_path / "one", "CoPrompt", *VIEWS[2:]))


@pytest.mark.parametrize("name", ["LwEIB", "MMRL", "MMRLpp"])
def test_an_interrupted_training_ends_with_the_same_tensors(room, tmp_path, name):
    small = ("TRAINER.LWEIB.NEG_SAMPLING_RATIO", 1, "DATALOADER.TRAIN_X.BATCH_SIZE", 2) if name == "LwEIB" else ()
    through = trained(room, tmp_path / "through", name, *small)
    assert same(through, trained(room, tmp_path / "resumed", name, *small, stop_after=2))


def test_the_second_view_is_the_frozen_towers(room):
    trainer = toy_trainer(room, "CoPrompt", *VIEWS)
    images, labels = trainer.parse_batch_train(next(iter(trainer.train_loader_x)))
    assert images.shape == (2, 4, 3, 32, 32) and not torch.equal(*images)
    step = trainer.model.step(images, labels)
    assert torch.equal(step.images, images[0])
    with torch.no_grad():
        assert torch.allclose(step.frozen_view, trainer.clip.encode_image(images[1]), atol=1e-6)
        assert torch.equal(trainer.model.step(images[0]).frozen_view, step.frozen_image)


def test_hicropl_resumes_bitwise_in_both_readings(room, tmp_path):
    small = [f"TRAINER.HICROPL.{key}" for key in ("N_CTX", "PROMPT_DEPTH", "CROSS_LAYER")]
    small = [part for pair in zip(small, (2, 4, 2), strict=True) for part in pair]
    ends = {}
    for mapping in ("learned", "written"):
        settings = (*small, "TRAINER.HICROPL.MAPPING", mapping, "TEST.FINAL_MODEL", "best_val", "TEST.NO_TEST", False)
        ends[mapping] = trained(room, tmp_path / mapping, "HiCroPL", *settings)
        assert same(ends[mapping], trained(room, tmp_path / f"{mapping}-2", "HiCroPL", *settings, stop_after=1))
    assert not same(*ends.values())


@pytest.mark.parametrize("mapping", ["learned", "written"])
def test_hicropl_is_changed_by_evaluation_as_published_alone(room, mapping):
    trainer = toy_trainer(room, "HiCroPL", "TRAINER.HICROPL.MAPPING", mapping)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    first, second = scores(trainer), scores(trainer)
    assert same(trainer.model.state_dict(), before) == torch.equal(first, second) == (mapping == "learned")


def test_hicropl_counts_as_learned_what_learns(room):
    learned, written = (toy_trainer(room, "HiCroPL", "TRAINER.HICROPL.MAPPING", mapping) for mapping in ("learned", "written"))
    numbers = [sum(p.numel() for p in trainer.model.parameters() if p.requires_grad) for trainer in (learned, written)]
    assert numbers[1] == 2 * 12 * 16 * 64 < numbers[0]
    assert learned.model.state_dict().keys() == written.model.state_dict().keys()


def test_hicropl_needs_sentences_about_every_class_it_tells_apart(room, tmp_path):
    file = tmp_path / "few.json"
    file.write_text('{"barn owl": ["A pale owl.", "An owl."], "pine_tree": ["A tree."], "red double decker bus": ["A bus."]}')
    settings = ("DATASET.DESCRIPTIONS", str(file))
    assert scores(toy_trainer(room, "HiCroPL", *settings)).isfinite().all()
    with pytest.raises(DataError, match=r"no sentences for 2 of 2 classes"):
        toy_trainer(room, "HiCroPL", *settings, classes="new")
    with pytest.raises(ConfigError, match=r"TRAINER.HICROPL.CROSS_LAYER is 12, .* below PROMPT_DEPTH 12"):
        toy_trainer(room, "HiCroPL", "TRAINER.HICROPL.CROSS_LAYER", 12)


@pytest.mark.parametrize(("name", "views", "said"), [("MaPLe", 2, "reads one view"), ("CoPrompt", 3, "at most 2 views")])
def test_views_that_nobody_reads_are_refused(room, name, views, said):
    with pytest.raises(ConfigError, match=rf"K_TRANSFORMS is {views} .*{said}"):
        validate(toy_cfg(room, name, "DATALOADER.K_TRANSFORMS", views))


def test_sentences_are_for_training_alone(room, tmp_path):
    """A class without a sentence stops the training before its first step, and no evaluation."""
    file = tmp_path / "few.json"
    file.write_text('{"barn owl": ["A pale owl."], "cat": ["A small cat."]}')
    trainer = toy_trainer(room, "CoPrompt", "DATASET.DESCRIPTIONS", str(file), "OUTPUT_DIR", str(tmp_path / "out"))
    assert scores(trainer).shape[1] == 3
    with pytest.raises(DataError, match=r"few.json has no sentences for 2 of 3 classes: 'pine_tree'"):
        trainer.train()
    uneven = {name: ["One."] * (1 + (name == "barn owl")) for name in CLASSES}
    file.write_text(str(uneven).replace("'", '"'))
    with pytest.raises(DataError, match=r"2 sentences for 'barn owl' but 1 for 'pine_tree'"):
        first_step(toy_trainer(room, "CoPrompt", "DATASET.DESCRIPTIONS", str(file)))
