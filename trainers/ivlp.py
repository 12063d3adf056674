"""IVLP: independent vision-language prompting, the baseline of MaPLe.

Muhammad Uzair Khattak, Hanoona Rasheed, Muhammad Maaz, Salman Khan, Fahad Shahbaz Khan. CVPR 2023, section 4.1.
https://arxiv.org/abs/2210.03117

| paper | here |
|---|---|
| language prompts P, layers 1 ... J | ``TextPrompts.layers``, ``N_CTX_TEXT`` tokens, ``PROMPT_DEPTH_TEXT`` layers |
| vision prompts, layers 1 ... J | ``VisionPrompts.layers``, ``N_CTX_VISION`` tokens, ``PROMPT_DEPTH_VISION`` layers |
| no coupling function F | nothing connects the two |

The context starts from the first N_CTX_TEXT tokens of CTX_INIT; its other words stay, so that 2 tokens of "a photo of a" make
``[v1] [v2] of a <class>.``. N_CTX_VISION 0 and PROMPT_DEPTH_VISION 0 leave deep language prompting, on any image tower.

Deviations from the authors' code (github.com/muzairkhattak/multimodal-prompt-learning, trainers/independentVL.py): none in the
numbers but the rounding of deep prompts to fp16, which theirs does in fp32 too; more tokens than CTX_INIT has are refused, where
theirs starts at random from 5 tokens on and reads past the words below that; PREC is ``TRAINER.PREC`` for every method.
"""

from __future__ import annotations

from yacs.config import CfgNode

from promptmix import hookimpl
from promptmix.prompts.deep import DeepPromptTrainer, IndependentPrompts, add_independent_config, validate_independent
from promptmix.prompts.roles import PromptLearner, Task
from promptmix.registry import Registry


class IVLP(DeepPromptTrainer):
    """Deep prompts in both towers, trained with cross-entropy."""

    @staticmethod
    def add_config(node: CfgNode) -> None:
        """Declare IVLP's keys, as the authors name them."""
        add_independent_config(node, n_ctx=2, depth=9)

    @classmethod
    def validate(cls, cfg: CfgNode) -> None:
        """Refuse numbers that can't work or contradict each other."""
        validate_independent(cfg, "TRAINER.IVLP")

    def build_learner(self, task: Task) -> PromptLearner:
        """Return the prompts of both towers."""
        return IndependentPrompts(task, *self.independent_parts(task))


@hookimpl
def register_trainers(registry: Registry) -> None:
    """Add the trainer."""
    registry.register(IVLP)
