"""What is refused before a run trains or tests: another run's folder, and settings whose numbers would mislead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from yacs.config import CfgNode as CN

from promptmix.config.yamlfile import read_yaml
from promptmix.engine.run_folder import RunFolder
from promptmix.errors import CheckpointError, ConfigError, UserError
from promptmix.runs import results
from promptmix.runs.checked import check_fields
from promptmix.runs.results import CONFIG_NAME, FILE_NAME, RunResult, plain
from promptmix.utils import get_logger


def count_learned(trainer: Any) -> int:  # a trainer with Dassl's interface
    """Count the scalars that the optimizers may change, or else those taken from the pictures; 0 = there is nothing to train."""
    models = (trainer._models[name] for name in trainer.get_model_names())
    found = [model for model in models if model is not None]
    learned = sum(p.numel() for model in found for p in model.parameters() if p.requires_grad)
    return learned or sum(getattr(model, "taken", 0) for model in found)


def refuse_other_run(new: RunResult, folder: Path, eval_only: bool, flag: str = "") -> bool:
    """Refuse a folder with another run: training would resume there and report its numbers as this run's.

    Args:
        new: what is asked for.
        folder: with a run, or with nothing.
        eval_only: only what tells runs apart counts, not every setting.
        flag: that names the folder, where it is not the output folder.

    Returns:
        Whether nothing says with which settings the run in ``folder`` was made.
    """
    if (folder / FILE_NAME).is_file():
        old = results.load(folder / FILE_NAME)
    elif (folder / CONFIG_NAME).is_file() and RunFolder(folder).has_trained():  # cut off, with something to resume
        old = _begun(folder / CONFIG_NAME)
    else:
        return True
    if new.checkpoint and old.checkpoint is None and old.learned_parameters and old.metrics:
        raise UserError(f"{folder} has the record of a training, which an evaluation would replace; choose another --output-dir")
    if not old.config:
        if flag:
            return True
        raise UserError(f"{folder} holds a run whose settings are not known; choose another --output-dir, or remove that folder")
    pairs = [(name, value, new.identity()[name]) for name, value in old.identity().items()]
    if not eval_only:
        # MAX_EPOCH too: schedules and averages follow from it, so that neither fewer nor more epochs are a part of the same run.
        ours = new.settings()
        pairs += [(k, v, ours[k]) for k, v in old.settings().items() if k in ours]
    for name, theirs, mine in pairs:
        if theirs != mine:
            remedy = "resume with the same settings" if flag else "choose another --output-dir, or remove that folder"
            raise UserError(f"{flag}{folder} holds another run ({name} is {theirs} there, {mine} here); {remedy}")
    return False


def _begun(path: Path) -> RunResult:
    """Read what a run that was cut off had been asked to do.

    Raises:
        UserError: the file is damaged.
    """
    try:
        result = RunResult.from_config(plain(read_yaml(path)))
        check_fields(result)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not the config of a run ({type(error).__name__}: {error}); choose another --output-dir, or remove it"
        ) from error
    return result


def refuse_other_method(new: RunResult, model_dir: str, learner: Any) -> None:  # a Dassl trainer's model
    """Name the trainer in ``model_dir`` where it is another: its tensors would only fit by accident."""
    path = Path(model_dir) / FILE_NAME
    if not model_dir or not path.is_file():
        return
    old = results.load(path)
    for what, theirs, ours in (("trainer", old.trainer, new.trainer), ("backbone", old.backbone, new.backbone)):
        if theirs != ours:
            raise CheckpointError(
                f"--model-dir {model_dir} holds a checkpoint of {what} {theirs}, not {ours}; "
                f"name a folder where {ours} was trained, or evaluate with {theirs}"
            )
    names = old.vocabulary.get("classnames")
    if getattr(learner, "class_specific", False) and names and names != new.vocabulary.get("classnames"):
        raise CheckpointError(
            f"--model-dir {model_dir} learned {learner.per_class} for each of its own {len(names)} classes, which can't serve "
            "other names; evaluate it on those classes, or train a method that learns nothing for each class"
        )


def refuse_class_specific(trainer: Any) -> None:  # a trainer with Dassl's interface
    """Refuse to train what can't serve the classes that it is to be evaluated on afterwards."""
    learner: Any = getattr(trainer, "model", None)
    if getattr(learner, "class_specific", False):
        name = trainer.cfg.TRAINER.NAME
        raise ConfigError(
            f"TRAINER.NAME is {name}, which learns {learner.per_class} for each class that it trains on, so it has nothing for "
            "new classes; run the protocol few-shot, or choose a method or setting that learns nothing for each class"
        )


