"""`--model-dir` with folders of the authors' code and with converted ones, for every method of the table."""

from __future__ import annotations

import pytest
import torch

from promptmix.engine import convert
from promptmix.errors import CheckpointError
from promptmix.plugin_manager import get_plugin_manager
from promptmix.registry import DATASET_REGISTRY
from tests.trainers import toy


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model_dir")
    toy.draw(folder / "toy")
    toy.write_backbone(folder / "clip.safetensors")
    get_plugin_manager()  # what promptmix brings must not go with the layer
    with DATASET_REGISTRY.layer():
        DATASET_REGISTRY.register(toy.ToyPictures)
        yield folder


def options(name):
    depth = {"MaPLe": "PROMPT_DEPTH", "MPL": "PROMPT_DEPTH", "VPT": "PROMPT_DEPTH_VISION"}.get(name)
    return (f"TRAINER.{name.upper()}.{depth}", 3) if depth else ()


def shaken(trainer, seed=0):
    """Give every learned tensor another value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for model in trainer._models.values():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return trainer


def write_theirs(trainer, name, folder):
    """Write what the authors' code would: the table's names, class-name buffers, the frozen image tower where they save it."""
    models = {key: dict(model.state_dict()) for key, model in trainer._models.items()}
    state = convert.to_theirs(convert.Learned(name, models, "the test"))
    layout = convert.layouts()[name]
    prefix = "prompt_learner." if layout.whole else ""
    state[f"{prefix}token_prefix"] = torch.zeros(3, 1, 64)
    if layout.whole:
        frozen = {f"image_encoder.{key}": tensor for key, tensor in trainer.clip.image.visual.state_dict().items()}
        state = {**frozen, **state}
    path = folder / layout.folder
    path.mkdir(parents=True)
    torch.save({"state_dict": state, "epoch": 3, "val_result": None}, path / "model.pth.tar-3")


@pytest.mark.parametrize("name", list(convert.layouts()))
def test_scores_are_those_of_the_trainer_that_wrote_it(room, tmp_path, name):
    before = shaken(toy.toy_trainer(room, name, *options(name)))
    expected = toy.scores(before)
    write_theirs(before, name, tmp_path / "theirs")
    after = shaken(toy.toy_trainer(room, name, *options(name)), seed=1)
    assert not torch.allclose(toy.scores(after), expected, atol=1e-4)
    after.load_model(str(tmp_path / "theirs"), epoch=3)
    assert torch.equal(toy.scores(after), expected)

    if name != "PromptSRC":  # whose running average belongs to our export
        convert.write_ours(convert.read(tmp_path / "theirs", trainer=name), tmp_path / "ours")
        shaken(after, seed=2).load_model(str(tmp_path / "ours"))
        assert torch.equal(toy.scores(after), expected)


def test_an_export_of_our_own_run_has_every_model(room, tmp_path):
    before = shaken(toy.toy_trainer(room, "PromptSRC"))
    before.save_model(2, str(tmp_path / "run"))
    convert.write_ours(convert.read(tmp_path / "run"), tmp_path / "export")
    after = shaken(toy.toy_trainer(room, "PromptSRC"), seed=1)
    after.load_model(str(tmp_path / "export"), epoch=3)
    assert torch.equal(toy.scores(after), toy.scores(before))


def test_trained_layer_norms_are_loaded_or_missed(room, tmp_path):
    before = shaken(toy.toy_trainer(room, "MoCoOp", "TRAINER.MOCOOP.TUNE_LAYERNORM", True))
    write_theirs(before, "MoCoOp", tmp_path)
    after = toy.toy_trainer(room, "MoCoOp", "TRAINER.MOCOOP.TUNE_LAYERNORM", True)
    after.load_model(str(tmp_path), epoch=3)
    assert torch.equal(toy.scores(after), toy.scores(before))
    with pytest.raises(CheckpointError, match=r"ln_1.* differs .*TRAINER.MOCOOP.TUNE_LAYERNORM where layer norms were trained"):
        toy.toy_trainer(room, "MoCoOp").load_model(str(tmp_path), epoch=3)


def test_another_context_length_is_refused(room, tmp_path):
    write_theirs(toy.toy_trainer(room, "CoOp", "TRAINER.COOP.N_CTX", 4), "CoOp", tmp_path)
    with pytest.raises(CheckpointError, match=r"bank.ctx is \(1, 4, 64\) there and \(1, 16, 64\) here"):
        toy.toy_trainer(room, "CoOp").load_model(str(tmp_path), epoch=3)
