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

        def interrupted(after_epoch=trainer.after_epoch):
            after_epoch()
            if trainer.epoch + 1 == stop_after:
                raise KeyboardInterrupt

        trainer.after_epoch = interrupted
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


def test_the_second_view_is_the_frozen_towers(room):
    trainer = toy_trainer(room, "CoPrompt", *VIEWS)
    images, labels = trainer.parse_batch_train(next(iter(trainer.train_loader_x)))
    assert images.shape == (2, 4, 3, 32, 32) and not torch.equal(*images)
    step = trainer.model.step(images, labels)
    assert torch.equal(step.images, images[0])
    with torch.no_grad():
        assert torch.allclose(step.frozen_view, trainer.clip.encode_image(images[1]), atol=1e-6)
        assert torch.equal(trainer.model.step(images[0]).frozen_view, step.frozen_image)


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
