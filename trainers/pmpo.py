"""PMPO: Multi-Prompt with Depth Partitioned Cross-Modal Learning.

Yingjie Tian, Yiqi Wang, Xianda Guo, Zheng Zhu, Long Chen. 2023. https://arxiv.org/abs/2305.06221

| paper | here |
|---|---|
| N soft text prompts | ``text.ctx`` (N, M, W), ``N_PROMPTS``, ``N_CTX`` |
| partition of the image tower's depth into N blocks | ``block_of`` |
| projection of a text prompt into the layers of its block | ``project``, one linear map for each prompted layer |
| prior of hand-written templates | ``manual`` (C, D), ``MANUAL_TEMPLATES``, ``MANUAL_WEIGHT`` |

No code was ever published, so this follows the paper's text; what that leaves open is assumed, each in a key of its own:

- N_PROMPTS 4, N_CTX 4 and PROMPT_DEPTH 9.
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

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from yacs.config import CfgNode

from promptmix import hookimpl
from promptmix.clip.tokens import split_template
from promptmix.clip.vision import VisualPrompts
from promptmix.errors import ConfigError
from promptmix.prompts.deep import (
    STD,
    DeepLearner,
    DeepPromptTrainer,
    TextPrompts,
    replace_each_layer,
    require_at_least,
    start_words,
)
from promptmix.prompts.roles import PromptLearner, Task
from promptmix.registry import Registry


def block_of(layer: int, depth: int, blocks: int) -> int:
    """Return which of ``blocks`` equal, contiguous parts of the first ``depth`` layers ``layer`` lies in."""
    small, larger = divmod(depth, blocks)
    edge = larger * (small + 1)
    return layer // (small + 1) if layer < edge else larger + (layer - edge) // small


class PartitionedPrompts(DeepLearner):
    """N text prompts, each of which reaches into one block of the image tower's layers.

    Args:
        task: the frozen model and the class names.
        text: the N text prompts, context (N, M, W).
        depth: layers of the image tower that get prompts.
        templates: hand-written prompts that join the learned ones; () = the data set's own.
        manual_weight: their share in the class feature.
    """

    manual: Tensor

    def __init__(
        self, task: Task, text: TextPrompts, depth: int, templates: Sequence[str] = (), manual_weight: float = 0.5
    ) -> None:
        super().__init__(task)
        self.text, self.manual_weight = text, manual_weight
        widths = task.clip.text.width, task.clip.image.width
        self.project = nn.ModuleList(nn.Linear(*widths) for _ in range(depth))
        manual = task.clip.ensemble(tuple(templates) or task.templates, task.classnames)
        self.register_buffer("manual", manual, persistent=False)

    def visual_prompts(self) -> VisualPrompts:
        """Return the schedule: layer k gets the projected prompt of the block that k lies in."""
        prompts, depth = self.text.ctx, len(self.project)
        return replace_each_layer([f(prompts[block_of(k, depth, len(prompts))]) for k, f in enumerate(self.project)])

    def classifier(self) -> Tensor:
        """Return normalised class features (C, D) of learned and hand-written prompts."""
        soft = F.normalize(self.text(self.task.classnames).mean(dim=0), dim=-1)
        return F.normalize((1 - self.manual_weight) * soft + self.manual_weight * self.manual, dim=-1)


class PMPO(DeepPromptTrainer):
    """Several text prompts over a partition of the image tower's depth, trained with cross-entropy."""

    @staticmethod
    def add_config(node: CfgNode) -> None:
        """Declare the keys; all defaults are assumptions (see the head of the file)."""
        node.N_PROMPTS = 4  # N: text prompts, and blocks of the image tower
        node.N_CTX = 4  # M: learned tokens of each prompt
        node.CTX_INIT = "a photo of a"  # start of the first prompt; "" = random as the others
        node.PROMPT_DEPTH = 9  # layers of the image tower with prompts, from the first; N_PROMPTS or more
        node.TEXT_DEPTH = 1  # layers of the text tower with tokens of their own
        node.MANUAL_TEMPLATES = ()  # hand-written prompts such as "a photo of a {}."; () = the data set's own
        node.MANUAL_WEIGHT = 0.5  # their share in the class feature; 0 = learned prompts alone

    @classmethod
    def validate(cls, cfg: CfgNode) -> None:
        """Refuse numbers that can't work, and templates that would be ignored."""
        require_at_least(cfg, "TRAINER.PMPO", N_PROMPTS=1, N_CTX=1, TEXT_DEPTH=1, MANUAL_WEIGHT=0)
        node = cfg.TRAINER.PMPO
        if node.PROMPT_DEPTH < node.N_PROMPTS:
            raise ConfigError(
                f"TRAINER.PMPO.PROMPT_DEPTH is {node.PROMPT_DEPTH}, too few layers for blocks of N_PROMPTS = {node.N_PROMPTS} "
                "prompts; raise it or lower N_PROMPTS"
            )
        if node.MANUAL_WEIGHT >= 1:
            raise ConfigError(
                f"TRAINER.PMPO.MANUAL_WEIGHT is {node.MANUAL_WEIGHT}, but must be below 1, the learned prompts' end"
            )
        if node.MANUAL_TEMPLATES and not node.MANUAL_WEIGHT:
            raise ConfigError("TRAINER.PMPO.MANUAL_TEMPLATES would be ignored, since MANUAL_WEIGHT is 0; drop one")
        for template in node.MANUAL_TEMPLATES:
            split_template(template)

    def build_learner(self, task: Task) -> PromptLearner:
        """Return the partitioned prompts."""
        node = self.node
        depth = self.depth("PROMPT_DEPTH", vision=True)
        first, words = start_words(self.clip, self.node_name, node.N_CTX, node.CTX_INIT)
        others = torch.empty(node.N_PROMPTS - 1, *first.shape).normal_(std=STD)
        text = TextPrompts(task, torch.cat([first[None], others]), words, self.depth("TEXT_DEPTH", text=True))
        return PartitionedPrompts(task, text, depth, node.MANUAL_TEMPLATES, node.MANUAL_WEIGHT)


@hookimpl
def register_trainers(registry: Registry) -> None:
    """Add the trainer."""
    registry.register(PMPO)
