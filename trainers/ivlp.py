"""IVLP: independent vision-language prompting, the baseline of MaPLe.

Muhammad Uzair Khattak, Hanoona Rasheed, Muhammad Maaz, Salman Khan, Fahad Shahbaz Khan. CVPR 2023, section 4.1.
https://arxiv.org/abs/2210.03117

| paper | here |
|---|---|
| language prompts P, layers 1 ... J | ``IndependentDeep.text``, ``N_CTX_TEXT`` tokens, ``PROMPT_DEPTH_TEXT`` layers |
| vision prompts, layers 1 ... J | ``IndependentDeep.vision``, ``N_CTX_VISION`` tokens, ``PROMPT_DEPTH_VISION`` layers |
| no coupling function F | nothing connects the two |

The context starts from the first N_CTX_TEXT tokens of CTX_INIT; its other words stay, so that 2 tokens of "a photo of a" make
``[v1] [v2] of a <class>.``. N_CTX_VISION 0 and PROMPT_DEPTH_VISION 0 leave deep language prompting, on any image tower.

Deviations from the authors' code (github.com/muzairkhattak/multimodal-prompt-learning, trainers/independentVL.py): none in the
numbers but the rounding of deep prompts to fp16, which theirs does in fp32 too; more tokens than CTX_INIT has are refused, where
theirs starts at random from 5 tokens on and reads past the words below that; PREC is ``TRAINER.PREC`` for every method.
"""

from __future__ import annotations

from typing import Any

from promptmix.plugins.prompt_bank.independent_deep import IndependentDeep

from promptmix import register
from promptmix.config.declare import inherits
from promptmix.engine.layout import INDEPENDENT, Layout
from promptmix.prompts.heads import Cosine
from promptmix.prompts.learner import Learner
from promptmix.prompts.roles import Task
from promptmix.prompts.trainer import PromptTrainer


@register
class IVLP(PromptTrainer):
    """Deep prompts in both towers, trained with cross-entropy."""

    layout = Layout("VLPromptLearner", INDEPENDENT, whole=True)

    @inherits(IndependentDeep, without=["n_prompts"])
    def compose(self, task: Task, **deep: Any) -> Learner:
        prompts = IndependentDeep(task, **deep)
        return Learner(task, prompts, head=Cosine(task, prompts))
