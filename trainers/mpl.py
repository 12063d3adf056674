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
one (``CLONE_MAPS True`` starts as theirs), so that the groups added at the last prompted layer never differ; N_RM_OP above N_CTX
is refused, where theirs would also remove patches; PREC is ``TRAINER.PREC`` for every method.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import nn
from yacs.config import CfgNode

from promptmix import register
from promptmix.clip.vision import PromptStep, VisualPrompts
from promptmix.config.declare import Setting
from promptmix.engine.layout import COUPLED_TEXT, Layout, linear
from promptmix.errors import ConfigError
from promptmix.prompts.deep import DeepBank, TextPrompts, check_depth, linear_maps
from promptmix.prompts.heads import Cosine
from promptmix.prompts.learner import Learner
from promptmix.prompts.roles import Task
from promptmix.prompts.trainer import PromptTrainer


class ModularPrompts(DeepBank):
    """Deep text prompts that add tokens to the image tower layer by layer, and remove or carry on others.

    Args:
        text: the text prompts of the layers 0 ... J-1.
        n_add: groups of tokens added at each deeper layer.
        n_remove: tokens removed before that.
        clone_maps: the added groups' maps start as copies of one.
    """

    def __init__(self, task: Task, text: TextPrompts, n_add: int, n_remove: int, clone_maps: bool = False) -> None:
        super().__init__(task, text)
        self.n_remove = n_remove
        widths, deeper = (task.clip.text.width, task.clip.image.width), len(text.deeper)
        self.couple = nn.Linear(*widths)
        maps = list(linear_maps(widths, n_add * deeper, clones=clone_maps))
        self.add = nn.ModuleList(nn.ModuleList(maps[k * n_add : (k + 1) * n_add]) for k in range(deeper))

    def visual(self) -> Sequence[VisualPrompts]:
        """Return the schedule: the mapped context at the input, then remove and add."""
        steps = {0: PromptStep(self.couple(self.text.ctx))}
        for layer, (maps, prompt) in enumerate(zip(self.add, self.text.deeper, strict=True), start=1):
            steps[layer] = PromptStep(torch.cat([f(prompt) for f in maps.children()]), remove=self.n_remove)
        return [steps]


@register
class MPL(PromptTrainer):
    """Text prompts in depth, with add, remove and carry in the image tower, trained with cross-entropy."""

    layout = Layout(
        "MultiModalPromptLearner",
        (*COUPLED_TEXT, *linear("proj", "bank.couple"), *linear("txt2img_proj.{i}.{j}", "bank.add.{j}.{i}")),
        whole=True,
    )

    @classmethod
    def validate(cls, cfg: CfgNode) -> None:
        """Refuse removing more than the first deeper layer has."""
        node = cfg.TRAINER.MPL
        if node.N_RM_OP > node.N_CTX:
            raise ConfigError(
                f"TRAINER.MPL.N_RM_OP is {node.N_RM_OP}, but the first deeper layer of the image tower has N_CTX = {node.N_CTX} "
                f"prompts to remove before it would lose patches; set it to {node.N_CTX} or less, or raise N_CTX"
            )

    def compose(
        self,
        task: Task,
        n_ctx: Annotated[int, Setting("M: learned tokens of each layer of the text tower", low=1)] = 1,
        ctx_init: Annotated[str, Setting('fixed words between context and class name; "" = none')] = "a photo of a",
        prompt_depth: Annotated[int, Setting("layers with prompts, from the first", low=1)] = 9,
        n_add_op: Annotated[int, Setting("groups of N_CTX tokens added at each deeper layer of the image tower", low=1)] = 2,
        n_rm_op: Annotated[int, Setting("tokens removed before that, the last ones", low=0)] = 1,
        clone_maps: Annotated[bool, Setting("the added groups' maps start as copies of one, as the authors' do")] = False,
    ) -> Learner:
        tower = task.clip.text
        check_depth(task.clip, "prompt_depth", prompt_depth, text=True, vision=True)
        start = tower.embed(tower.tokenizer.encode("X") * n_ctx).cpu()
        words = tower.tokenizer.encode(ctx_init.replace("_", " "))
        prompts = ModularPrompts(task, TextPrompts(task, start, words, prompt_depth), n_add_op, n_rm_op, clone_maps)
        return Learner(task, prompts, head=Cosine(task, prompts))
