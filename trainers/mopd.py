"""MoPD: Mixture-of-Prompts Distillation for Vision-Language Models.

Yang Chen, Shuai Fu, Yu Zhang. IEEE Transactions on Multimedia 2025. https://arxiv.org/abs/2412.19087

| paper | here |
|---|---|
| student: soft prompt | ``Soft.ctx`` (1, M, W), M = 4 from "a photo of a" |
| teachers: pool of P hard prompts | ``GatedHardPrompts.teachers`` (P, C, D), of ``TEMPLATES``, or ``TEACHERS`` of the data set |
| gating network, top k | ``GatedHardPrompts.gate`` (D, P), ``K`` |
| L_MPD, distillation | ``GatedHardPrompts.terms``, temperature ``T`` |
| L_MPS, prompt selection | ``GatedHardPrompts.terms`` |
| L = W L_ce + (1 - W) L_MPD + W2 L_MPS | ``MoPD.compose`` |

Inference uses the student alone. Deviations from the authors' code: none in the numbers; teachers and gate have the joint width
of the model, where theirs is fixed at 512.
"""

from __future__ import annotations

from typing import Annotated, Any

from promptmix.plugins.distillation.gated_hard_prompts import GatedHardPrompts
from promptmix.plugins.prompt_bank.soft import Soft

from promptmix import register
from promptmix.config.declare import Setting, inherits, parted
from promptmix.config.published import Theirs
from promptmix.engine.layout import Layout, Rule
from promptmix.prompts.learner import Learner
from promptmix.prompts.losses import CrossEntropy
from promptmix.prompts.roles import Task
from promptmix.prompts.trainer import PromptTrainer

