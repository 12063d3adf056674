"""Optimal transport between patches and prompts as a head (PLOT, arXiv 2210.01253, section 3.2)."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from promptmix import register
from promptmix.config.declare import Setting
from promptmix.prompts.heads import weigh
from promptmix.prompts.roles import Head, PromptBank, Task
from promptmix.prompts.step import Step


@register
class Transport(Head):
    """``s * sum_mn T_mn <f_m, t_n>``: the plan T moves an image's M patches to a class's N prompts at the least cost 1 - cosine.

    Experts that prompt the image tower each in its own way see patches of their own: each moves them to its own prompt, and the
    router weighs the experts' scores.
    """

    needs_tokens = True

    def __init__(
        self,
        task: Task,
        bank: PromptBank,
        eps: Annotated[float, Setting("weight of the entropy in the plan", above=0)] = 0.1,
        max_iter: Annotated[int, Setting("Sinkhorn rounds at most", low=1)] = 100,
        thresh: Annotated[float, Setting("mean change of the row scales below which rounds end", low=0)] = 0.01,
    ) -> None:
        super().__init__()
        self.eps, self.max_iter, self.thresh = eps, max_iter, thresh
        self.mixes = self.needs_tokens and bank.num_visual > 1

    def forward(self, step: Step) -> Tensor:
        if step.tokens.dim() == 3:
            return self.transport(step, step.tokens, step.text)
        pairs = zip(step.tokens.unbind(1), step.text, strict=True)
        return weigh(step, torch.stack([self.transport(step, tokens, text[None]) for tokens, text in pairs], dim=1))

    def transport(self, step: Step, tokens: Tensor, text: Tensor) -> Tensor:
        """Return the scores (B, C) of local features (B, M, D) and text features (N, C, D)."""
        cosines = torch.einsum("bmd,ncd->bcmn", tokens, text.to(tokens.dtype))
        plan = sinkhorn(1 - cosines.detach(), self.eps, self.max_iter, self.thresh)
        return step.task.clip.scale * (plan * cosines).sum(dim=(-2, -1))


@torch.no_grad()
def sinkhorn(cost: Tensor, eps: float, max_iter: int, thresh: float) -> Tensor:
    """Return the plans (..., M, N) between uniform masses that least cost (..., M, N) with entropy weight ``eps``."""
    kernel = torch.exp(-cost.float() / eps)
    rows, columns = cost.shape[-2:]
    r, c = torch.ones_like(kernel[..., :, 0]), torch.ones_like(kernel[..., 0, :])
    for _ in range(max_iter):
        before = r
        r = (1 / rows) / torch.einsum("...mn,...n->...m", kernel, c)
        c = (1 / columns) / torch.einsum("...mn,...m->...n", kernel, r)
        if (r - before).abs().mean() < thresh:
            break
    return r[..., :, None] * kernel * c[..., None, :]
