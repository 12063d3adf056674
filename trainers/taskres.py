"""TaskRes: Task Residual for Tuning Vision-Language Models.

Tao Yu, Zhihe Lu, Xin Jin, Zhibo Chen, Xinchao Wang. CVPR 2023. https://arxiv.org/abs/2211.10277

| paper | here |
|---|---|
| t, base classifier: mean of the templates' features, not normalised | ``Residual.base`` (C, D) |
| x, task residual, zero at the start | ``Residual.residual`` (C, D) |
| t' = t + alpha x, then normalised | ``Residual.forward`` |
| alpha = 0.5 (1.0 on OxfordFlowers) | ``ALPHA`` |
| enhanced base: another text projection | ``ENHANCED_BASE``: a checkpoint with ``weight`` (D, W), as the authors share them |

Class names keep their underscores in the base, as in the authors' code. Classes that were not trained on have no residual.

Deviations from the authors' code: an enhanced base works in fp32 too, where theirs takes the regular one in silence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from promptmix.plugins.prompt_bank.hard import Hard
from torch import Tensor, nn

from promptmix import register
from promptmix.config.declare import Setting, inherits
from promptmix.config.published import Theirs
from promptmix.engine.checkpoint import load_checkpoint
from promptmix.engine.layout import Layout, Rule
from promptmix.errors import CheckpointError, ConfigError
from promptmix.prompts.heads import Cosine
from promptmix.prompts.learner import Learner
from promptmix.prompts.roles import Task
from promptmix.prompts.trainer import PromptTrainer


class Residual(Hard):
    """The hard classifier with a learned residual for each class.

    Raises:
        CheckpointError: there is no such file, or it holds another matrix; name one that was made for this backbone.
    """

    class_specific = True
    per_class = "a residual"

    def __init__(
        self,
        task: Task,
        templates: Annotated[Sequence[str], Setting("hard templates that are averaged; () = the data set's first")] = (),
        alpha: Annotated[float, Setting("scale of the residual", low=0)] = 0.5,
        enhanced_base: Annotated[
            str, Setting('checkpoint with another text projection for the base; "" = the regular base', at_test=True, place=True)
        ] = "",
    ) -> None:
        super().__init__(task, templates)
        self.alpha = alpha
        change = {"text_projection": projection_change(task, enhanced_base)} if enhanced_base else {}
        base = task.clip.raw_features(self.templates, task.classnames, verbatim=True, weights=change).mean(dim=0)
        self.base: Tensor
        self.register_buffer("base", base, persistent=False)
        self.residual = nn.Parameter(torch.zeros_like(base))

    def forward(self, names: Sequence[str], image_features: Tensor | None = None, *, full_stop: bool | None = None) -> Tensor:
        """Return normalised class weights (1, C, D).

        Raises:
            ConfigError: the names are not those that residuals were learned for.
        """
        if tuple(names) != tuple(self.task.classnames):
            raise ConfigError(f"residuals were learned for {len(self.base)} classes and can't serve other names")
        return F.normalize(self.base + self.alpha * self.residual, dim=-1)[None]

    def references(self, names: Sequence[str]) -> Tensor:
        """Return the hard classifier (1, C, D), of any names."""
        return self.encode(names)


def projection_change(task: Task, path: str) -> Tensor:
    """Return what a checkpoint's ``weight`` (D, W) changes in the text projection (W, D)."""
    found, own = load_checkpoint(path).get("state_dict", {}).get("weight"), task.clip.text.text_projection
    if not isinstance(own, Tensor):
        raise ConfigError("MODEL.BACKBONE.NAME: this text tower has no projection that an enhanced base could replace")
    if found is None or found.T.shape != own.shape:
        shown = "none" if found is None else tuple(found.shape)
        raise CheckpointError(f"{path}: 'weight' of the enhanced base is {shown}, but this backbone needs {tuple(own.T.shape)}")
    return found.T.to(own) - own.detach()


@register
class TaskRes(PromptTrainer):
    """What the task adds to the text features, learned with cross-entropy."""

    published_keys = {
        "TRAINER.TaskRes.RESIDUAL_SCALE": "ALPHA",
        **dict.fromkeys(("--enhanced-base", "TRAINER.TaskRes.ENHANCED_BASE"), Theirs("ENHANCED_BASE", values={"none": ""})),
    }
    layout = Layout("prompt_learner", (Rule("text_feature_residuals", "bank.residual"),), unused=("base_text_features",))

    @inherits(Residual)
    def compose(self, task: Task, **settings: Any) -> Learner:
        bank = Residual(task, **settings)
        return Learner(task, bank, head=Cosine(task, bank))
