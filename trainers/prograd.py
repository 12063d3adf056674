"""ProGrad: Prompt-aligned Gradient for Prompt Tuning.

Beier Zhu, Yulei Niu, Yucheng Han, Yue Wu, Hanwang Zhang. ICCV 2023. https://arxiv.org/abs/2205.14865

| paper | here |
|---|---|
| v, prompt | ``Soft.ctx`` (1, M, W), M = 16; the last vectors start from a hard prompt's words, those before them at zero |
| G_d = gradient of L_ce, domain direction | ``specific`` |
| G_g = gradient of L_kl, general direction | ``general``; L_kl is ``ZeroshotKL`` with temperature ``T`` |
| G_prograd | ``project`` |
| lambda | ``LAMBDA`` |

Deviations from the authors' code: initial words are counted in tokens; the projection lives here, where theirs needs a fork of
Dassl; it also works under ``amp``, where theirs fails. L_kl is reported as a divergence (theirs leaves out the teacher's entropy,
which has no gradient).

A context that starts as the zero-shot model's own template (same words, no zeros before them) stays there: the divergence is at
its minimum, and with LAMBDA 1 no step may raise it. The authors' 16 vectors start elsewhere, and an ensemble as ``TEMPLATES`` is
elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from yacs.config import CfgNode

from promptmix import hookimpl
from promptmix.engine.evaluator import compute_accuracy
from promptmix.errors import ConfigError
from promptmix.prompts.context import add_context_keys, build_soft_prompt
from promptmix.prompts.learner import Mixture
from promptmix.prompts.roles import LossTerms, PromptLearner, Task
from promptmix.prompts.trainer import PromptTrainer
from promptmix.registry import DISTILLER_REGISTRY, Registry


def project(specific: Tensor, general: Tensor, factor: float = 1.0) -> Tensor:
    """Return the prompt-aligned gradient G_prograd of one tensor.

    Where the two directions conflict (negative cosine), the part of ``specific`` that points against ``general`` is taken
    out, ``factor`` times: G_d - factor <G_d, G_g> / |G_g|^2 G_g. Otherwise G_d stays as it is.

    Args:
        specific: gradient of the cross-entropy, G_d.
        general: gradient of the divergence from the zero-shot model, G_g, of the same shape and any scale.
        factor: the paper's lambda; 1 makes the result orthogonal to ``general``.
    """
    overlap = torch.sum(specific * general)
    if overlap >= 0:
        return specific
    return specific - factor * overlap / general.square().sum() * general


class ProGrad(PromptTrainer):
    """One soft prompt whose steps never go against what the zero-shot model knows."""

    @staticmethod
    def add_config(node: CfgNode) -> None:
        """Declare ProGrad's keys, as the authors name them."""
        add_context_keys(node, ctx_init="a photo of a")  # here the words fill the last of N_CTX vectors
        node.TEMPLATES = ()  # ours: hard prompts of the zero-shot model, ensembled; () = the data set's first
        node.LAMBDA = 1.0  # how much of the conflicting part is taken out, from 0 (CoOp) to 1 (all)
        node.T = 1.0  # temperature of the divergence

    @classmethod
    def validate(cls, cfg: CfgNode) -> None:
        """Refuse a negative factor."""
        factor = cfg.TRAINER.PROGRAD.LAMBDA
        if factor < 0:
            raise ConfigError(
                f"TRAINER.PROGRAD.LAMBDA is {factor}, which would add the conflict; choose 0 or more (1 in the paper)"
            )

    def build_learner(self, task: Task) -> PromptLearner:
        """Return one soft prompt whose divergence from the zero-shot model is measured, but not part of the loss."""
        node = self.node
        bank: Any = build_soft_prompt(task, node)  # the registry's Soft, whose ctx is lengthened below
        missing = node.N_CTX - bank.ctx.shape[-2]
        if missing < 0:
            raise ConfigError(
                f"TRAINER.PROGRAD.N_CTX is {node.N_CTX}, but CTX_INIT {node.CTX_INIT!r} has {bank.ctx.shape[-2]} tokens; "
                "shorten the words or lengthen the context"
            )
        bank.ctx = nn.Parameter(F.pad(bank.ctx.detach(), (0, 0, missing, 0)))
        distiller = DISTILLER_REGISTRY.get("ZeroshotKL")(task, bank, templates=node.TEMPLATES, t=node.T)
        return Mixture(task, bank, distiller=distiller, distill_weight=0.0)

    def forward_backward(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Learn from one batch with the projected gradient.

        Returns:
            What the log line shows: loss (cross-entropy), accuracy of the batch in percent, and the divergence as ``kl``.
        """
        images, labels = self.parse_batch_train(batch)
        with self.precision.autocast():
            terms = self.model.loss(self.encode_images(images), labels)
        optimizers = [optim for optim in self._optims.values() if optim is not None]
        self.precision.backward_and_update(
            terms.total,
            optimizers,
            clip_norm=self.cfg.TRAIN.CLIP_GRAD_NORM,
            backward=lambda loss: self.set_gradients(loss, terms),
        )
        if self.batch_idx + 1 == self.num_batches:
            self.update_lr()
        accuracy = compute_accuracy(terms.logits, labels)[0]
        return {"loss": terms.total.detach(), "acc": accuracy, "kl": terms.parts["distill"].detach()}

    def set_gradients(self, loss: Tensor, terms: LossTerms) -> None:
        """Put the prompt-aligned gradient into every learned tensor.

        Args:
            loss: the cross-entropy, scaled where the precision scales losses; the projection keeps that scale.
            terms: of the batch, with the divergence as ``distill``.
        """
        self.detect_anomaly(terms.total)
        learned = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        general = torch.autograd.grad(terms.parts["distill"], learned, retain_graph=True)
        specific = torch.autograd.grad(loss, learned)
        for parameter, ours, theirs in zip(learned, specific, general, strict=True):
            parameter.grad = project(ours, theirs, self.node.LAMBDA)


@hookimpl
def register_trainers(registry: Registry) -> None:
    """Add the trainer."""
    registry.register(ProGrad)
