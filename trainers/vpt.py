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

from collections.abc import Sequence
from typing import Annotated

from promptmix.plugins.prompt_bank.hard import Hard
from torch import Tensor
from yacs.config import CfgNode

from promptmix import register
from promptmix.clip.vision import VisualPrompts
from promptmix.config.declare import Setting
from promptmix.engine.layout import VISUAL, Layout
from promptmix.errors import ConfigError
from promptmix.prompts.deep import VisionPrompts, check_depth
from promptmix.prompts.heads import Cosine
from promptmix.prompts.learner import Learner
from promptmix.prompts.roles import Task
from promptmix.prompts.trainer import PromptTrainer


class HardWithVision(Hard):
    """A hard prompt, and learned tokens in the image tower.

    Args:
        template: the hard prompt.
        vision: the image tower's tokens.
    """

    def __init__(self, task: Task, template: str, vision: VisionPrompts) -> None:
        super().__init__(task, (template,))
        self.vision = vision

    def encode(self, names: Sequence[str], *, full_stop: bool | None = None) -> Tensor:
        """Return the normalised features (1, C, D) of the one template."""
        return self.task.clip.hard_features(self.templates, names)

    def visual(self) -> Sequence[VisualPrompts]:
        return self.vision()


@register
class VPT(PromptTrainer):
    """Visual prompts in each layer of the image tower, trained with cross-entropy."""

    layout = Layout("prompt_learner", VISUAL, whole=True)

    @classmethod
    def validate(cls, cfg: CfgNode) -> None:
        """Refuse braces in the hard prompt."""
        words = cfg.TRAINER.VPT.CTX_INIT
        if "{" in words or "}" in words or not words:
            raise ConfigError(
                f"TRAINER.VPT.CTX_INIT is {words!r}, but must be the words in front of the class name, such as 'a photo of a'"
            )

    def compose(
        self,
        task: Task,
        n_ctx_vision: Annotated[int, Setting("p: learned tokens of each layer", low=1)] = 2,
        ctx_init: Annotated[str, Setting("words of the hard prompt, before the class name")] = "a photo of a",
        prompt_depth_vision: Annotated[int, Setting("layers with tokens of their own, from the first; 1 = shallow", low=1)] = 1,
    ) -> Learner:
        check_depth(task.clip, "prompt_depth_vision", prompt_depth_vision, vision=True)
        vision = VisionPrompts(task.clip.image.width, n_ctx_vision, prompt_depth_vision)
        prompts = HardWithVision(task, f"{ctx_init.replace('_', ' ')} {{}}.", vision)
        return Learner(task, prompts, head=Cosine(task, prompts))
