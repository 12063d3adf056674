"""CoOp: Learning to Prompt for Vision-Language Models.

Kaiyang Zhou, Jingkang Yang, Chen Change Loy, Ziwei Liu. IJCV 2022. https://arxiv.org/abs/2109.01134

| paper | here |
|---|---|
| [V]_1 ... [V]_M | ``Soft.ctx`` (1, M, W), or (1, C, M, W) class-specific |
| g(t_i) | ``TextTower`` on ``[SOT] ctx name . [EOT]`` |
| tau | 1 / ``CLIP.scale`` |

Deviations from the authors' code: none in the numbers (``tests/golden`` holds theirs), but for a CTX_INIT with a word of several
tokens ("itap"): here all tokens are learned; theirs learns as many as there are words, and the last ones stay in front of the
name as they are (``COUNT_WORDS``). Prompts run in the trainer's precision, fp32 by default, where the authors use fp16 weights.
"""

from __future__ import annotations

from typing import Any

from promptmix.plugins.prompt_bank.soft import Soft

from promptmix import register
from promptmix.config.declare import inherits
from promptmix.engine.layout import Layout, Rule
from promptmix.prompts.learner import Learner
from promptmix.prompts.roles import Task
from promptmix.prompts.trainer import PromptTrainer


@register
class CoOp(PromptTrainer):
    """One soft prompt, trained with cross-entropy."""

    layout = Layout("prompt_learner", (Rule("ctx", "bank.ctx", expert_axis=True),))

    @inherits(Soft, without=["n_prompts"])
    def compose(self, task: Task, **soft: Any) -> Learner:
        return Learner(task, Soft(task, **soft))
