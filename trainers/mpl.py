"""MPL: Modular Prompt Learning Improves Vision-Language Models.

Zhenhan Huang, Tejaswini Pedapati, Pin-Yu Chen, Jianxi Gao. ICASSP 2025. https://arxiv.org/abs/2502.14125

| paper | here |
|---|---|
| text prompt [V_1 ... V_M] a photo of a <class>, new at each layer | ``text.layers``, ``N_CTX`` tokens, ``PROMPT_DEPTH`` layers |
| vision prompt of the input, a linear map of the text prompt | ``couple`` |
| add operation: a_1 ... a_m, linear maps of the layer's text prompt | ``add[k]``, ``N_ADD_OP`` maps for layer k + 1 |
| remove operation: the last tokens go | ``N_RM_OP``, ``PromptStep.remove`` |
| carry operation: the others stay | what no ``PromptStep`` touches |

So the image tower's context grows by N_ADD_OP * N_CTX - N_RM_OP tokens a layer. Unlike MaPLe's, the context stands before all
the words of CTX_INIT and starts from the token of the letter "X".

Deviations from the authors' code (github.com/Zhenhan-Huang/Modular-Prompt-Learning, trainers/mpl.py): none in the numbers but
the rounding of prompts to fp16, which theirs does in fp32 too; each linear map has a start of its own, where theirs are copies of
one, so that the groups added at the last prompted layer never differ; N_RM_OP above N_CTX is refused, where theirs would also
remove patches; PREC is ``TRAINER.PREC`` for every method.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from promptmix import hookimpl
from promptmix.clip.vision import PromptStep, VisualPrompts
from promptmix.errors import ConfigError
from promptmix.prompts.deep import DeepLearner, DeepPromptTrainer, TextPrompts, require_at_least
from promptmix.prompts.roles import PromptLearner, Task
from promptmix.registry import Registry


class ModularPrompts(DeepLearner):
    """Deep text prompts that add tokens to the image tower layer by layer, and remove or carry on others.

    Args:
        task: the frozen model and the class names.
        text: the text prompts of the layers 0 ... J-1.
        n_add: groups of tokens added at each deeper layer.
        n_remove: tokens removed before that.
    """

    def __init__(self, task: Task, text: TextPrompts, n_add: int, n_remove: int) -> None:
        super().__init__(task)
        self.text, self.n_remove = text, n_remove
        widths = task.clip.text.width, task.clip.image.width
        self.couple = nn.Linear(*widths)
        self.add = nn.ModuleList(nn.ModuleList(nn.Linear(*widths) for _ in range(n_add)) for _ in text.deeper)

    def visual_prompts(self) -> VisualPrompts:
        """Return the schedule: the mapped context at the input, then remove and add."""
        steps = {0: PromptStep(self.couple(self.text.ctx))}
        for layer, (maps, prompt) in enumerate(zip(self.add, self.text.deeper, strict=True), start=1):
            steps[layer] = PromptStep(torch.cat([f(prompt) for f in maps.children()]), remove=self.n_remove)
        return steps

    def classifier(self) -> Tensor:
        """Return normalised text features (C, D)."""
        return self.text(self.task.classnames)[0]


class MPL(DeepPromptTrainer):
    """Text prompts in depth, with add, remove and carry in the image tower, trained with cross-entropy."""

    @staticmethod
    def add_config(node: CfgNode) -> None:
        """Declare MPL's keys, as the authors name them."""
        node.N_CTX = 1  # M: learned tokens of each layer of the text tower
        node.CTX_INIT = "a photo of a"  # fixed words between context and class name; "" = none
        node.PROMPT_DEPTH = 9  # layers with prompts, from the first
        node.N_ADD_OP = 2  # groups of N_CTX tokens added at each deeper layer of the image tower
        node.N_RM_OP = 1  # tokens removed before that, the last ones

    @classmethod
    def validate(cls, cfg: CfgNode) -> None:
        """Refuse a model without prompts, and removing more than the first deeper layer has."""
        require_at_least(cfg, "TRAINER.MPL", N_CTX=1, PROMPT_DEPTH=1, N_ADD_OP=1, N_RM_OP=0)
        node = cfg.TRAINER.MPL
        if node.N_RM_OP > node.N_CTX:
            raise ConfigError(
                f"TRAINER.MPL.N_RM_OP is {node.N_RM_OP}, but the first deeper layer of the image tower has N_CTX = {node.N_CTX} "
                f"prompts to remove before it would lose patches; set it to {node.N_CTX} or less, or raise N_CTX"
            )

    def build_learner(self, task: Task) -> PromptLearner:
        """Return the modular prompts."""
        node, tower = self.node, self.clip.text
        depth = self.depth("PROMPT_DEPTH", text=True, vision=True)
        start = tower.embed(tower.tokenizer.encode("X") * node.N_CTX).cpu()
        words = tower.tokenizer.encode(node.CTX_INIT.replace("_", " "))
        return ModularPrompts(task, TextPrompts(task, start, words, depth), node.N_ADD_OP, node.N_RM_OP)


@hookimpl
def register_trainers(registry: Registry) -> None:
    """Add the trainer."""
    registry.register(MPL)
