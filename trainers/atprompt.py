"""ATPrompt: Textual-based Prompt Learning with Embedded Attributes, on CoOp and on MaPLe.

Zheng Li, Yibing Song, Penghai Zhao, Ming-Ming Cheng, Xiang Li, Jian Yang. ICCV 2025. https://arxiv.org/abs/2412.09442

| paper | here |
|---|---|
| [T_a1] ... [A] ... [T_b1] ... [B] [T_1] ... [T_M] [CLS] | ``AttributePrompts.forward`` |
| soft attribute tokens | ``AttributePrompts.att``, ``N_ATT`` each, or ``N_ATTS`` (N_ATT1, N_ATT2, N_ATT3) |
| attributes found by the search | ``ATTRIBUTES`` below, or the key of that name |
| deep version: only class-related tokens are dropped and added again | ``CoupledAttributes.deep`` |

Deviations from the authors' code (github.com/zhengli97/ATPrompt): attribute words may have several tokens, where theirs counts
one for each and so loses "energy" in OxfordPets' row (a checkpoint of theirs for OxfordPets was trained on that row); unused
attribute tokens do not exist; N_ATT may differ from N_CTX in MaPLe; CTX_INIT, which theirs never reads, is no key. Not here: the
search for attributes, which needs a language model's candidates, and ATPrompt on CoCoOp and on DePT, each a bank of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from promptmix.plugins.prompt_bank.attributes import AttributePrompts, CoupledAttributes

from promptmix import register
from promptmix.config.declare import inherits
from promptmix.config.published import Theirs
from promptmix.engine.layout import Layout, Rule, linear
from promptmix.prompts.heads import Cosine
from promptmix.prompts.learner import Learner
from promptmix.prompts.roles import Task
from promptmix.prompts.trainer import PromptTrainer

#: The authors' words (train.py).
ATTRIBUTES = {
    "Caltech101": ("shape", "size"),
    "OxfordPets": ("playfulness", "energy"),
    "StanfordCars": ("luxury",),
    "OxfordFlowers": ("color", "habitat", "growth"),
    "Food101": ("flavor", "preparation"),
    "FGVCAircraft": ("design", "range"),
    "SUN397": ("function",),
    "DescribableTextures": ("pattern", "color", "design"),
    "EuroSAT": ("habitat",),
    "UCF101": ("precision",),
}
#: ImageNet, its variants, and data sets the authors did not search.
OTHERS = ("color", "shape")

_ATT = (Rule("ctx", "bank.ctx"), Rule("ctx_att{i}", "bank.att.{i-1}"))


class _WithAttributes(PromptTrainer):
    """What both share: the words of the data set."""

    published_keys = {
        "TRAINER.ATPROMPT.USE_ATPROMPT": Theirs(values={"True": True}, instead="--trainer CoOp or MaPLe does without"),
        **{f"TRAINER.ATPROMPT.N_ATT{n}": Theirs("N_ATT", instead="give N_ATTS (2, 4)") for n in (1, 2, 3)},
        "TRAINER.COOP.*": "*",
        "TRAINER.COOP.CSC": Theirs(values={"False": False}, instead="leave it out"),
        "TRAINER.COOP.CLASS_TOKEN_POSITION": Theirs(values={"end": "end"}, instead="leave it out"),
        "TRAINER.MAPLE.*": "*",
        **dict.fromkeys(("TRAINER.COOP.CTX_INIT", "TRAINER.MAPLE.CTX_INIT"), Theirs()),  # their context starts from noise
    }

    def words(self, attributes: Sequence[str]) -> tuple[str, ...]:
        """Return the words given, or the authors' for the data set."""
        return tuple(attributes) or ATTRIBUTES.get(self.cfg.DATASET.NAME, OTHERS)


@register
class CoOpATP(_WithAttributes):
    """CoOp behind attribute words, trained with cross-entropy."""

    published_as = ("CoOp_ATP",)
    layout = Layout("prompt_learner", _ATT)

    @inherits(AttributePrompts)
    def compose(self, task: Task, attributes: Sequence[str] = (), **soft: Any) -> Learner:
        return Learner(task, AttributePrompts(task, attributes=self.words(attributes), **soft))


@register
class MaPLeATP(_WithAttributes):
    """MaPLe behind attribute words, trained with cross-entropy."""

    published_as = ("MaPLe_ATP",)
    layout = Layout(
        "MultiModalPromptLearner",
        (
            *_ATT,
            Rule("compound_prompts_text.{i}", "bank.deeper.{i}"),
            *linear("proj", "bank.couple.0"),
            *linear("compound_prompt_projections.{i}", "bank.couple.{i+1}"),
        ),
        whole=True,
    )

    @inherits(CoupledAttributes)
    def compose(self, task: Task, attributes: Sequence[str] = (), **deep: Any) -> Learner:
        prompts = CoupledAttributes(task, attributes=self.words(attributes), **deep)
        return Learner(task, prompts, head=Cosine(task, prompts))
