"""MaPLe: Multi-modal Prompt Learning.

Muhammad Uzair Khattak, Hanoona Rasheed, Muhammad Maaz, Salman Khan, Fahad Shahbaz Khan. CVPR 2023.
https://arxiv.org/abs/2210.03117

| paper | here |
|---|---|
| P_0 ... P_{J-1}, b tokens each (language) | ``CoupledDeep.text``, ``N_CTX`` tokens, ``PROMPT_DEPTH`` layers |
| F_k, vision-language coupling function | ``CoupledDeep.couple[k]``, a linear map from text to image width |
| P~_k = F_k(P_k) (vision) | ``CoupledDeep.visual`` |
| W_0 = [P_0, w_1 ... w_N]; [_, W_i] = L_i([P_{i-1}, W_{i-1}]) | ``TextTower`` with deep prompts |
| [c_i, E_i, _] = V_i([c_{i-1}, E_{i-1}, P~_{i-1}]) | ``ImageTower`` with a ``PromptStep`` per layer |

The context starts from the first N_CTX tokens of CTX_INIT; its other words stay, so that 2 tokens of "a photo of a" make
``[v1] [v2] of a <class>.``.

Deviations from the authors' code (github.com/muzairkhattak/multimodal-prompt-learning, trainers/maple.py): none in the numbers
but the rounding of prompts to fp16, which theirs does in fp32 too; each coupling function has a start of its own, where theirs
are copies of one (``CLONE_MAPS True`` starts as theirs); more tokens than CTX_INIT has are refused; PREC is ``TRAINER.PREC`` for
every method.
"""

from __future__ import annotations

from typing import Any

from promptmix.plugins.prompt_bank.coupled_deep import CoupledDeep

from promptmix import register
from promptmix.config.declare import inherits
from promptmix.engine.layout import COUPLED_TEXT, Layout, linear
from promptmix.prompts.heads import Cosine
from promptmix.prompts.learner import Learner
from promptmix.prompts.roles import Task
from promptmix.prompts.trainer import PromptTrainer


@register
class MaPLe(PromptTrainer):
    """Coupled deep prompts in both towers, trained with cross-entropy."""

    layout = Layout(
        "MultiModalPromptLearner",
        (
            *COUPLED_TEXT,
            *linear("proj", "bank.couple.0"),
            *linear("compound_prompt_projections.{i}", "bank.couple.{i+1}"),
        ),
        whole=True,
    )

    @inherits(CoupledDeep, without=["n_prompts"])
    def compose(self, task: Task, **deep: Any) -> Learner:
        prompts = CoupledDeep(task, **deep)
        return Learner(task, prompts, head=Cosine(task, prompts))
