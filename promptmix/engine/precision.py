"""Numerical precision of training: fp32, fp16 with loss scaling on CUDA, or bf16; and whether a GPU's numbers repeat."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn

from promptmix.config.core import DEVICES, PRECISIONS
from promptmix.errors import ConfigError

__all__ = ["Precision", "choose_device", "use_repeatable_kernels"]


def use_repeatable_kernels(on: bool) -> None:
    """Let a GPU take only kernels that give the same bits each time (``TRAIN.DETERMINISTIC``), or any again.

    An operator that has none then raises a ``RuntimeError``. cuBLAS reads its setting when it starts, so this comes before the
    first product on a GPU.
    """
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(on)


def choose_device(name: str = "auto", use_cuda: bool = True) -> torch.device:
    """Return the device that ``DEVICE`` and ``USE_CUDA`` ask for.

    Args:
        name: ``auto`` (CUDA where there is a GPU), ``cpu`` or ``cuda``.
        use_cuda: Dassl's switch; False means the CPU.

    Raises:
        ConfigError: ``cuda`` is asked for but there is none, or the name is none of the three.
    """
    if name not in DEVICES:
        raise ConfigError(f"DEVICE is {name!r}, but must be one of: {', '.join(DEVICES)}")
    if name == "cuda" and not use_cuda:
        raise ConfigError("DEVICE is 'cuda' but USE_CUDA is False; leave one of them out")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("DEVICE is 'cuda' but PyTorch sees no GPU; set it to 'auto' or 'cpu', or install a CUDA build")
    wanted = name == "cuda" or (name == "auto" and use_cuda and torch.cuda.is_available())
    return torch.device("cuda" if wanted else "cpu")


class Precision:
    """How a trainer computes and applies gradients.

    Args:
        name: ``fp32``, ``amp`` (fp16 autocast and loss scaling, CUDA only) or ``bf16`` (autocast).
        device: where the model lies.

    Raises:
        ConfigError: the name is none of these, or ``amp`` is asked for on a CPU.
    """

    def __init__(self, name: str, device: torch.device | str) -> None:
        self.name = name
        self.device = torch.device(device)
        if name not in PRECISIONS:
            raise ConfigError(f"TRAINER.PREC is {name!r}, but must be one of: {', '.join(PRECISIONS)}")
        if name == "amp" and self.device.type != "cuda":
            raise ConfigError("TRAINER.PREC is 'amp' (fp16), which needs a GPU; on a CPU set it to bf16 or fp32")
        self.scaler = torch.amp.GradScaler(self.device.type) if name == "amp" else None

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context in which the forward pass and the loss are computed."""
        if self.name == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.float16 if self.name == "amp" else torch.bfloat16)

    def backward_and_update(
        self,
        loss: torch.Tensor,
        optimizers: Sequence[torch.optim.Optimizer],
        parameters: Iterable[nn.Parameter] | None = None,
        clip_norm: float = 0.0,
        backward: Callable[[torch.Tensor], None] = torch.Tensor.backward,
        update: Callable[[], None] | None = None,
    ) -> None:
        """Clear gradients, propagate ``loss`` and step every optimizer.

        Args:
            loss: scalar.
            optimizers: those whose parameters learn from this loss.
            parameters: those whose joint gradient norm is limited; by default all that the optimizers hold.
            clip_norm: the largest norm; 0 leaves gradients as they are.
            backward: how to propagate, where a trainer checks the loss first (``TrainerBase.model_backward``).
            update: limits gradients and steps the optimizers instead, where losses are not scaled.
        """
        for optimizer in optimizers:
            optimizer.zero_grad()
        with tiny_is_zero():
            backward(loss if self.scaler is None else self.scaler.scale(loss))
        if update is not None and self.scaler is None:
            update()
            return
        if clip_norm > 0:
            if self.scaler is not None:
                for optimizer in optimizers:
                    self.scaler.unscale_(optimizer)  # the limit is meant for true gradients, not scaled ones
            clip_gradients(optimizers, clip_norm, parameters)
        for optimizer in optimizers:
            if self.scaler is None:
                optimizer.step()
            else:
                self.scaler.step(optimizer)
        if self.scaler is not None:
            self.scaler.update()


@contextmanager
def tiny_is_zero() -> Iterator[None]:
    """Take numbers below 1.2e-38 for 0 on the CPU in the context.

    Gradients fade to them where layers leak to tokens that say little (``LwEIB``), and a product with one of them takes ten times
    as long as with others.
    """
    was = (torch.full((), 1e-40, dtype=torch.float32, device="cpu") * 1).item() == 0  # whatever a plugin's defaults are
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(was)


def clip_gradients(
    optimizers: Iterable[torch.optim.Optimizer], clip_norm: float, parameters: Iterable[nn.Parameter] | None = None
) -> None:
    """Limit the joint norm of the gradients of ``parameters`` (default: all that the optimizers hold)."""
    if parameters is None:
        parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    nn.utils.clip_grad_norm_(list(parameters), clip_norm)
