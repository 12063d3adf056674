"""TCP: Textual-based Class-aware Prompt tuning for Visual-Language Model.

Hantao Yao, Rui Zhang, Changsheng Xu. CVPR 2024. https://arxiv.org/abs/2311.18231

| paper | here |
|---|---|
| T, learnable prompt tokens | ``ClassAware.ctx`` (1, M, W), M = 4 |
| W^clip, class-level textual knowledge | ``ClassAware.references`` (1, C, D): features of the hand-written prompts |
| TKE, textual knowledge embedding | ``ClassAware.meta_net``: Linear(D, D/4), quick GELU, Linear(D/4, M W) |
| T = TKE(W^clip), class-aware prompt tokens | ``ClassAware.class_tokens`` (1, C, M, W) |
| F_l with class-aware tokens in layer l | ``TextTower`` with deep tokens per class before block ``LAYER`` |
| L = L_ce + omega ||w - w^clip||^2, omega = 8 | ``W``; 1 - mean cosine, half the squared distance of unit vectors |

The classes share everything before block LAYER, so only the blocks from there on run once per class.

Deviations from the authors' code (github.com/htyao89/Textual-based_Class-aware_prompt_tuning, trainers/tcp.py): LAYER is a key (8
there, the ninth block, whatever the tower's depth); Adam's eps 1e-3, which they ask users to write into Dassl, is ``ADAM_EPS``;
their key W, which their code never reads, is the weight of the loss here; hidden width and number of tokens follow the model.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Annotated

import torch
from promptmix.plugins.text_supervision.hard_prompts import CosineToHard
from torch import Tensor, nn
from yacs.config import CfgNode

from promptmix import register
from promptmix.clip import split_template
from promptmix.config.core import ADAMS
from promptmix.config.declare import Setting
from promptmix.config.published import Theirs
from promptmix.engine.layout import Layout, Rule, linear
from promptmix.errors import SettingError
from promptmix.prompts.context import initial_context, refuse_idle_length
from promptmix.prompts.heads import Cosine
from promptmix.prompts.learner import Learner, PromptLearner
from promptmix.prompts.losses import CrossEntropy
from promptmix.prompts.roles import PromptBank, Task
from promptmix.prompts.trainer import PromptTrainer

#: The authors' templates (trainers/tcp.py, CUSTOM_TEMPLATES): the context tokens stand in front; other data sets get "{}.".
SOFT = {
    "OxfordPets": "{}, a type of pet.",
    "OxfordFlowers": "{}, a type of flower.",
    "FGVCAircraft": "{}, a type of aircraft.",
    "DescribableTextures": "{} texture.",
    "StanfordCars": "{}, a type of car",
    "Food101": "{}, a type of food.",
    "UCF101": "person doing {}.",
}
#: Their hand-written prompts where these differ from CoOp's.
HARD = {
    "FGVCAircraft": "a photo of an aircraft {}.",
    "DescribableTextures": "a photo of a {}, a type of texture.",
    "Food101": "a photo of a {}, a type of food.",
}


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), CLIP's activation."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation of ``x``."""
        return x * torch.sigmoid(1.702 * x)


