"""VPT: Visual Prompt Tuning, in the deep form and on CLIP as the MaPLe authors compare with it.

Menglin Jia, Luming Tang, Bor-Chun Chen, Claire Cardie, Serge Belongie, Bharath Hariharan, Ser-Nam Lim. ECCV 2022.
https://arxiv.org/abs/2203.12119

| paper | here |
|---|---|
| P_0 ... P_{N-1}, p tokens for each layer | ``VisionPrompts.layers``, ``N_CTX_VISION`` tokens, ``PROMPT_DEPTH_VISION`` layers |
| [x_i, _, E_i] = L_i([x_{i-1}, P_{i-1}, E_{i-1}]) | ``ImageTower`` with a ``PromptStep`` per layer |
| head | the text features of ``CTX_INIT`` and the class name, which nothing changes |

The paper learns a linear head; on CLIP the frozen text features take its place. PROMPT_DEPTH_VISION 1 is VPT-shallow.

Deviations from the MaPLe authors' code (github.com/muzairkhattak/multimodal-prompt-learning, trainers/vpt.py): CTX_INIT is read,
where theirs writes "a photo of a" whatever the key says; PREC is ``TRAINER.PREC`` for every method, fp32 by default.
"""

from __future__ import annotations

from torch import Tensor
from yacs.config import CfgNode

from promptmix import hookimpl
from promptmix.clip.vision import VisualPrompts
from promptmix.errors import ConfigError
from promptmix.prompts.deep import DeepLearner, DeepPromptTrainer, VisionPrompts, require_at_least
from promptmix.prompts.roles import PromptLearner, Task
from promptmix.registry import Registry


class VisualPromptLearner(DeepLearner):
    """Visual prompts before a fixed classifier.

    Args:
        task: the frozen model and the class names.
        vision: the image tower's prompts.
        words: hard prompt before the class name.
    """

    text: Tensor

    def __init__(self, task: Task, vision: VisionPrompts, words: str) -> None:
        super().__init__(task)
        self.vision = vision
        template = f"{words.replace('_', ' ')} {{}}."
        self.register_buffer("text", task.clip.hard_features([template], task.classnames)[0], persistent=False)

    def visual_prompts(self) -> VisualPrompts:
        """Return the image tower's schedule."""
        return self.vision()

    def classifier(self) -> Tensor:
        """Return the normalised features (C, D) of the hard prompts."""
        return self.text


class VPT(DeepPromptTrainer):
    """Visual prompts in each layer of the image tower, trained with cross-entropy."""

    @staticmethod
    def add_config(node: CfgNode) -> None:
        """Declare VPT's keys, as the MaPLe authors name them."""
        node.N_CTX_VISION = 2  # p: learned tokens of each layer
        node.CTX_INIT = "a photo of a"  # words of the hard prompt, before the class name
        node.PROMPT_DEPTH_VISION = 1  # layers with tokens of their own, from the first; 1 = shallow

    @classmethod
    def validate(cls, cfg: CfgNode) -> None:
        """Refuse a model without visual prompts, and braces in the hard prompt."""
        require_at_least(cfg, "TRAINER.VPT", N_CTX_VISION=1, PROMPT_DEPTH_VISION=1)
        words = cfg.TRAINER.VPT.CTX_INIT
        if "{" in words or "}" in words or not words:
            raise ConfigError(
                f"TRAINER.VPT.CTX_INIT is {words!r}, but must be the words in front of the class name, such as 'a photo of a'"
            )

    def build_learner(self, task: Task) -> PromptLearner:
        """Return the visual prompts in front of the hard classifier."""
        depth = self.depth("PROMPT_DEPTH_VISION", vision=True)
        vision = VisionPrompts(self.clip.image.width, self.node.N_CTX_VISION, depth)
        return VisualPromptLearner(task, vision, self.node.CTX_INIT)


@hookimpl
def register_trainers(registry: Registry) -> None:
    """Add the trainer."""
    registry.register(VPT)
