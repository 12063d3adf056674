"""MaPLe: Multi-modal Prompt Learning.

Muhammad Uzair Khattak, Hanoona Rasheed, Muhammad Maaz, Salman Khan, Fahad Shahbaz Khan. CVPR 2023.
https://arxiv.org/abs/2210.03117

| paper | here |
|---|---|
| P_0 ... P_{J-1}, b tokens each (language) | ``text.layers``, ``N_CTX`` tokens, ``PROMPT_DEPTH`` layers |
| F_k, vision-language coupling function | ``couple[k]``, a linear map from the text tower's width to the image tower's |
| P~_k = F_k(P_k) (vision) | ``MaPLeLearner.visual_prompts`` |
| W_0 = [P_0, w_1 ... w_N]; [_, W_i] = L_i([P_{i-1}, W_{i-1}]) | ``TextTower`` with deep prompts |
| [c_i, E_i, _] = V_i([c_{i-1}, E_{i-1}, P~_{i-1}]) | ``ImageTower`` with a ``PromptStep`` per layer |

The context starts from the first N_CTX tokens of CTX_INIT; its other words stay, so that 2 tokens of "a photo of a" make
``[v1] [v2] of a <class>.``.

Deviations from the authors' code (github.com/muzairkhattak/multimodal-prompt-learning, trainers/maple.py): none in the numbers
but the rounding of prompts to fp16, which theirs does in fp32 too; each coupling function has a start of its own, where theirs
are copies of one; more tokens than CTX_INIT has are refused; PREC is ``TRAINER.PREC`` for every method.
"""

from __future__ import annotations

from torch import Tensor, nn
from yacs.config import CfgNode

from promptmix import hookimpl
from promptmix.clip.vision import VisualPrompts
from promptmix.prompts.deep import DeepLearner, DeepPromptTrainer, TextPrompts, replace_each_layer, require_at_least, start_words
from promptmix.prompts.roles import PromptLearner, Task
from promptmix.registry import Registry


class MaPLeLearner(DeepLearner):
    """Deep text prompts, and visual prompts that are linear maps of them, layer by layer.

    Args:
        task: the frozen model and the class names.
        text: the text prompts P_0 ... P_{J-1}.
    """

    def __init__(self, task: Task, text: TextPrompts) -> None:
        super().__init__(task)
        self.text = text
        widths = task.clip.text.width, task.clip.image.width
        self.couple = nn.ModuleList(nn.Linear(*widths) for _ in text.layers)

    def visual_prompts(self) -> VisualPrompts:
        """Return the schedule of P~_k = F_k(P_k)."""
        return replace_each_layer([f(p) for f, p in zip(self.couple, self.text.layers, strict=True)])

    def classifier(self) -> Tensor:
        """Return normalised text features (C, D)."""
        return self.text(self.task.classnames)[0]


class MaPLe(DeepPromptTrainer):
    """Coupled deep prompts in both towers, trained with cross-entropy."""

    @staticmethod
    def add_config(node: CfgNode) -> None:
        """Declare MaPLe's keys, as the authors name them."""
        node.N_CTX = 2  # b: learned tokens of each layer, in both towers
        node.CTX_INIT = "a photo of a"  # words before the class name; "" = random tokens alone
        node.PROMPT_DEPTH = 9  # J: layers with tokens of their own, from the first; 1 = shallow

    @classmethod
    def validate(cls, cfg: CfgNode) -> None:
        """Refuse a model without prompts."""
        require_at_least(cfg, "TRAINER.MAPLE", N_CTX=1, PROMPT_DEPTH=1)

    def build_learner(self, task: Task) -> PromptLearner:
        """Return the coupled prompts."""
        depth = self.depth("PROMPT_DEPTH", text=True, vision=True)
        start, words = start_words(self.clip, self.node_name, self.node.N_CTX, self.node.CTX_INIT)
        return MaPLeLearner(task, TextPrompts(task, start, words, depth))


@hookimpl
def register_trainers(registry: Registry) -> None:
    """Add the trainer."""
    registry.register(MaPLe)
