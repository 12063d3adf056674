"""CoCoOp: Conditional Prompt Learning for Vision-Language Models.

Kaiyang Zhou, Jingkang Yang, Chen Change Loy, Ziwei Liu. CVPR 2022. https://arxiv.org/abs/2203.05557

| paper | here |
|---|---|
| v_1 ... v_M | ``InstanceConditional.ctx`` (1, M, W) |
| h_theta, the meta-net | ``InstanceConditional.meta_net``: Linear(D, D/16), ReLU, Linear(D/16, W) |
| v_m(x) = v_m + h_theta(x) | ``InstanceConditional._encode``, one context per image |
| p(y given x), equation 3 | ``WeightedScores`` with text features per image (B, 1, C, D) |

Deviations from the authors' code: none in the numbers. Theirs encodes 77 positions per image and class, one image after the
other, and so trains with batch 1; here all images of a batch share one pass in which only class names are computed per class.
"""

from __future__ import annotations

from typing import Any

from promptmix.plugins.prompt_bank.instance_conditional import InstanceConditional

from promptmix import register
from promptmix.config.declare import inherits
from promptmix.engine.layout import Layout, Rule, linear
from promptmix.prompts.learner import Learner
from promptmix.prompts.roles import Task
from promptmix.prompts.trainer import PromptTrainer


@register
class CoCoOp(PromptTrainer):
    """One soft prompt that a small network shifts for each image, trained with cross-entropy."""

    layout = Layout(
        "prompt_learner",
        (
            Rule("ctx", "bank.ctx", expert_axis=True),
            *linear("meta_net.linear1", "bank.meta_net.linear1"),
            *linear("meta_net.linear2", "bank.meta_net.linear2"),
        ),
    )

    @inherits(InstanceConditional, without=["n_prompts"], ctx_init="a photo of a")
    def compose(self, task: Task, **conditional: Any) -> Learner:
        return Learner(task, InstanceConditional(task, **conditional))
