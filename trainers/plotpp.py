"""PLOT++: Prompt Learning with Optimal Transport, with prompts in both towers.

Guangyi Chen, Weiran Yao, Xiangchen Song, Xinyue Li, Yongming Rao, Kun Zhang. ICLR 2023, the version in the authors' repository.
https://arxiv.org/abs/2210.01253

| paper, README | here |
|---|---|
| N text prompts, started from N templates | ``PromptSets.ctx`` (N, n, W) |
| M visual prompts, each of which sees the whole picture | ``PromptSets.ctx_vision`` (M, N_CTX_V, W_v), ``Step.image`` (B, M, D) |
| transport between M image features and N text features | ``TransportOfSets``, as PLOT's between patches and prompts |
| stage 1, visual prompts alone | ``MODEL_UPD vision``, ``TRADE_OFF True``: mean image and mean text feature are scored too |
| stage 2, both | ``MODEL_UPD joint`` from stage 1's weights: ``MODEL.INIT_WEIGHTS`` |

A picture goes through the image tower M times. The frozen tower's features are never read, so they are not computed.

Deviations from the authors' code (github.com/CHENGY12/PLOT, plot-pp): other data sets than their 11 take Caltech101's
templates, where theirs fails; widths and depth follow the model. As in theirs, a template with fewer words than the first takes
the missing ones from the front of the class name (ImageNet's third: "sea lion" becomes "lion"), which their weights expect;
``WHOLE_NAMES`` fixes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from promptmix.plugins.heads.transport import Transport
from torch import Tensor, nn

from promptmix import register
from promptmix.clip.tokens import ClassTokens
from promptmix.clip.vision import PromptStep, VisualPrompts
from promptmix.config.declare import Setting, inherits
from promptmix.config.published import Theirs
from promptmix.engine.layout import Layout, Rule
from promptmix.errors import SettingError
from promptmix.prompts.deep import STD, check_depth
from promptmix.prompts.learner import Learner
from promptmix.prompts.roles import PromptBank, Task
from promptmix.prompts.step import Step
from promptmix.prompts.trainer import PromptTrainer

USUAL = ("a photo of a", "this is a photo", "this is picture of", "one picture of a")
#: The authors' starts (plot-pp/trainers/plotpp.py) by data set; other data sets take ``USUAL``, which is Caltech101's.
STARTS = {
    "DescribableTextures": (
        "a photo of a texture",
        "this is a photo texture",
        "this is a picture texture",
        "one picture of a texture",
    ),
    "EuroSAT": (
        "a centered satellite photo of",
        "a centered satellite picture of",
        "this is centered satellite photo of",
        "one centered satellite photo of a",
    ),
    "FGVCAircraft": (
        "a photo of an aircraft",
        "a picture of an aircraft",
        "this is aircraft picture of",
        "one picture of an aircraft",
    ),
    "Food101": ("a photo of a food", "this is a food photo", "this is food picture of", "one picture of a food"),
    "ImageNet": ("a photo of a", "this is a photo", "this is a", "one picture of a"),
    "OxfordFlowers": ("a photo of a flower", "one picture of a flower", "this is flower picture of", "one picture of a flower"),
    "OxfordPets": ("a photo of a pet", "one picture of a pet", "this is pet picture of", "one picture of a pet"),
    "UCF101": (
        "a photo of a person doing",
        "this is a photo people doing",
        "this is picture of people doing",
        "one picture of a person doing",
    ),
}


class PromptSets(PromptBank):
    """N text prompts from N templates, and M visual prompts at the input of the image tower.

    Args:
        starts: templates without the class name, the first of which says how many tokens are learned.
        m: M.
        n_ctx_v: tokens of a visual prompt.
        whole_names: keep class names whole where a template is shorter than the first.
    """

    def __init__(self, task: Task, starts: Sequence[str], m: int, n_ctx_v: int, whole_names: bool = False) -> None:
        super().__init__(task)
        tower = task.clip.text
        check_depth(task.clip, "m", 1, vision=True)
        self.whole_names = whole_names
        self.words = [tower.tokenizer.encode(start) for start in starts]
        length = len(self.words[0])
        begun = [tower.embed([*row, *tower.tokenizer.after, *[tower.tokenizer.pad] * length][:length]) for row in self.words]
        self.ctx = nn.Parameter(torch.stack(begun).clone())
        self.ctx_vision = nn.Parameter(torch.empty(m, n_ctx_v, task.clip.image.width).normal_(std=STD))

    @property
    def num_experts(self) -> int:
        return len(self.ctx)

    def visual(self) -> Sequence[VisualPrompts]:
        """Return M schedules, each with one prompt at the input."""
        return [{0: PromptStep(tokens)} for tokens in self.ctx_vision]

    def encode(self, names: Sequence[str], *, full_stop: bool | None = None) -> Tensor:
        """Return text features (N, C, D) as they come from the tower; prompts with the same words around the name go together."""
        tower, length = self.task.clip.text, self.ctx.shape[1]
        stop = tower.tokenizer.encode("." if full_stop in (None, True) else "")
        ids = tower.tokenizer.class_tokens(names).ids
        groups: dict[tuple[tuple[int, ...], int], list[int]] = {}
        for n, words in enumerate(self.words):
            lost = 0 if self.whole_names else max(length - len(words), 0)
            groups.setdefault((words[length:], lost), []).append(n)
        features: dict[int, Tensor] = {}
        for (words, lost), members in groups.items():
            rows = ClassTokens(tuple(names), tuple((*row, *stop)[lost:] for row in ids))
            found = tower(tower.compose(self.ctx[members], tower.embed(words)[None], rows))
            features.update(zip(members, found, strict=True))
        return torch.stack([features[n] for n in range(self.num_experts)])


class TransportOfSets(Transport):
    """Transport between the M image features and the N text features; with ``trade_off``, plus the cosine of the two means."""

    needs_tokens = False
    needs_raw_text = True
    image_level = "raw"

    def __init__(self, task: Task, bank: PromptBank, trade_off: bool = False, **transport: Any) -> None:
        super().__init__(task, bank, **transport)
        self.trade_off = trade_off

    def forward(self, step: Step) -> Tensor:
        images = step.image if step.image.dim() == 3 else step.image[:, None]  # M may be 1
        scores = self.transport(step, images, step.text)
        if not self.trade_off:
            return scores
        image = F.normalize(step.raw_image.reshape(*images.shape).mean(dim=1), dim=-1)
        text = F.normalize(step.raw_text.mean(dim=0), dim=-1)
        return scores + step.task.clip.scale * image @ text.to(image.dtype).T


@register
class PLOTpp(PromptTrainer):
    """Several visual and several text prompts, matched by optimal transport."""

    published_as = ("PLOTPP",)
    published_keys = {
        "TRAINER.PLOTPP.CSC": Theirs(values={"False": False}, instead="leave it out"),
        "TRAINER.PLOTPP.CLASS_TOKEN_POSITION": Theirs(values={"end": "end"}, instead="leave it out"),
        "TRAINER.PLOTPP.CTX_INIT": Theirs(values={"True": True}, instead="words to start from are TRAINER.PLOTPP.TEMPLATES"),
        "TRAINER.PLOTPP.N_CTX": Theirs(),  # the words decide
        "TRAINER.PLOTPP.PRETRAIN_DIR": "MODEL.INIT_WEIGHTS",
    }
    layout = Layout("prompt_learner", (Rule("ctx", "bank.ctx"), Rule("ctx_vision", "bank.ctx_vision")), whole=True)

    @inherits(Transport)
    def compose(
        self,
        task: Task,
        n: Annotated[int, Setting("N: text prompts, at most as many as templates", low=1)] = 4,
        m: Annotated[int, Setting("M: visual prompts, each of which costs a pass of the image tower", low=1)] = 4,
        n_ctx_v: Annotated[int, Setting("tokens of a visual prompt", low=1)] = 2,
        templates: Annotated[Sequence[str], Setting('words to start from, such as "a photo of a"; () = the authors\'')] = (),
        whole_names: Annotated[bool, Setting("keep class names whole where a template is shorter than the first")] = False,
        trade_off: Annotated[bool, Setting("add the score of both means (the authors, in stage 1)")] = False,
        model_upd: Annotated[str, Setting("what learns: vision in stage 1, then joint", choices=("joint", "vision"))] = "joint",
        **transport: Any,
    ) -> Learner:
        starts = templates or STARTS.get(self.cfg.DATASET.NAME, USUAL)
        if n > len(starts):
            raise SettingError(
                "n", n, f"but there are {len(starts)} TEMPLATES to start from; set N to that or less, or give more"
            )
        prompts = PromptSets(task, starts[:n], m, n_ctx_v, whole_names)
        prompts.ctx.requires_grad_(model_upd == "joint")
        return Learner(task, prompts, head=TransportOfSets(task, prompts, trade_off, **transport))
