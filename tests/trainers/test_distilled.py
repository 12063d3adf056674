"""What methods promise, beyond the registry-wide tests, that learn from sentences, several views of a picture, or teachers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import promptmix
from promptmix.config import validate
from promptmix.cost.estimate import step_gflops
from promptmix.engine import load_checkpoint
from promptmix.errors import CheckpointError, ConfigError, DataError
from promptmix.prompts.teachers import ClassVectors
from promptmix.runs.run import run
from tests.dassl.test_model_dir import write_theirs
from tests.trainers.toy import CLASSES, first_step, scores, three_layers, toy_cfg, toy_trainer, write_backbone

VIEWS = ("DATALOADER.K_TRANSFORMS", 2, "INPUT.TRANSFORMS", ("randaugment", "normalize"))
LOW = ("TRAINER.COPROMPT.PROMPT_DEPTH", 2)


def trained(room, folder, name, *settings, stop_after=0, epochs=2):
    """Train and return what was learned, deployed and last; with ``stop_after`` an interrupted run is resumed by a second one."""
    always = ("OPTIM.MAX_EPOCH", epochs, "TEST.NO_TEST", True, "TRAIN.CHECKPOINT_FREQ", 1, "OUTPUT_DIR", str(folder))
    settings = (*three_layers(room), *settings)
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
    # The best model may be an epoch's before the resume.
    last = load_checkpoint(folder / "prompt_learner" / f"model.pth.tar-{epochs}")["state_dict"]
    return trainer.model.state_dict() | {f"last {key}": value for key, value in last.items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def test_two_views_and_drawn_sentences_resume_bitwise(room, tmp_path):
    through = trained(room, tmp_path / "through", "CoPrompt", *LOW, *VIEWS)
    assert same(through, trained(room, tmp_path / "resumed", "CoPrompt", *LOW, *VIEWS, stop_after=1))
    assert not same(through, trained(room, tmp_path / "one", "CoPrompt", *LOW, *VIEWS[2:]))


@pytest.mark.parametrize("name", ["LwEIB", "MMRL", "MMRLpp"])
def test_an_interrupted_training_ends_with_the_same_tensors(room, tmp_path, name):
    small = (f"TRAINER.{name.upper()}.REP_LAYERS", (2, 3))
    if name == "LwEIB":
        small = ("TRAINER.LWEIB.NEG_SAMPLING_RATIO", 1, "TRAINER.LWEIB.ADAPTER_END", 3, "DATALOADER.TRAIN_X.BATCH_SIZE", 2)
    through = trained(room, tmp_path / "through", name, *small)
    assert same(through, trained(room, tmp_path / "resumed", name, *small, stop_after=1))


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
    small = [part for pair in zip(small, (2, 3, 2), strict=True) for part in pair]
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


@pytest.fixture(scope="module")
def teacher(room, tmp_path_factory):
    """A finished run of IVLP on a backbone of another width, all classes."""
    folder = tmp_path_factory.mktemp("teacher")
    weights = write_backbone(folder / "clip.safetensors", width=96, layers=3)
    depth = ("TRAINER.IVLP.PROMPT_DEPTH_VISION", 2, "TRAINER.IVLP.PROMPT_DEPTH_TEXT", 2)
    settings = ("OUTPUT_DIR", str(folder / "run"), "OPTIM.MAX_EPOCH", 1, "MODEL.BACKBONE.WEIGHTS", str(weights), *depth)
    run(toy_cfg(room, "IVLP", *settings, classes="all"), quiet=True)
    key = "TRAINER.PROMPTKD.TEACHER"
    return (key, str(folder / "run"), f"{key}_WEIGHTS", str(weights))


SMALL = ("TRAINER.PROMPTKD.PROMPT_DEPTH_VISION", 2, "DATASET.UNLABELED", "all")


def test_pictures_without_labels_are_of_the_classes_that_are_asked_for(room):
    sizes = {}
    for kind in ("none", "classes", "all"):
        trainer = toy_trainer(room, "PromptKD", "DATASET.UNLABELED", kind)
        items = trainer.train_loader_x.dataset.data_source
        sizes[kind] = len(items)
        assert kind == "none" or {(item.label, item.classname) for item in items} == {(-1, "")}
    assert sizes == {"none": 12, "classes": 12, "all": 20}
    assert "acc" not in first_step(trainer)
    with pytest.raises(ConfigError, match=r"DATASET.UNLABELED is 'all' .*CoOp does not read"):
        validate(toy_cfg(room, "CoOp", "DATASET.UNLABELED", "all"))


def test_a_student_of_a_run_resumes_bitwise_and_needs_no_teacher_afterwards(room, tmp_path, teacher):
    best = ("TEST.FINAL_MODEL", "best_val", "TEST.NO_TEST", False)
    through = trained(room, tmp_path / "through", "PromptKD", *SMALL, *teacher, *best)
    assert same(through, trained(room, tmp_path / "resumed", "PromptKD", *SMALL, *teacher, *best, stop_after=1))
    assert through["bank.vectors"].shape == (5, 96) and through["bank.projector.conv1.1.running_mean"].any()
    vectors = ClassVectors.read(str(tmp_path / "through" / "class_vectors.safetensors"))
    assert vectors.names == CLASSES and vectors.teacher == "IVLP on ViT-B/16"
    assert torch.equal(vectors.vectors, through["bank.vectors"])

    for classes in ("base", "new"):
        alone = toy_trainer(room, "PromptKD", *SMALL[:2], *three_layers(room), classes=classes)  # no teacher is named
        alone.load_model(str(tmp_path / "through"))
        taught = toy_trainer(room, "PromptKD", *SMALL[:2], *three_layers(room), *teacher, classes=classes)
        taught.load_model(str(tmp_path / "through"))
        assert torch.allclose(scores(alone), scores(taught), atol=1e-5)
    task = alone._task()
    with pytest.raises(DataError, match=r"no class vectors for all of \['zebra'\].*TEACHER"):
        alone.model.bank(["zebra"])
    assert taught.model.bank(["zebra"]).shape == (1, 1, 96) and "zebra" not in task.all_classnames


def test_a_finished_student_is_evaluated_and_predicts_without_its_teacher(room, tmp_path, teacher):
    base = tmp_path / "base"
    cfg = toy_cfg(room, "PromptKD", *SMALL, *teacher, "OUTPUT_DIR", str(base), "OPTIM.MAX_EPOCH", 1)
    result = run(cfg, quiet=True)
    assert result.league == "unlabelled pictures and teacher"
    new = toy_cfg(room, "PromptKD", *SMALL[:2], "OUTPUT_DIR", str(tmp_path / "new"), "OPTIM.MAX_EPOCH", 1, classes="new")
    found = run(new, quiet=True, eval_only=True, model_dir=str(base))
    assert found.config["TRAINER"]["PROMPTKD"]["TEACHER"] == ""
    predictor = promptmix.load(base, weights=room / "clip.safetensors")
    picture = str(room / "toy" / "test-0-0.png")
    assert {*predictor.predict(picture)[0].classnames} == set(CLASSES[:3])
    assert {*predictor.predict(picture, ["cat", "lighthouse"])[0].classnames} == {"cat", "lighthouse"}
    with pytest.raises(DataError, match=r"no class vectors for all of \['cat', 'zebra'\]"):
        predictor.predict(picture, ["cat", "zebra"])


def test_class_vectors_come_from_a_file_of_the_same_teacher(room, tmp_path, teacher):
    trained(room, tmp_path / "first", "PromptKD", *SMALL, *teacher, epochs=1)
    file = ("TRAINER.PROMPTKD.CLASS_VECTORS", str(tmp_path / "first" / "class_vectors.safetensors"))
    again = toy_trainer(room, "PromptKD", *SMALL, *teacher, *file)
    monkey = again.model.bank.teacher
    monkey.vectors = lambda names: pytest.fail("the text tower of the teacher ran")
    assert first_step(again)["loss"].isfinite()
    with pytest.raises(ConfigError, match=r"those of IVLP on ViT-B/16, but the teacher is ZeroshotCLIP"):
        toy_trainer(room, "PromptKD", *SMALL, *file, "OUTPUT_DIR", str(tmp_path / "other")).train()
    Path(file[1]).write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="holds no class vectors"):
        ClassVectors.read(file[1])
    with pytest.raises(CheckpointError, match="no class vectors .*missing"):
        ClassVectors.read(str(tmp_path / "missing"))


def test_a_checkpoint_of_the_authors_brings_no_class_vectors(room, tmp_path, teacher):
    before = toy_trainer(room, "PromptKD", *SMALL, *teacher)
    first_step(before)
    write_theirs(before, "PromptKD", tmp_path)
    for more in (teacher, ()):
        after = toy_trainer(room, "PromptKD", *SMALL, *more, seed=2)
        after.load_model(str(tmp_path), epoch=3)
        if more:
            assert torch.equal(scores(after), scores(before))
        else:
            with pytest.raises(DataError, match=r"vectors have width 64, but the student learned 96; name the teacher's run"):
                scores(after)


def test_teachers_that_can_not_teach_are_refused(room, tmp_path, teacher):
    with pytest.raises(ConfigError, match=r"INPUT.PIXEL_MEAN is \[0.1"):
        toy_trainer(room, "PromptKD", *teacher, "INPUT.PIXEL_MEAN", [0.1, 0.1, 0.1])
    run(toy_cfg(room, "CoCoOp", "OUTPUT_DIR", str(tmp_path / "cocoop"), "OPTIM.MAX_EPOCH", 1), quiet=True)
    key, weights = "TRAINER.PROMPTKD.TEACHER", str(room / "clip.safetensors")
    with pytest.raises(ConfigError, match="does not score by one vector for each class"):
        toy_trainer(room, "PromptKD", key, str(tmp_path / "cocoop"), f"{key}_WEIGHTS", weights)
    with pytest.raises(DataError, match=r"no .*results.json"):
        toy_trainer(room, "PromptKD", key, str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match=r"BATCH_SIZE is 1"):
        validate(toy_cfg(room, "PromptKD", "DATALOADER.TRAIN_X.BATCH_SIZE", 1))


def test_a_students_step_is_counted_with_its_teacher(room, teacher):
    plain, taught = (step_gflops(toy_trainer(room, "PromptKD", *SMALL, *three_layers(room), *more)) for more in ((), teacher))
    assert taught > 1.2 * plain
