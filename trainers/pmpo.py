"""PMPO: Multi-Prompt with Depth Partitioned Cross-Modal Learning.

Yingjie Tian, Yiqi Wang, Xianda Guo, Zheng Zhu, Long Chen. 2023. https://arxiv.org/abs/2305.06221

| paper | here |
|---|---|
| N soft text prompts | ``text.ctx`` (N, M, W), ``N_PROMPTS``, ``N_CTX`` |
| partition of the image tower's depth into N blocks | ``block_of`` |
| projection of a text prompt into the layers of its block | ``project``, one linear map for each prompted layer |
| prior of hand-written templates | ``manual`` (C, D), ``MANUAL_TEMPLATES``, ``MANUAL_WEIGHT`` |

No code was ever published, and only the paper's abstract was at hand. From it: several prompts, a partition of the image tower's
depth, prompts that reach into it, and hand-written templates as a prior. All else is assumed, where it can be in keys:

- N_PROMPTS 4, N_CTX 4 and PROMPT_DEPTH 9: the first nine layers are partitioned, not all twelve.
- One linear map for each prompted layer turns a text prompt into that layer's visual tokens.
- The blocks are contiguous and as equal as they can be, the earlier ones larger. Tokens are replaced from layer to layer (MaPLe).
- The first prompt starts from CTX_INIT, the others at random: prompts of the same start would have the same text features.
- TEXT_DEPTH 1: text prompts stand at the input alone. More gives each prompt new tokens in deeper layers of the text tower.
- A class is the mean of the N normalised text features, joined with the mean of its normalised template features as
  (1 - MANUAL_WEIGHT) * soft + MANUAL_WEIGHT * hard, normalised; MANUAL_WEIGHT 0.5.
- MANUAL_TEMPLATES (): the data set's own templates.
- Loss and optimiser are MaPLe's: cross-entropy, SGD.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch.nn.functional as F
from torch import Tensor
from yacs.config import CfgNode

from promptmix import register
from promptmix.clip.tokens import split_template
from promptmix.clip.vision import VisualPrompts
from promptmix.config.declare import Setting
from promptmix.errors import ConfigError
from promptmix.prompts.deep import DeepBank, TextPrompts, check_depth, linear_maps, replace_each_layer, start_words
from promptmix.prompts.heads import Cosine
from promptmix.prompts.learner import Learner
from promptmix.prompts.roles import Task
from promptmix.prompts.trainer import PromptTrainer


def block_of(layer: int, depth: int, blocks: int) -> int:
    """Return which of ``blocks`` equal, contiguous parts of the first ``depth`` layers ``layer`` lies in."""
    small, larger = divmod(depth, blocks)
    edge = larger * (small + 1)
    return layer // (small + 1) if layer < edge else larger + (layer - edge) // small


class PartitionedPrompts(DeepBank):
    """N text prompts, each of which reaches into one block of the image tower's layers; together they make one classifier.

    Args:
        text: the N text prompts, context (N, M, W).
        depth: layers of the image tower that get prompts.
        templates: hand-written prompts that join the learned ones; () = the data set's own.
        manual_weight: their share in the class feature.
    """

    takes_experts = False

    def __init__(
        self, task: Task, text: TextPrompts, depth: int, templates: Sequence[str] = (), manual_weight: float = 0.5
    ) -> None:
        super().__init__(task, text)
        self.templates, self.manual_weight = tuple(templates) or task.templates, manual_weight
        self.project = linear_maps((task.clip.text.width, task.clip.image.width), depth, clones=False)

    @property
    def num_experts(self) -> int:
        """1: the prompts' features are averaged."""
        return 1

    def visual(self) -> Sequence[VisualPrompts]:
        """Return the schedule: layer k gets the projected prompt of the block that k lies in."""
        prompts, depth = self.text.ctx, len(self.project)
        return replace_each_layer([f(prompts[block_of(k, depth, len(prompts))]) for k, f in enumerate(self.project)])

    def forward(  # type: ignore[override]  # all prompts make one classifier
        self, names: Sequence[str], image_features: Tensor | None = None, *, full_stop: bool | None = None
    ) -> Tensor:
        """Return normalised class features (1, C, D) of learned and hand-written prompts."""
        soft = F.normalize(self.text(names, full_stop=full_stop).mean(dim=0), dim=-1)
        return F.normalize((1 - self.manual_weight) * soft + self.manual_weight * self.manual(names), dim=-1)[None]

    def manual(self, names: Sequence[str]) -> Tensor:
        """Return the normalised features (C, D) of the hand-written prompts."""
        return self.once("manual", names, lambda: self.task.clip.ensemble(self.templates, names))


@register
class PMPO(PromptTrainer):
    """Several text prompts over a partition of the image tower's depth, trained with cross-entropy."""

    @classmethod
    def validate(cls, cfg: CfgNode) -> None:
        """Refuse fewer layers than blocks, and templates that would be ignored."""
        node = cfg.TRAINER.PMPO
        if node.PROMPT_DEPTH < node.N_PROMPTS:
            raise ConfigError(
                f"TRAINER.PMPO.PROMPT_DEPTH is {node.PROMPT_DEPTH}, too few layers for blocks of N_PROMPTS = {node.N_PROMPTS} "
                "prompts; raise it or lower N_PROMPTS"
            )
        if node.MANUAL_TEMPLATES and not node.MANUAL_WEIGHT:
            raise ConfigError("TRAINER.PMPO.MANUAL_TEMPLATES would be ignored, since MANUAL_WEIGHT is 0; drop one")
        for template in node.MANUAL_TEMPLATES:
            split_template(template)

    def compose(
        self,
        task: Task,
        n_prompts: Annotated[int, Setting("N: text prompts, and blocks of the image tower", low=1)] = 4,
        n_ctx: Annotated[int, Setting("M: learned tokens of each prompt", low=1)] = 4,
        ctx_init: Annotated[str, Setting('start of the first prompt; "" = random as the others')] = "a photo of a",
        prompt_depth: Annotated[int, Setting("layers of the image tower with prompts, from the first", low=1)] = 9,
        text_depth: Annotated[int, Setting("layers of the text tower with tokens of their own", low=1)] = 1,
        manual_templates: Annotated[
            Sequence[str], Setting('hand-written prompts such as "a photo of a {}."; () = the data set\'s own')
        ] = (),
        manual_weight: Annotated[float, Setting("their share in the class feature", low=0, below=1)] = 0.5,
    ) -> Learner:
        check_depth(task.clip, "prompt_depth", prompt_depth, vision=True)
        check_depth(task.clip, "text_depth", text_depth, text=True)
        start, words = start_words(task.clip, n_ctx, ctx_init, n_prompts=n_prompts)
        text = TextPrompts(task, start.reshape(n_prompts, n_ctx, -1), words, text_depth)
        prompts = PartitionedPrompts(task, text, prompt_depth, manual_templates, manual_weight)
        return Learner(task, prompts, head=Cosine(task, prompts))