def refuse_open_training(cfg: CN, trainer: Any, eval_only: bool) -> None:  # a trainer with Dassl's interface
    """Refuse to train on the new classes that the trained model is to be told apart from."""
    if cfg.DATASET.SUBSAMPLE_CLASSES == "open" and not eval_only and count_learned(trainer):
        raise ConfigError(
            "DATASET.SUBSAMPLE_CLASSES is 'open', which tests what was trained on the base classes; train with base, then "
            "evaluate with --eval-only --model-dir, or use `promptmix run open-world`"
        )


def refuse_untrained(cfg: CN, trainer: Any, model_dir: str) -> None:  # a trainer with Dassl's interface
    """Refuse to test what learns before it has learned anything, which tables would show as the method."""
    if not model_dir and not cfg.MODEL.INIT_WEIGHTS and count_learned(trainer):
        raise ConfigError(
            f"--eval-only without --model-dir: {cfg.TRAINER.NAME} would be tested as it is before training; "
            "name the output folder of a run that trained it"
        )


def refuse_absent_val(cfg: CN, trainer: Any) -> None:  # a trainer with Dassl's interface
    """Refuse to test on the val part where there is none: Dassl takes the test part then, which a search must not look at."""
    if cfg.TEST.SPLIT == "val" and not cfg.TEST.NO_TEST and getattr(trainer, "val_loader", True) is None:
        raise ConfigError(
            f"TEST.SPLIT is 'val', but {cfg.DATASET.NAME} has no val part here, and test pictures would stand in for it; "
            "add val pictures, or leave it at 'test'"
        )


def refuse_other_classes(before: RunResult, now: RunResult, folder: Path) -> None:
    """Refuse to go on where the data set has other classes than the run had."""
    theirs, ours = before.vocabulary.get("classnames"), now.vocabulary.get("classnames")
    if theirs and ours and theirs != ours:
        odd = sorted(set(theirs) ^ set(ours))
        what = f"{odd[0]!r} is {'gone' if odd[0] in theirs else 'new'}" if odd else "they stand in another order"
        raise UserError(
            f"{folder} holds a run on {len(theirs)} classes, and the data set now has {len(ours)} ({what}); "
            "choose another --output-dir, or remove that folder"
        )


def refuse_choice_on_test(cfg: CN, trainer: Any) -> None:  # a trainer with Dassl's interface
    """Refuse to choose the best epoch on test pictures; where a benchmark's val part is its test part (ImageNet), say so.

    Own pictures of which all are tested can't be trained on either.
    """
    if not count_learned(trainer):
        return
    dataset = getattr(getattr(trainer, "dm", None), "dataset", None)
    if getattr(dataset, "all_tested", False):
        raise ConfigError(
            f"DATASET.{cfg.DATASET.NAME.upper()}.SPLIT_RATIO is (0, 0, 1): all pictures are tested, so none are there to learn "
            "from; give the shares of train, val and test, such as (0.5, 0.2, 0.3)"
        )
    if cfg.TEST.FINAL_MODEL != "best_val" or cfg.TEST.NO_TEST:
        return
    if getattr(trainer, "val_loader", None) is None:
        raise ConfigError(
            f"TEST.FINAL_MODEL is 'best_val', but {cfg.DATASET.NAME} has no val part here, so the best epoch would be chosen on "
            "the test pictures; add val pictures, or leave it at 'last_step'"
        )
    tested = {item.impath for item in getattr(dataset, "test", None) or ()}
    both = sum(item.impath in tested for item in getattr(dataset, "val", None) or ())
    if both:
        get_logger().warning(
            "TEST.FINAL_MODEL is 'best_val', and %d val pictures of %s are test pictures: the epoch is chosen on what is tested",
            both,
            cfg.DATASET.NAME,
        )
