"""Every method's step where a GPU would be: tensors that know their device and no numbers tell what meets on two of them.

This stands in for a run on a GPU, which also has kernels, streams and a backward pass of its own; none of those run here.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import promptmix.engine.trainer
import promptmix.prompts.trainer
from tests.trainers.test_all import TRAINERS
from tests.trainers.toy import shallow, three_layers, toy_trainer

#: PyTorch 2.6 asks the GPU's driver while it follows tensors without numbers, and ends the process where there is none.
pytestmark = pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="PyTorch 2.6 has no stand-in of a GPU")

GPU = torch.device("cuda", 0)
FAKE = FakeTensorMode(allow_non_fake_inputs=True)  # one for all, since tables that follow from class names are kept
#: Of each way to learn one or two methods; ``EVERY_METHOD=1`` takes all but ``APART``, which needs some minutes.
METHODS = (
    *("CoOp", "CoCoOp", "MoCoOp", "MoPD", "MaPLe", "ProGrad", "GMoP", "PLOT", "GalLoP"),
    *("TCP", "MMA", "CLIPLoRA", "PCB", "TaskRes", "TipAdapterF"),
)
#: What they change lies in the first layers.
LOW = {
    "MaPLe": ("TRAINER.MAPLE.PROMPT_DEPTH", 2),
    "TCP": ("TRAINER.TCP.LAYER", 1),
    "MMA": ("TRAINER.MMA.ADAPTER_START", 2, "TRAINER.MMA.ADAPTER_END", 3),
}
#: They ask for numbers while they are built or route: names that a checkpoint keeps as bytes, clusters of tokens.
APART = ("PromptKD", "TRIP")
#: Methods that wait for the device in each training step, and for what.
WAIT = dict.fromkeys(("PLOT", "PLOTpp"), "whether a transport plan has settled")


class Waits(Exception):
    """A step asked the device for a number."""


class StandIn(torch.overrides.TorchFunctionMode):
    """Tensors on ``cuda`` have shape, type and device alone; those on the CPU stay as they are.

    Attributes:
        strict: a number that is asked of the device is refused; otherwise it is 1.
    """

    ASKING = {torch.Tensor.item: 1, torch.Tensor.__float__: 1.0, torch.Tensor.__int__: 1, torch.Tensor.__bool__: True}

    def __init__(self) -> None:
        super().__init__()
        self.strict = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        given = [*args, *(kwargs or {}).values()]
        on_gpu = any(isinstance(part, FakeTensor) for part in flat(given))
        if on_gpu and (func in self.ASKING or func in (torch.Tensor.tolist, torch.bincount, torch.Tensor.bincount)):
            if self.strict:
                raise Waits(func.__name__)
            if func in self.ASKING:
                return self.ASKING[func]
            return args[0].new_ones(kwargs["minlength"]) if kwargs else torch.ones(args[0].shape).tolist()
        if on_gpu or any(names_gpu(part) for part in given):
            with FAKE:
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def flat(parts):
    for part in parts:
        if isinstance(part, (list, tuple)):
            yield from flat(part)
        else:
            yield part


def names_gpu(part):
    return isinstance(part, (str, torch.device)) and str(part).startswith("cuda")


def moved(module, device):
    """``nn.Module.to``, which can't put a tensor without numbers in the place of one with them."""
    made = {}
    for part in module.modules():
        for name, own in part._parameters.items():
            if own is not None and id(own) not in made:
                made[id(own)] = own, torch.nn.Parameter(own.detach().to(device), requires_grad=own.requires_grad)
            part._parameters[name] = own if own is None else made[id(own)][1]
        for name, own in part._buffers.items():
            part._buffers[name] = own if own is None else own.to(device)
    return module


@pytest.fixture
def gpu(monkeypatch):
    trainers = []

    def learn(trainer):
        for parameter in trainer.model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None

    monkeypatch.setattr(promptmix.engine.trainer, "choose_device", lambda *_: GPU)
    monkeypatch.setattr(torch.nn.Module, "to", moved)
    monkeypatch.setattr(torch.Tensor, "backward", lambda *_, **__: learn(trainers[-1]))
    monkeypatch.setattr(torch.autograd, "grad", lambda _, inputs, **__: tuple(map(torch.zeros_like, inputs)))
    with StandIn() as stand_in:
        yield stand_in, trainers


@pytest.mark.parametrize("name", [n for n in TRAINERS if n not in APART] if "EVERY_METHOD" in os.environ else METHODS)
def test_a_step_stays_on_the_device_and_does_not_wait_for_it(room, name, gpu):
    stand_in, trainers = gpu
    trainer = toy_trainer(room, name, *three_layers(room), *LOW.get(name, ()))
    if name not in ("MMA", "CLIPLoRA"):
        shallow(trainer)
    trainers.append(trainer)
    trainer.set_model_mode("train")
    trainer.model.before_training()
    if trainer.model.needs_preparing:
        trainer.model.prepare(trainer._look)
    trainer.num_batches, trainer.epoch, trainer.batch_idx = len(trainer.train_loader_x), 0, 0
    batch = next(iter(trainer.train_loader_x))
    if trainer._optims.get("prompt_learner") is not None:
        trainer.forward_backward(batch)  # what is made once may wait
        stand_in.strict = True
        if name in WAIT:
            with pytest.raises(Waits):
                trainer.forward_backward(batch)
        else:
            assert trainer.forward_backward(batch)["loss"].device == GPU
        stand_in.strict = False
    trainer.set_model_mode("eval")
    with torch.no_grad():
        images, _ = trainer.parse_batch_test(next(iter(trainer.test_loader)))
        assert trainer.model_inference(images).device == GPU
