"""What every built-in trainer must do: the whole registry, from its defaults, on a small random CLIP."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from promptmix.config import get_cfg, merge_file, merge_opts, validate
from promptmix.engine import load_checkpoint, set_random_seed
from promptmix.errors import UserError
from promptmix.plugin_manager import get_plugin_manager
from promptmix.registry import TRAINER_REGISTRY
from promptmix.runs.run import run
from tests.trainers.toy import CLASSES, LAYERS, first_step, scores, toy_cfg, toy_trainer

get_plugin_manager()
BUILT_IN = "promptmix.trainers."  # what is installed or loaded besides has tests of its own
TRAINERS = [name for name in TRAINER_REGISTRY if TRAINER_REGISTRY.get(name).__module__.startswith(BUILT_IN)]
LEARNED = [name for name in TRAINERS if name not in ("ZeroshotCLIP", "TipAdapter", "LinearProbe", "TPT")]
#: What waits for others: pFedMoAP's gate without prompts of other clients, and what nobody reads: LwEIB's last convolution.
WAITS = {"PFedMoAP": "prompt_learner.head.", "LwEIB": "prompt_learner.bank.image.12.mlp."}
#: What they learn belongs to each class.
CLASS_SPECIFIC = {"CLAP", "PCB", "CrossModal", "FullFineTune", "LPPlusPlus", "TaskRes", "TipAdapterF"}
BASE, NEW = 3, 2
CONFIGS = Path(__file__).resolve().parents[2] / "configs"
#: Files that start with "_" are parts of others; sweeps are plans over configs, read by their own command.
YAMLS = [path for path in sorted(CONFIGS.rglob("*.yaml")) if path.name[0] != "_" and path.parent.name != "sweeps"]


def learned_tensors(trainer):
    return {f"{model}.{name}": p for model, module in trainer._models.items() for name, p in module.named_parameters()}


@dataclass(frozen=True)
class Begun:
    """What a trainer says before and after its first step, and when it saves itself."""

    first_scores: torch.Tensor
    is_held: bool
    loss: float = 0.0
    folder: Path = Path()
    state: set[str] = field(default_factory=set)
    learned: dict[str, torch.Tensor] = field(default_factory=dict)
    scores: torch.Tensor | None = None


@pytest.fixture(scope="module")
def begun(room, tmp_path_factory):
    """Return a function that builds a method, trains it for a step and saves it, once."""
    folder, made = tmp_path_factory.mktemp("saved"), {}

    def learn(name):
        trainer = toy_trainer(room, name)
        said = {"first_scores": scores(trainer)}
        if name in LEARNED:
            said["loss"] = first_step(trainer)["loss"].item()
            trainer.save_model(0, str(folder / name))
            parts = getattr(trainer.model, "components", ())
            taken = {id(buffer) for part in parts if part.needs_preparing for buffer in part.buffers()}
            taken |= {id(getattr(part, name)) for part in parts for name in part.sized_by_data}
            state = {key for key, _ in trainer.model.named_parameters()}
            state |= {key for key, buffer in trainer.model.named_buffers() if id(buffer) in taken}
            learned = {key: tensor.detach().clone() for key, tensor in learned_tensors(trainer).items()}
            said |= {"folder": folder / name, "state": state, "learned": learned, "scores": scores(trainer)}
        return weakref.ref(trainer), said

    def begin(name):
        if name not in made:
            kept, said = learn(name)
            if kept() is not None:
                gc.collect()
            made[name] = Begun(is_held=kept() is not None, **said)
        return made[name]

    return begin


@pytest.mark.parametrize("name", TRAINERS)
def test_builds_from_its_defaults_and_scores_every_class(name, begun):
    found = begun(name).first_scores
    assert found.shape == (2 * BASE, BASE)
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    assert not begun(name).is_held, "something keeps each trainer that was ever built"


@pytest.mark.parametrize("name", LEARNED)
def test_every_learned_tensor_and_no_other_gets_a_gradient(room, name):
    trainer = toy_trainer(room, name)
    before = {key: value.clone() for key, value in trainer.clip.state_dict().items()}
    waits = WAITS.get(name, "-")
    learned = {key: tensor for key, tensor in learned_tensors(trainer).items() if not key.startswith(waits)}
    assert learned
    with torch.no_grad():
        for tensor in learned.values():
            if tensor.dim() > 1 and tensor.numel() and not tensor.any():
                tensor.normal_(std=0.02)  # one factor of a product that starts at zero hides the other's gradient
    reached = set()
    for stage in range(max(len(trainer.stages.stages), 1)):
        first_step(trainer, stage)
        reached |= {key for key, p in learned.items() if p.grad is not None and p.grad.any()}
    # A template may end with the class name, so that its context behind the name is empty.
    assert [key for key, p in learned.items() if p.numel() and key not in reached] == []
    assert [key for key, p in trainer.clip.named_parameters() if p.grad is not None or p.requires_grad] == []
    assert all(torch.equal(value, before[key]) for key, value in trainer.clip.state_dict().items())


@pytest.mark.parametrize("name", LEARNED)
def test_same_seed_same_scores_and_loss(room, name, begun):
    before = begun(name)  # first, since building it draws random numbers
    trainer = toy_trainer(room, name)
    assert torch.equal(scores(trainer), before.first_scores)
    assert first_step(trainer)["loss"].item() == before.loss


@pytest.mark.parametrize("name", LEARNED)
def test_checkpoint_holds_what_was_learned_and_nothing_else(room, name, begun):
    before = begun(name)
    assert set(load_checkpoint(before.folder / "prompt_learner" / "model.pth.tar-1")["state_dict"]) == before.state
    other = toy_trainer(room, name, seed=2)
    other.load_model(str(before.folder), epoch=1)
    assert torch.equal(scores(other), before.scores)


@pytest.mark.parametrize("name", sorted(set(LEARNED) - CLASS_SPECIFIC))
def test_base_checkpoint_evaluates_on_new_classes(room, name, begun):
    before = begun(name)
    new = toy_trainer(room, name, classes="new", seed=2)
    new.load_model(str(before.folder), epoch=1)
    assert scores(new).shape == (2 * NEW, NEW)
    assert 0 <= new.test() <= 100
    ours = learned_tensors(new)
    assert all(torch.equal(value, before.learned[key]) for key, value in ours.items())


@pytest.mark.parametrize("name", sorted(CLASS_SPECIFIC))
def test_what_belongs_to_classes_refuses_others(room, name, begun):
    new = toy_trainer(room, name, classes="new")
    assert new.model.class_specific and new.model.per_class
    with pytest.raises(UserError):
        new.load_model(str(begun(name).folder), epoch=1)


@pytest.mark.parametrize(("name", "option"), [("CoOp", "TRAINER.COOP.CSC"), ("Mixture", "PROMPT_BANK.SOFT.CSC")])
def test_class_specific_contexts_refuse_new_classes(room, name, option, tmp_path):
    trainer = toy_trainer(room, name, option, True)
    first_step(trainer)
    trainer.save_model(0, str(tmp_path))
    with pytest.raises(UserError, match=r"ctx|class") as refusal:
        toy_trainer(room, name, option, True, classes="new").load_model(str(tmp_path), epoch=1)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.relative_to(CONFIGS).as_posix())
def test_shipped_config_merges_and_validates(room, path):
    cfg = get_cfg()
    merge_file(cfg, path)
    merge_opts(cfg, ["TRAINER.NAME", cfg.TRAINER.NAME or trainer_of(path)], source="the test")
    merge_opts(cfg, ["DATASET.NAME", cfg.DATASET.NAME or "ToyPictures"], source="the test")
    validate(cfg)


def trainer_of(path: Path) -> str:
    """Configs of a method lie in a folder of its name; data sets and the quick start serve every trainer."""
    return path.parent.name if path.parent.parent.name == "trainers" else "ZeroshotCLIP"


@pytest.mark.parametrize("name", [name for name in TRAINERS if CONFIGS.joinpath("trainers", name, "tiny.yaml").is_file()])
def test_tiny_config_runs_on_the_embedded_backbone(room, name):
    cfg = toy_cfg(room, name)
    merge_file(cfg, CONFIGS / "trainers" / name / "tiny.yaml")
    ours = {"DATASET.NAME": "ToyPictures", "DATASET.SOURCE_DOMAINS": ()}
    ours |= {"DATALOADER.TRAIN_X.BATCH_SIZE": 2, "DATALOADER.TEST.BATCH_SIZE": 2}
    plain = {"MODEL.BACKBONE.WEIGHTS": "", "MODEL.BACKBONE.PRETRAINED": False}
    merge_opts(cfg, [part for pair in {**ours, **plain}.items() for part in pair], source="the test")
    validate(cfg)
    set_random_seed(1)
    trainer = TRAINER_REGISTRY.get(name)(cfg)
    assert scores(trainer).isfinite().all()
    if name in LEARNED:
        assert first_step(trainer)["loss"].isfinite()


def test_defaults_fit_the_toy():
    """The toy has as many layers as ViT-B/16 and an odd number of classes; otherwise the tests above would show less."""
    assert LAYERS == 12
    assert len(CLASSES) == BASE + NEW


def test_a_run_that_ended_is_held_by_nothing(room, tmp_path):
    """Otherwise each run of a long process would cost its weights' memory."""
    trainers = []
    cfg = toy_cfg(room, "CoOp", "OPTIM.MAX_EPOCH", 1, "OUTPUT_DIR", str(tmp_path))
    run(cfg, quiet=True, on_epoch=lambda trainer: trainers.append(weakref.ref(trainer)))
    gc.collect()
    assert [trainer() for trainer in trainers] == [None]
