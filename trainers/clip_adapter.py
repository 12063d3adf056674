"""CLIP-Adapter: Better Vision-Language Models with Feature Adapters.

Peng Gao, Shijie Geng, Renrui Zhang, Teli Ma, Rongyao Fang, Yongfeng Zhang, Hongsheng Li, Yu Qiao. IJCV 2024.
https://arxiv.org/abs/2110.04544

| paper | here |
|---|---|
| A_v(f) = ReLU(f^T W_1^v) W_2^v, with a second ReLU in the authors' code | ``ImageAdapter.adapter`` |
| f* = alpha A_v(f) + (1 - alpha) f, f not normalised | ``ImageAdapter.adapt`` |
| alpha, residual ratio of the image side | ``RATIO`` |
| W, classifier of hard prompts | ``Hard.forward`` |

Only the image side has an adapter, as in the authors' code. Other classes are served: the text is untouched.

Deviations from the authors' code: widths follow the backbone (theirs writes 1024); the ratio is a setting (theirs writes 0.2);
text is encoded once (theirs in every step).
"""

from __future__ import annotations

from typing import Any

from promptmix.plugins.prompt_bank.hard import ImageAdapter

from promptmix import register
from promptmix.config.declare import inherits
from promptmix.engine.layout import Layout, Rule
from promptmix.prompts.heads import Cosine
from promptmix.prompts.learner import Learner
from promptmix.prompts.roles import Task
from promptmix.prompts.trainer import PromptTrainer


@register
class CLIPAdapter(PromptTrainer):
    """A bottleneck behind the image tower, mixed with its features, trained with cross-entropy."""

    layout = Layout("clip_adapter", (Rule("fc.0.weight", "bank.adapter.0.weight"), Rule("fc.2.weight", "bank.adapter.2.weight")))

    @inherits(ImageAdapter)
    def compose(self, task: Task, **settings: Any) -> Learner:
        prompts = ImageAdapter(task, **settings)
        return Learner(task, prompts, head=Cosine(task, prompts))
