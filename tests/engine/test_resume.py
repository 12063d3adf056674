"""The state that a training goes on from: every random stream, every model at the same epoch, and nothing that runs code."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from promptmix.config import get_cfg_default
from promptmix.engine import TrainerBase, build_lr_scheduler, build_optimizer, load_checkpoint
from promptmix.engine.resume import get_random_states, set_random_states
from promptmix.errors import CheckpointError
from promptmix.utils import set_random_seed


class Noise(nn.Module):
    """A model with a random stream of its own."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))
        self.stream = torch.Generator().manual_seed(5)


class Drawing(TrainerBase):
    """Two models that learn from every random stream there is, and a number that is in neither."""

    def __init__(self, folder, stop=None):
        super().__init__()
        set_random_seed(1)
        self.output_dir, self.stop, self.counted = str(folder), stop, 0.0
        self.python, self.numpy, self.old = random.Random(3), np.random.default_rng(3), np.random.RandomState(3)
        cfg = get_cfg_default().OPTIM
        cfg.NAME, cfg.LR_SCHEDULER = "adam", "cosine"
        for name in ("one", "two"):
            model = Noise()
            optim = build_optimizer(model, cfg)
            self.register_model(name, model, optim, build_lr_scheduler(optim, cfg))

    def before_train(self):
        self.start_epoch = self.load_progress(self.output_dir)
        torch.rand(7), random.random()  # what happens before the first epoch doesn't count

    def run_epoch(self):
        for name in ("one", "two"):
            model = self._models[name]
            drawn = [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), self.python.gauss(0, 1)]
            drawn += [self.numpy.normal(), self.old.normal(), torch.randn(()).item(), self.counted]
            target = torch.tensor(drawn).sum() * torch.randn(4, generator=model.stream)
            if self.stop == (self.epoch, name):
                raise KeyboardInterrupt
            self.model_backward_and_update((model.weight - target).square().sum(), name)
        self.counted += target.sum().item()
        self.update_lr()

    def progress_state(self):
        return {**super().progress_state(), "counted": self.counted}

    def load_progress_state(self, state):
        super().load_progress_state(state)
        self.counted = state["counted"]


def weights(trainer):
    return torch.cat([trainer._models[name].weight.detach() for name in ("one", "two")])


def test_every_stream_and_every_model_goes_on_where_it_was(tmp_path):
    whole = Drawing(tmp_path / "whole")
    whole.train(0, 6)
    for stop in ((1, "one"), (2, "two"), (2, "one"), (5, "two")):
        with pytest.raises(KeyboardInterrupt):
            Drawing(tmp_path / "broken", stop).train(0, 6)
    last = Drawing(tmp_path / "broken")
    last.train(0, 6)
    assert last.start_epoch == 5 and torch.equal(weights(whole), weights(last))
    assert (
        random.random()
        == (set_random_states(whole, load_checkpoint(tmp_path / "whole" / "progress.pth")["random"]), random.random())[1]
    )


def test_the_state_is_plain_and_put_back_as_it_was(tmp_path):
    trainer = Drawing(tmp_path)
    trainer.train(0, 1)
    torch.load(tmp_path / "progress.pth", weights_only=True)
    states = get_random_states(trainer)
    assert set(states["generators"]) == {"trainer.numpy", "trainer.old", "trainer.python", "one..stream", "two..stream"}
    trainer.run_epoch()
    first = weights(trainer).clone()
    trainer = Drawing(tmp_path)
    trainer.load_progress(str(tmp_path))
    set_random_states(trainer, states)
    trainer.run_epoch()
    assert torch.equal(first, weights(trainer))


def test_another_trainer_or_a_damaged_state_is_refused(tmp_path):
    Drawing(tmp_path).train(0, 1)

    class Other(Drawing):
        pass

    with pytest.raises(CheckpointError, match="is of Drawing with one, two, not of Other with one, two"):
        Other(tmp_path).train(0, 2)
    (tmp_path / "progress.pth").write_bytes((tmp_path / "progress.pth").read_bytes()[:-200])
    with pytest.raises(CheckpointError, match="progress.pth.*damaged"):
        Drawing(tmp_path).train(0, 2)


def test_what_another_backbone_learned_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Drawing, "backbone_name", "tiny-en", raising=False)
    trainer = Drawing(tmp_path)
    trainer.train(0, 1)
    trainer.save_model(0, str(tmp_path))
    assert Drawing(tmp_path).resume_model_if_exist(str(tmp_path)) == 1
    monkeypatch.setattr(Drawing, "backbone_name", "tiny-vit")
    with pytest.raises(CheckpointError, match="progress.pth was learned with the backbone tiny-en"):
        Drawing(tmp_path).train(0, 2)
    (tmp_path / "progress.pth").unlink()
    with pytest.raises(CheckpointError, match="tar-1 was learned with the backbone tiny-en, .*BACKBONE.NAME tiny-vit; name"):
        Drawing(tmp_path).train(0, 2)


def test_state_that_cannot_be_stored_is_told_once_and_training_goes_on(tmp_path, capsys):
    trainer = Drawing(tmp_path)
    trainer.progress_state = lambda: {"object": object()}
    trainer.train(0, 3)
    assert capsys.readouterr().out.count("can't be resumed exactly: checkpoint.own.object is a object") == 1


def test_a_schedule_without_a_state_is_told_once_too(tmp_path, capsys):
    """M3PL's is a function of the step."""
    trainer = Drawing(tmp_path)
    trainer._scheds["one"], trainer.update_lr = (lambda step: None), lambda: None
    trainer.train(0, 3)
    assert capsys.readouterr().out.count("can't be resumed exactly: its learning-rate schedule keeps no state") == 1


@pytest.mark.parametrize(
    "change",
    [
        {"random": {}},
        {"random": {"streams": {"torch": "x"}, "generators": {}}},
        {"own": {}},
        {"models": {"one": {}, "two": {}}},
        {"models": {"one": "x", "two": 3}},
    ],
)
def test_an_odd_state_is_refused_before_training(tmp_path, change):
    Drawing(tmp_path).train(0, 1)
    state = load_checkpoint(tmp_path / "progress.pth") | change
    state.pop("digest")
    torch.save(state, tmp_path / "progress.pth")
    with pytest.raises(CheckpointError, match="progress.pth doesn't fit this run"):
        Drawing(tmp_path).train(0, 2)


def test_other_training_pictures_are_refused(tmp_path):
    def trainer(*names):
        made = Drawing(tmp_path)
        items = [SimpleNamespace(impath=f"/here/{name}", label=0, classname="a") for name in names]
        made.dm = SimpleNamespace(dataset=SimpleNamespace(train_x=items))
        return made

    trainer("1.png", "2.png").train(0, 1)
    with pytest.raises(CheckpointError, match="other training pictures than the data set has now"):
        trainer("1.png", "3.png").train(0, 2)
    trainer("1.png", "2.png").train(0, 2)
