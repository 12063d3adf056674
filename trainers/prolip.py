"""ProLIP: CLIP's Visual Embedding Projector is a Few-shot Cornucopia.

Mohammad Fahes, Tuan-Hung Vu, Andrei Bursuc, Patrick Perez, Raoul de Charette. 2024. https://arxiv.org/abs/2410.05270

| paper | here |
|---|---|
| W_o, the image tower's last map | ``TunedProjection.projection`` (W, D); a bias stays frozen |
| x_o, features before it | ``step.unprojected_image``, which caches keep |
| lambda |W - W_o|_F^2, a sum and no mean | ``NearStart`` |
| lambda = 1 / K for K shots | ``LAMBDA`` -1 |

Classes that were not trained on are served. Every tower that ends with a linear map will do.

Deviations from the authors' code: weights have the trainer's precision (theirs fp16 on a GPU, where a step of 1e-5 is lost).
Their search over val re-encodes pictures; here it is a sweep over ``OPTIM.LR`` and ``LAMBDA``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch.nn.functional as F
from promptmix.plugins.prompt_bank.hard import Hard
from torch import Tensor, nn

from promptmix import register
from promptmix.clip.projection import last_map
from promptmix.config.declare import Setting
from promptmix.errors import SettingError
from promptmix.prompts.heads import Cosine
from promptmix.prompts.learner import Learner
from promptmix.prompts.losses import CrossEntropy
from promptmix.prompts.roles import Loss, Task
from promptmix.prompts.step import Step
from promptmix.prompts.trainer import PromptTrainer


class TunedProjection(Hard):
    """Hand-written prompts, and the image tower's last linear map, learned from where it is.

    Args:
        templates: hard templates that are averaged.
    """

    image_level = "unprojected"

    def __init__(self, task: Task, templates: Sequence[str] = ()) -> None:
        super().__init__(task, templates)
        self.start: Tensor
        self.bias: Tensor | None
        weight, bias = last_map(task.clip.image)
        self.register_buffer("start", weight.detach().float().clone(), persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach().clone(), persistent=False)
        self.projection = nn.Parameter(self.start.clone())

    def moved(self) -> Tensor:
        """Return how the map differs from where it started (W, D)."""
        return self.projection - self.start

    def adapt(self, image: Tensor) -> Tensor:
        """Return normalised features (B, D) of features (B, W) before the map."""
        projected = image @ self.projection.to(image.dtype)
        return F.normalize(projected if self.bias is None else projected + self.bias.to(projected.dtype), dim=-1)


class NearStart(Loss):
    """``|P - P_0|^2``: the squared distance of the map from where it started, a sum over its numbers."""

    part = "distance"
    needs_all_experts = False

    def __init__(self, bank: TunedProjection) -> None:
        super().__init__()
        self.moved = bank.moved

    def forward(self, step: Step) -> Tensor:
        return self.moved().square().sum()


@register
class ProLIP(PromptTrainer):
    """The image tower's last map, tuned near its start on cached features."""

    def compose(
        self,
        task: Task,
        lambda_: Annotated[float, Setting("weight of the squared distance from the start; -1 = 1 / shots", low=-1)] = -1.0,
        templates: Annotated[Sequence[str], Setting("hard templates that are averaged; () = the data set's first")] = (),
        scale: Annotated[float, Setting("s; 0 = the model's temperature", low=0)] = 100.0,
    ) -> Learner:
        bank = TunedProjection(task, templates)
        shots = self.cfg.DATASET.NUM_SHOTS
        if shots < 1:
            shots = max(len(task.train_labels) / len(task.classnames), 1)
        if -1 < lambda_ < 0:
            raise SettingError("lambda", lambda_, "which is not a weight; give 0 or more, or -1 for 1 / shots")
        weight = 1 / shots if lambda_ < 0 else lambda_
        return Learner(task, bank, head=Cosine(task, bank, scale), loss=CrossEntropy() + weight * NearStart(bank))