class ClassAware(PromptBank):
    """A soft prompt whose tokens are replaced, deep in the text tower, by tokens made from each class's hard prompt.

    Args:
        n_ctx: M.
        ctx_init: words that the context starts from; "" draws from N(0, 0.02).
        layer: block, counted from 0, before which the tokens are replaced.
        template: what stands around the class name, behind the context.
        hard: the hand-written prompt.
    """

    def __init__(self, task: Task, n_ctx: int, ctx_init: str, layer: int, template: str, hard: str) -> None:
        super().__init__(task)
        tower, joint = task.clip.text, task.clip.embed_dim
        if layer >= len(tower.blocks):
            limit = len(tower.blocks) - 1
            remedy = f"but the text tower of {task.clip.name} has blocks 0 to {limit}; set it to {limit} or less"
            raise SettingError("layer", layer, remedy)
        self.layer, self.hard = layer, hard
        self.words = tuple(tower.tokenizer.encode(text) for text in split_template(template))
        self.ctx = nn.Parameter(initial_context(tower, n_ctx, ctx_init, 1))
        parts = (
            ("linear1", nn.Linear(joint, joint // 4)),
            ("gelu", QuickGELU()),
            ("linear2", nn.Linear(joint // 4, self.ctx[0].numel())),
        )
        self.meta_net = nn.Sequential(OrderedDict(parts))

    def class_tokens(self, names: Sequence[str]) -> Tensor:
        """Return the class-aware tokens (1, C, M, W)."""
        return self.meta_net(self.references(names)).unflatten(-1, self.ctx.shape[1:])

    def encode(self, names: Sequence[str], *, full_stop: bool | None = None) -> Tensor:
        """Return text features (1, C, D); the template says where prompts end."""
        tower = self.task.clip.text
        before, after = (tower.embed(ids)[None] for ids in self.words)
        prompts = tower.compose(self.ctx, before, tower.tokenizer.class_tokens(names), after)
        return tower(prompts, {self.layer: self.class_tokens(names)})

    def references(self, names: Sequence[str]) -> Tensor:
        """Return the normalised features (1, C, D) of the hand-written prompt, encoded once for a set of names."""
        return self.once("hard", names, lambda: self.task.clip.hard_features([self.hard], names))


@register
class TCP(PromptTrainer):
    """One soft prompt with class-aware tokens deep in the text tower, held near the hand-written prompt."""

    published_keys = {
        "TRAINER.COOP.*": "*",
        "TRAINER.COOP.W": Theirs(),  # the factor 8 is written into their loss
        "TRAINER.COOP.CTX_INIT": Theirs("CTX_INIT", {"True": "a photo of a", "False": ""}),
        "TRAINER.COOP.CSC": Theirs(values={"False": False}, instead="leave it out"),
        "TRAINER.COOP.CLASS_TOKEN_POSITION": Theirs(values={"end": "end"}, instead="leave it out"),
    }
    layout = Layout(
        "prompt_learner",
        (
            Rule("ctx", "bank.ctx", expert_axis=True),
            *linear("meta_net.linear1", "bank.meta_net.linear1"),
            *linear("meta_net.linear2", "bank.meta_net.linear2"),
        ),
    )

    def compose(
        self,
        task: Task,
        n_ctx: Annotated[int, Setting("M: context tokens", low=1)] = 4,
        ctx_init: Annotated[str, Setting('words to start from, such as "a photo of a"; then M is their number of tokens')] = "",
        w: Annotated[float, Setting("omega: factor on 1 - mean cosine", low=0)] = 8.0,
        layer: Annotated[int, Setting("text block, from 0, before which tokens become class-aware", low=1)] = 8,
        template: Annotated[str, Setting('behind the context, such as "{}, a type of pet."; "" = the authors\'')] = "",
        hard_template: Annotated[str, Setting("hand-written prompt; \"\" = the authors', else the data set's first")] = "",
        adam_eps: Annotated[float, Setting("Adam's eps", above=0, needs=(("OPTIM.NAME", ADAMS),))] = 1e-3,
    ) -> Learner:
        """Return the class-aware prompt with the loss L_ce + omega L_kg."""
        name = self.cfg.DATASET.NAME
        soft, hard = template or SOFT.get(name, "{}."), hard_template or HARD.get(name, task.templates[0])
        prompt = ClassAware(task, n_ctx, ctx_init, layer, soft, hard)
        return Learner(task, prompt, head=Cosine(task, prompt), loss=CrossEntropy() + w * CosineToHard(task, prompt))

    @classmethod
    def validate(cls, cfg: CfgNode) -> None:
        """Refuse a context length that the initial words would override."""
        super().validate(cfg)
        refuse_idle_length(cfg, "TRAINER.TCP")

    def build_optimizer(self, model: PromptLearner) -> torch.optim.Optimizer:
        """Return the optimizer that ``OPTIM`` names; Adam with the authors' eps."""
        optimizer = super().build_optimizer(model)
        for group in optimizer.param_groups:
            if "eps" in group:
                group["eps"] = self.node.ADAM_EPS
        return optimizer
