"""Precision and device: what is allowed where, and what an update does."""

import pytest
import torch
from torch import nn

from promptmix.engine import Precision, choose_device
from promptmix.errors import ConfigError


def test_device_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto", True).type == choose_device("cpu", True).type == "cpu"
    with pytest.raises(ConfigError, match="sees no GPU; set it to 'auto' or 'cpu'"):
        choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto", True).type == choose_device("cuda", True).type == "cuda"
    assert choose_device("auto", False).type == choose_device("cpu", True).type == "cpu"
    with pytest.raises(ConfigError, match="USE_CUDA is False"):
        choose_device("cuda", False)
    with pytest.raises(ConfigError, match="DEVICE is 'gpu'.*auto, cpu, cuda"):
        choose_device("gpu")


def test_fp16_is_refused_on_a_cpu_and_unknown_names_anywhere():
    with pytest.raises(ConfigError, match="'amp'.*needs a GPU.*bf16 or fp32"):
        Precision("amp", "cpu")
    with pytest.raises(ConfigError, match="TRAINER.PREC is 'fp16'.*fp32, amp, bf16"):
        Precision("fp16", "cpu")


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_autocast_types(name, dtype):
    with Precision(name, "cpu").autocast():
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == dtype
    assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.float32


def test_update_equals_the_plain_steps():
    models = [nn.Linear(3, 1), nn.Linear(3, 1)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    precision = Precision("fp32", "cpu")
    for _ in range(2):
        precision.backward_and_update(models[0](torch.ones(2, 3)).square().sum(), [optimizers[0]])
        optimizers[1].zero_grad()
        models[1](torch.ones(2, 3)).square().sum().backward()
        optimizers[1].step()
    assert torch.equal(models[0].weight, models[1].weight)


def test_clipping_limits_the_joint_norm_of_what_is_named():
    a, b = nn.Parameter(torch.tensor([3.0])), nn.Parameter(torch.tensor([4.0]))
    optimizers = [torch.optim.SGD([a], lr=1.0), torch.optim.SGD([b], lr=1.0)]
    precision = Precision("fp32", "cpu")
    precision.backward_and_update((a * a + b * b).sum() / 2, optimizers, clip_norm=1.0)
    assert (a.item(), b.item()) == (pytest.approx(2.4, abs=1e-5), pytest.approx(3.2, abs=1e-5))
    precision.backward_and_update((a + b).sum(), optimizers, parameters=[a], clip_norm=0.5)
    assert (a.item(), b.item()) == (pytest.approx(1.9, abs=1e-5), pytest.approx(2.2, abs=1e-5))


@pytest.mark.parametrize("was", [False, True])
def test_gradients_below_normal_numbers_are_zero_in_backward_only(was):
    weight = nn.Parameter(torch.ones(1))
    optimizer, given = torch.optim.SGD([weight], lr=0.0), torch.full((1,), 1e-30)
    torch.set_flush_denormal(was)
    torch.set_default_dtype(torch.float64)  # as a plugin may
    try:
        Precision("fp32", "cpu").backward_and_update((weight * given * 1e-9).sum(), [optimizer])
        assert weight.grad.item() == 0.0
        assert ((given * 1e-9).item() == 0.0) is was  # as before
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_flush_denormal(False)


def test_backward_of_the_trainer_is_used():
    weight = nn.Parameter(torch.ones(1))
    seen = []

    def check(loss):
        seen.append(loss.item())
        loss.backward()

    optimizer = torch.optim.SGD([weight], lr=0.5)
    Precision("bf16", "cpu").backward_and_update(weight.sum() * 2, [optimizer], backward=check)
    assert seen == [2.0]
    assert weight.item() == 0.0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_amp_scales_and_unscales():
    model = nn.Linear(3, 1).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    precision = Precision("amp", "cuda")
    with precision.autocast():
        loss = model(torch.ones(2, 3).cuda()).float().square().sum()
    precision.backward_and_update(loss, [optimizer], clip_norm=0.5)
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert norm.item() <= 0.51
