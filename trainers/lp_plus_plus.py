"""LP++: A Surprisingly Strong Linear Probe for Few-Shot CLIP.

Yunshi Huang, Fereshteh Shakeri, Jose Dolz, Malik Boudiaf, Houda Bahig, Ismail Ben Ayed. CVPR 2024. https://arxiv.org/abs/2404.02285

| paper | here |
|---|---|
| w_c, visual prototypes, at the start the class's features (their sum, in the authors' code) | ``BlendedProbe.weight`` (C, D) |
| alpha_c, blending of each class's text | ``BlendedProbe.alpha`` (1, C) |
| l_c = f^T (w_c + alpha_c t_c), no temperature; a bias in the authors' code | ``BlendedProbe.forward`` |
| step sizes from Lipschitz constants, block by block | ``BlendedProbe.prepare``, ``BlockDescent`` |

The authors never clear alpha's gradient: each of its steps, every tenth, takes the sum of all gradients so far. So does this.

Deviations from the authors' code: of epochs that validate equally well the first is kept (theirs the last); pictures are
counted, where theirs takes the class count as pictures / shots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, Any

import torch
from promptmix.plugins.prompt_bank.hard import Hard
from torch import Tensor, nn

from promptmix import register
from promptmix.config.declare import Setting, inherits
from promptmix.prompts.learner import Learner, PromptLearner
from promptmix.prompts.roles import Head, Task
from promptmix.prompts.step import Step
from promptmix.prompts.trainer import PromptTrainer


class BlendedProbe(Head):
    """``f W^T + b + alpha (f t^T)``: a linear probe with a share of text for each class."""

    needs_preparing = True
    class_specific = True

    def __init__(self, task: Task) -> None:
        super().__init__()
        classes, width = len(task.classnames), task.clip.embed_dim
        self.weight = nn.Parameter(torch.zeros(classes, width))
        self.bias = nn.Parameter(torch.empty(classes).uniform_(-(width**-0.5), width**-0.5))
        self.alpha = nn.Parameter(torch.ones(1, classes))
        #: Step sizes of weight and alpha; None before the training pictures were seen.
        self.rates: tuple[float, float] | None = None

    def prepare(self, look: Callable[[], Iterable[Step]]) -> None:
        """Start from the class's features and from their cosines with its text, and take the step sizes."""
        steps = list(look())
        image = torch.cat([step.image.float() for step in steps])
        labels = torch.cat([step.labels for step in steps])
        cosines = image @ steps[0].text[0].float().T
        own = cosines.gather(1, labels[:, None])[:, 0]
        count = labels.bincount(minlength=len(self.weight)).clamp(min=1)
        means = torch.zeros_like(self.bias, device=own.device).index_add(0, labels, own) / count
        self.weight.data.zero_().index_add_(0, labels, image)
        self.alpha.data.fill_(250 * float(means.mean()))
        largest = float(torch.linalg.eigvalsh((image.T @ image).double())[-1])
        self.rates = 4 * len(image) / largest, len(image) / (4 * float(cosines.square().sum(dim=0).max()))

    def forward(self, step: Step) -> Tensor:
        image = step.image
        text = image @ step.text[0].to(image.dtype).T
        return image @ self.weight.to(image.dtype).T + self.bias + self.alpha * text


class BlockDescent(torch.optim.Optimizer):
    """Momentum steps for one block; for another, every tenth step, a plain step along the sum of all gradients so far.

    Args:
        groups: each with ``params``, ``lr``, ``momentum`` and ``every``: 1 for the first kind, 10 for the second.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {"momentum": 0.0, "every": 1})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step of every block that is due."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"], state["sum"] = 0, torch.zeros_like(parameter)
                state["step"] += 1
                keep = group["momentum"] if group["every"] == 1 else 1.0
                state["sum"].mul_(keep).add_(parameter.grad)
                if state["step"] % group["every"] == 0:
                    parameter.sub_(group["lr"] * state["sum"])


@register
class LPPlusPlus(PromptTrainer):
    """A linear probe blended with text, by block-wise descent with step sizes from the data."""

    @inherits(Hard)
    def compose(
        self,
        task: Task,
        alpha_every: Annotated[int, Setting("steps between two steps of alpha", low=1)] = 10,
        **hard: Any,
    ) -> Learner:
        self.alpha_every = alpha_every
        prompts = Hard(task, **hard)
        return Learner(task, prompts, head=BlendedProbe(task))

    def build_optimizer(self, model: PromptLearner) -> torch.optim.Optimizer:
        """Return the block-wise descent; ``OPTIM.LR`` stands in until ``prepare`` has seen the pictures."""
        return descent(model, self.cfg.OPTIM.LR, self.cfg.OPTIM.LR, self.alpha_every)

    def build_scheduler(self, optimizer: torch.optim.Optimizer) -> None:
        """Step sizes follow from the data and stay."""

    def before_train(self) -> None:
        """Take the step sizes from the training pictures, unless a checkpoint brought them."""
        super().before_train()
        head: Any = self.model.head
        if head.rates is not None:
            for optimizer in filter(None, self._optims.values()):
                for group, rate in zip(optimizer.param_groups, head.rates, strict=True):
                    group["lr"] = rate


def descent(model: PromptLearner, rate: float, alpha_rate: float, every: int) -> BlockDescent:
    """Return the descent of a probe with step sizes ``rate`` for weight and bias and ``alpha_rate`` for alpha."""
    head: Any = model.head
    probe = {"params": [head.weight, head.bias], "lr": rate, "momentum": 0.9, "every": 1}
    return BlockDescent([probe, {"params": [head.alpha], "lr": alpha_rate, "every": every}])
