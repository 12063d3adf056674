"""A training step as compiled graphs: one forward, one backward, one for the optimizers (``TRAIN.STEP``).

The forward graph holds both towers, head and losses, and none of it may fall out (``fullgraph=True``): what is decided in a
step is decided by shapes, which class names fix for the whole run. So nothing in a step waits for the device, and a CUDA graph
can replay it. Numbers are the eager step's up to rounding; the first batch's gradients are held to that, since compilers err
(PyTorch 2.14's gave MaPLe wrong ones on a CPU).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from yacs.config import CfgNode

from promptmix.engine.precision import clip_gradients
from promptmix.errors import ConfigError
from promptmix.parallel.group import size as processes
from promptmix.prompts.learner import LossTerms, PromptLearner

#: How far gradients of a compiled step may be from the eager step's, over the largest: in fp32, and where autocast rounds.
_FAR, _FAR_ROUNDED = 1e-2, 0.3


def check_step(cfg: CfgNode, device: torch.device, *, changes_gradients: bool) -> None:
    """Refuse a ``TRAIN.STEP`` that this run can't have.

    Args:
        cfg: the whole tree.
        device: where it runs.
        changes_gradients: whether the method propagates its losses in a way of its own.

    Raises:
        ConfigError: it can't; the message says what to set instead.
    """
    kind = cfg.TRAIN.STEP
    if kind == "eager":
        return
    if kind == "cuda_graph" and device.type != "cuda":
        raise ConfigError("TRAIN.STEP is 'cuda_graph', but this run computes on a CPU; set it to 'compiled' or 'eager'")
    if processes() > 1:
        raise ConfigError(f"TRAIN.STEP is {kind!r}, which is one graph of one device; with --devices set it to 'eager'")
    if cfg.MODEL.COMPILE:
        raise ConfigError(f"MODEL.COMPILE is True, but TRAIN.STEP {kind!r} compiles the whole step; leave one of them out")
    if cfg.MODEL.CLASS_CHUNK:
        raise ConfigError(
            f"MODEL.CLASS_CHUNK is {cfg.MODEL.CLASS_CHUNK}, but TRAIN.STEP {kind!r} takes all classes at once; "
            "set it to 0, or TRAIN.STEP to 'eager'"
        )
    if changes_gradients:
        raise ConfigError(
            f"TRAIN.STEP is {kind!r}, but {cfg.TRAINER.NAME} takes gradients in a way of its own; set it to 'eager'"
        )


class CompiledStep:
    """The step of ``model`` as compiled graphs, made at the first batch of each shape.

    Args:
        model: what learns. All its experts are encoded from now on: which of them a batch chose is not known beforehand.
        optimizers: of its tensors.
        clip_norm: largest norm of the gradients; 0 leaves them as they are.
        cuda_graph: replay the graphs by CUDA, which launches them at once.
        backend: takes the graphs of the loss in the place of PyTorch's compiler.
    """

    def __init__(
        self,
        model: PromptLearner,
        optimizers: Sequence[Optimizer],
        clip_norm: float = 0.0,
        *,
        cuda_graph: bool = False,
        backend: Callable[..., Any] | None = None,
    ) -> None:
        self._model, self._optimizers, self._cuda_graph = model, optimizers, cuda_graph
        model.sparse_experts = False
        mode = "reduce-overhead" if cuda_graph else None
        given: dict[str, Any] = {} if backend is None else {"backend": backend}
        self._forward = torch.compile(self._terms, fullgraph=True, dynamic=False, mode=mode, **given)
        self._started = False
        # Optimizers leave the graph before and after their work, on purpose; what lies between is one graph.
        self._update = torch.compile(self._step_all, dynamic=False, mode=mode)
        learned = [parameter for group in self._groups for parameter in group["params"]]
        limit = partial(clip_gradients, (), clip_norm, learned)
        self._clip = torch.compile(limit, dynamic=False) if clip_norm > 0 else None
        # The rates as tensors, so that a new rate is no new graph. Schedules, log lines and checkpoints see plain numbers.
        self._rates = [torch.zeros((), device=group["params"][0].device) for group in self._groups]
        for group in self._groups:
            if cuda_graph and "capturable" in group:
                group["capturable"] = True

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self._optimizers for group in optimizer.param_groups]

    def _terms(self, images: Tensor, labels: Tensor | None) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        terms = self._model.loss(self._model.step(images, labels))
        return terms.total, terms.parts, terms.logits

    def _step_all(self) -> None:
        for optimizer in self._optimizers:
            optimizer.step()

    def loss(self, images: Tensor, labels: Tensor | None) -> LossTerms:
        """Return the loss of a batch.

        Args:
            images: (B, 3, S, S), or kept features.
            labels: (B,); None where the method learns without.

        Raises:
            ConfigError: the method decides something in a step that its numbers must be known for, or PyTorch's compiler gives
                wrong gradients of it.
        """
        if not self._started:
            self._started = True
            with torch.no_grad(), torch.random.fork_rng(enabled=True):
                self._terms(images, labels)  # what is made once for all steps, such as references, is no part of one
            if torch.is_grad_enabled():
                self._check(images, labels)
        return LossTerms(*self._captured(images, labels))

    def _check(self, images: Tensor, labels: Tensor | None) -> None:
        """Compare the gradients of a batch with the eager step's, unless those are random."""
        ways = (self._terms, self._terms, self._captured)
        eager, again, compiled = (self._gradients(way, seed, images, labels) for seed, way in enumerate(ways))
        far = _FAR_ROUNDED if torch.is_autocast_enabled(images.device.type) else _FAR
        off = _distance(eager, compiled)
        if _distance(eager, again) <= far and not off <= far:  # of NaN too
            raise ConfigError(
                f"TRAIN.STEP: PyTorch {torch.__version__}'s compiler gives wrong gradients of a step of "
                f"{type(self._model).__name__} here (they differ by {off:.1g} of the largest); set it to 'eager'"
            )

    def _gradients(self, way: Callable[..., Any], seed: int, images: Tensor, labels: Tensor | None) -> list[Tensor]:
        learned = [p for p in self._model.parameters() if p.requires_grad and p.numel()]
        with torch.random.fork_rng(enabled=True):
            torch.manual_seed(seed)
            total = way(images, labels)[0] * 1024.0  # small gradients vanish in fp16
            found = torch.autograd.grad(total, learned, allow_unused=True)
        return [torch.zeros_like(p) if part is None else part.clone() for p, part in zip(learned, found, strict=True)]

    def _captured(self, images: Tensor, labels: Tensor | None) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        if self._cuda_graph:
            torch.compiler.cudagraph_mark_step_begin()
        try:
            given: tuple[Tensor, dict[str, Tensor], Tensor] = self._forward(images, labels)
        except torch._dynamo.exc.Unsupported as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(
                f"TRAIN.STEP: a step of {type(self._model).__name__} can't be compiled as a whole ({reason}); set it to 'eager'"
            ) from error
        return given

    def update(self) -> None:
        """Limit the gradients and step the optimizers."""
        if self._clip is not None:
            self._clip()
        given = [group["lr"] for group in self._groups]
        for group, rate, value in zip(self._groups, self._rates, given, strict=True):
            rate.fill_(value)
            group["lr"] = rate
        try:
            self._update()
        finally:
            for group, value in zip(self._groups, given, strict=True):
                group["lr"] = value


def _distance(here: Sequence[Tensor], there: Sequence[Tensor]) -> float:
    """Return the largest difference over the largest number of each tensor, or a thousandth of all tensors' largest."""
    sizes = [float(part.abs().max()) for part in here]
    floor = max(max(sizes) / 1000, 1e-30)
    off = [float((a - b).abs().max()) / max(size, floor) for a, b, size in zip(here, there, sizes, strict=True)]
    return float(torch.tensor(off).max())  # NaN where one is


def compiled_step(
    cfg: CfgNode, model: PromptLearner, optimizers: Sequence[Optimizer], before: CompiledStep | None
) -> CompiledStep | None:
    """Return what computes a step under ``TRAIN.STEP``: that of the step ``before``, or a new one; None for an eager step."""
    kind = cfg.TRAIN.STEP
    if kind == "eager" or before is not None:
        return before
    return CompiledStep(model, optimizers, cfg.TRAIN.CLIP_GRAD_NORM, cuda_graph=kind == "cuda_graph")