#: The authors' hard prompts of ImageNet (and so of its variants), Caltech101, StanfordCars and SUN397.
GENERAL = (
    "a photo of a {}.",
    "a picture of a {}.",
    "an image of a {}.",
    "a photo, classified as {}.",
    "a photo, categorized as {}.",
    "a photo, labeled as {}.",
    "a picture, classified as {}.",
    "a picture, categorized as {}.",
    "a picture, labeled as {}.",
    "an image, classified as {}.",
    "an image, categorized as {}.",
    "an image, labeled as {}.",
)
#: Those of the other data sets, word for word (github.com/cheny02/MoPD-TMM, commit 7cb6843), "a photo of a aircraft" and
#: "a person doing, classified as" included.
TEACHERS = {
    **dict.fromkeys(("ImageNet", "ImageNetV2", "ImageNetSketch", "ImageNetA", "ImageNetR"), GENERAL),
    **dict.fromkeys(("Caltech101", "StanfordCars", "SUN397"), GENERAL),
    "OxfordPets": (
        "a photo of a {}, a type of pet.",
        "a picture of a {}, a type of pet.",
        "an image of a {}, a type of pet.",
        "a photo of a pet, classified as {}.",
        "a photo of a pet, categorized as {}.",
        "a photo of a pet, labeled as {}.",
        "a picture of a pet, classified as {}.",
        "a picture of a pet, categorized as {}.",
        "a picture of a pet, labeled as {}.",
        "an image of a pet, classified as {}.",
        "an image of a pet, categorized as {}.",
        "an image of a pet, labeled as {}.",
    ),
    "OxfordFlowers": (
        "a photo of a {}, a type of flower.",
        "a picture of a {}, a type of flower.",
        "an image of a {}, a type of flower.",
        "a photo of a flower, classified as {}.",
        "a photo of a flower, categorized as {}.",
        "a photo of a flower, labeled as {}.",
        "a picture of a flower, classified as {}.",
        "a picture of a flower, categorized as {}.",
        "a picture of a flower, labeled as {}.",
        "an image of a flower, classified as {}.",
        "an image of a flower, categorized as {}.",
        "an image of a flower, labeled as {}.",
    ),
    "Food101": (
        "a photo of {}, a type of food.",
        "a picture of {}, a type of food.",
        "an image of {}, a type of food.",
        "a photo of food, classified as {}.",
        "a photo of food, categorized as {}.",
        "a photo of food, labeled as {}.",
        "a picture of food, classified as {}.",
        "a picture of food, categorized as {}.",
        "a picture of food, labeled as {}.",
        "an image of food, classified as {}.",
        "an image of food, categorized as {}.",
        "an image of food, labeled as {}.",
    ),
    "FGVCAircraft": (
        "a photo of a {}, a type of aircraft.",
        "a picture of a {}, a type of aircraft.",
        "an image of a {}, a type of aircraft.",
        "a photo of a aircraft, classified as {}.",
        "a photo of a aircraft, categorized as {}.",
        "a photo of a aircraft, labeled as {}.",
        "a picture of a aircraft, classified as {}.",
        "a picture of a aircraft, categorized as {}.",
        "a picture of a aircraft, labeled as {}.",
        "an image of a aircraft, classified as {}.",
        "an image of a aircraft, categorized as {}.",
        "an image of a aircraft, labeled as {}.",
    ),
    "DescribableTextures": (
        "a photo of {}, a type of texture.",
        "a picture of {}, a type of texture.",
        "an image of {}, a type of texture.",
        "a photo of a texture, classified as {}.",
        "a photo of a texture, categorized as {}.",
        "a photo of a texture, labeled as {}.",
        "a picture of a texture, classified as {}.",
        "a picture of a texture, categorized as {}.",
        "a picture of a texture, labeled as {}.",
        "an image of a texture, classified as {}.",
        "an image of a texture, categorized as {}.",
        "an image of a texture, labeled as {}.",
    ),
    "EuroSAT": (
        "a centered satellite photo of {}.",
        "a centered satellite picture of {}.",
        "a centered satellite image of {}.",
        "a centered satellite photo, classified as {}.",
        "a centered satellite photo, categorized as {}.",
        "a centered satellite photo, labeled as {}.",
        "a centered satellite picture, classified as {}.",
        "a centered satellite picture, categorized as {}.",
        "a centered satellite picture, labeled as {}.",
        "a centered satellite image, classified as {}.",
        "a centered satellite image, categorized as {}.",
        "a centered satellite image, labeled as {}.",
    ),
    "UCF101": (
        "a photo of a person doing {}.",
        "a picture of a person doing {}.",
        "an image of a person doing {}.",
        "a photo of a person doing, classified as {}.",
        "a photo of a person doing, categorized as {}.",
        "a photo of a person doing, labeled as {}.",
        "a picture of a person doing, classified as {}.",
        "a picture of a person doing, categorized as {}.",
        "a picture of a person doing, labeled as {}.",
        "an image of a person doing, classified as {}.",
        "an image of a person doing, categorized as {}.",
        "an image of a person doing, labeled as {}.",
    ),
}


@register
class MoPD(PromptTrainer):
    """One soft prompt, taught by the hard prompts that a gate trusts for the image."""

    published_keys = {
        "TRAINER.COOP.*": "*",
        "TRAINER.COOP.CTX_INIT": Theirs("CTX_INIT", {"True": "a photo of a", "False": ""}),
        "LOSS.num_prompts": "K",
        "LOSS.T": "T",
    }
    layout = Layout("prompt_learner", (Rule("ctx", "bank.ctx", expert_axis=True), Rule("gate", "losses.distill.gate")))

    @inherits(Soft, without=["n_prompts"], n_ctx=4, ctx_init="a photo of a")
    @inherits(GatedHardPrompts, without=["mpd_weight", "mps_weight"])
    def compose(
        self,
        task: Task,
        w: Annotated[float, Setting("W: factor on the cross-entropy; the distillation gets 1 - W", low=0, high=1)] = 0.8,
        w2: Annotated[float, Setting("W2: factor on the prompt selection", low=0)] = 0.1,
        **settings: Any,
    ) -> Learner:
        """Return the student with the loss W L_ce + (1 - W) L_MPD + W2 L_MPS."""
        teachers, soft = parted(settings, GatedHardPrompts)
        enough = len(task.templates) >= teachers["k"]
        teachers["templates"] = teachers["templates"] or TEACHERS.get(self.cfg.DATASET.NAME, () if enough else GENERAL)
        student = Soft(task, **soft)
        distillation = GatedHardPrompts(task, student, mpd_weight=1 - w, mps_weight=w2, **teachers)
        return Learner(task, student, loss=w * CrossEntropy() + distillation)
