"""Training does not wait for the device in each step, and reports the same numbers as if it did."""

from __future__ import annotations

import pytest
import torch

from promptmix.engine.meters import AverageMeter, MetricMeter
from tests.trainers.toy import toy_trainer


class OnDevice(torch.Tensor):
    """A CPU tensor that claims to lie on a GPU, and counts who waits for it."""

    waited = 0

    @property
    def device(self):
        return torch.device("cuda")

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.__bool__, torch.Tensor.__float__):
            OnDevice.waited += 1
        return super().__torch_function__(func, types, args, kwargs or {})


def on_device(value):
    return torch.tensor(value).as_subclass(OnDevice)


@pytest.mark.parametrize("ema", [False, True])
def test_meters_add_up_on_the_device_to_the_same_numbers(ema):
    here, there = AverageMeter(ema), AverageMeter(ema)
    OnDevice.waited = 0
    for value in (0.1, 2.3, 0.7, 1e4):
        here.update(torch.tensor(value), 3)
        there.update(on_device([value]), 3)
    assert OnDevice.waited == 0
    assert (here.val, here.avg, here.sum, here.count) == (there.val, there.avg, there.sum, there.count)
    assert OnDevice.waited > 0


def test_a_run_waits_at_printed_lines_only_and_prints_the_same(room, tmp_path, monkeypatch, capsys):
    seen = []
    for pretend in (False, True):
        opts = ["TRAIN.PRINT_FREQ", 2, "DATALOADER.TRAIN_X.BATCH_SIZE", 3, "OPTIM.MAX_EPOCH", 2, "TEST.NO_TEST", True]
        trainer = toy_trainer(room, "CoOp", *opts, "OUTPUT_DIR", str(tmp_path / str(pretend)))
        trainer.waits_to_check = pretend
        original, scalars, waits = trainer.forward_backward, [], []

        def step(batch, original=original, waits=waits, pretend=pretend):
            waits.append(OnDevice.waited)
            return {name: value.as_subclass(OnDevice) if pretend else value for name, value in original(batch).items()}

        monkeypatch.setattr(trainer, "forward_backward", step)
        monkeypatch.setattr(trainer, "write_scalar", lambda *scalar, scalars=scalars: scalars.append(scalar))
        OnDevice.waited = 0
        capsys.readouterr()
        trainer.train()
        lines = [line.split(" loss ")[1].split(" eta ")[0] for line in capsys.readouterr().out.splitlines() if " loss " in line]
        seen.append((lines, scalars))
    assert seen[0] == seen[1] and len(seen[0][0]) == 4
    assert waits[1] == waits[0] == 0 and waits[2] > 0 and waits[3] == waits[2]


@pytest.mark.parametrize("waits", [False, True])
def test_a_bad_loss_stops_the_run(room, tmp_path, monkeypatch, waits):
    trainer = toy_trainer(room, "CoOp", "OUTPUT_DIR", str(tmp_path))
    trainer.waits_to_check = waits
    trainer.model.bank.ctx.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="infinite or NaN"):
        trainer.train()
    assert not list(tmp_path.glob("*/model.pth*"))


def test_meters_print_in_dassls_form():
    meter = MetricMeter()
    meter.update({"loss": on_device(0.5), "acc": on_device([50.0])})
    assert str(meter) == "loss 0.5000 (0.5000) acc 50.0000 (50.0000)"
