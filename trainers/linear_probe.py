"""LinearProbe: logistic regression on image features, as CLIP and CoOp measure it.

Alec Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021, appendix A.3.
https://arxiv.org/abs/2103.00020; CoOp's few-shot version: https://arxiv.org/abs/2109.01134

| paper | here |
|---|---|
| features: CoOp's after the last linear map, CLIP's before it; not normalised | ``FEATURES`` |
| L2 penalty |w|^2 / 2 + C sum of cross-entropies, bias free, L-BFGS, at most 1,000 iterations | ``fit`` |
| C: seven values from 1e6 to 1e-6, then 8 halvings of a decade on either side of the best | ``choose`` |

Deviations from CoOp's code: the few shots are the trainers' own (theirs draws others); L-BFGS is torch's, from zero and goes on
to a gradient of 1e-7 (theirs stops at 1e-4, which features of small norm start below).
There is nothing to learn by steps: training fits, saves and tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from promptmix.plugins.prompt_bank.hard import Hard
from torch import Tensor

from promptmix import register
from promptmix.clip.projection import last_map
from promptmix.config.declare import Setting
from promptmix.errors import ConfigError
from promptmix.prompts.learner import Learner
from promptmix.prompts.roles import Head, Task
from promptmix.prompts.step import Step
from promptmix.prompts.trainer import PromptTrainer
from promptmix.utils import get_logger

STRENGTHS = (1e6, 1e4, 1e2, 1.0, 1e-2, 1e-4, 1e-6)


def fit(features: Tensor, labels: Tensor, classes: int, strength: float) -> tuple[Tensor, Tensor]:
    """Return weight (C, D) and bias (C,) of the logistic regression of N features (N, D) with C = ``strength``."""
    x = features.double()
    weight = torch.zeros(classes, x.shape[1], dtype=x.dtype, device=x.device, requires_grad=True)
    bias = torch.zeros(classes, dtype=x.dtype, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=1000, history_size=10, tolerance_grad=1e-7, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight.T + bias, labels) + weight.square().sum() / (2 * strength * len(x))
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return weight.detach().float(), bias.detach().float()


def choose(accuracy: Callable[[float], float], steps: int) -> float:
    """Return the C that validates best: of ``STRENGTHS`` the first best, then its interval is halved ``steps`` times."""
    peak = max(STRENGTHS, key=accuracy)
    left, right, best = peak / 10, peak * 10, peak
    for _ in range(steps):
        middle = math.sqrt(left * right)
        if accuracy(left) < accuracy(right):
            best, left = right, middle
        else:
            best, right = left, middle
    return best


class LogisticRegression(Head):
    """``W f + b`` on image features that are not normalised.

    Args:
        level: ``raw`` features, or ``unprojected`` ones.
    """

    needs_preparing = True
    class_specific = True

    def __init__(self, task: Task, level: str) -> None:
        super().__init__()
        self.image_level = "raw" if level == "projected" else "unprojected"
        width = task.clip.embed_dim if level == "projected" else last_map(task.clip.image)[0].shape[0]
        self.weight: Tensor
        self.bias: Tensor
        self.register_buffer("weight", torch.zeros(len(task.classnames), width))
        self.register_buffer("bias", torch.zeros(len(task.classnames)))
        self.seen: tuple[Tensor, Tensor] | None = None

    def prepare(self, look: Callable[[], Iterable[Step]]) -> None:
        """Keep the training pictures' features, which ``fit`` takes."""
        steps = [(self.features(step).float(), step.labels) for step in look()]
        self.seen = torch.cat([features for features, _ in steps]), torch.cat([labels for _, labels in steps])

    def features(self, step: Step) -> Tensor:
        """Return the features (B, W) that are classified."""
        return step.raw_image if self.image_level == "raw" else step.unprojected_image

    def forward(self, step: Step) -> Tensor:
        features = self.features(step)
        return F.linear(features, self.weight.to(features.dtype), self.bias.to(features.dtype))


@register
class LinearProbe(PromptTrainer):
    """Logistic regression on frozen image features."""

    def compose(
        self,
        task: Task,
        c: Annotated[float, Setting("C: weight of the data against the penalty; 0 = chosen on the val part", low=0)] = 0.0,
        steps: Annotated[int, Setting("halvings around the best of the first seven", low=0)] = 8,
        features: Annotated[
            str, Setting("after the last linear map (CoOp) or before it (CLIP)", choices=("projected", "unprojected"))
        ] = "projected",
    ) -> Learner:
        self.strength, self.steps = c, steps
        return Learner(task, Hard(task), head=LogisticRegression(task, features))

    def before_train(self) -> None:
        """Look at the training pictures.

        Raises:
            ConfigError: C is to be chosen, but there is no val part.
        """
        if not self.strength and self.val_loader is None:
            raise ConfigError(
                f"TRAINER.LINEARPROBE.C is 0, so C is chosen on val pictures, which {self.cfg.DATASET.NAME} "
                "lacks here; give a number"
            )
        super().before_train()

    def after_epoch(self) -> None:
        """Fit once, before the checkpoint is written."""
        head: Any = self.model.head
        if head.seen is not None:
            self._fit(head, *head.seen)
            head.seen = None
        super().after_epoch()

    def _fit(self, head: LogisticRegression, features: Tensor, labels: Tensor) -> None:
        classes, strength = len(head.bias), self.strength
        if not strength:
            val, target = self._val(head)
            known: dict[float, float] = {}

            def accuracy(c: float) -> float:
                if c not in known:
                    weight, bias = fit(features, labels, classes, c)
                    known[c] = float(((val @ weight.T + bias).argmax(dim=-1) == target).float().mean())
                return known[c]

            strength = choose(accuracy, self.steps)
            get_logger().info("Chosen on the val part: C %.3g", strength)
        weight, bias = fit(features, labels, classes, strength)
        head.weight.copy_(weight)
        head.bias.copy_(bias)

    @torch.no_grad()
    def _val(self, head: LogisticRegression) -> tuple[Tensor, Tensor]:
        found = []
        with self.precision.autocast():
            for batch in self.val_loader or ():
                images, labels = self.parse_batch_test(batch)
                found.append((head.features(self.model.step(images)).float(), labels))
        return torch.cat([features for features, _ in found]), torch.cat([labels for _, labels in found])
