"""ProGrad: Prompt-aligned Gradient for Prompt Tuning.

Beier Zhu, Yulei Niu, Yucheng Han, Yue Wu, Hanwang Zhang. ICCV 2023. https://arxiv.org/abs/2205.14865

| paper | here |
|---|---|
| v, prompt | ``Soft.ctx`` (1, M, W), M = 16; the last vectors start from a hard prompt's words, those before them at zero |
| G_d = gradient of L_ce, domain direction | ``specific`` |
| G_g = gradient of L_kl, general direction | ``general``; L_kl is ``ZeroshotKL`` with temperature ``T`` |
| G_prograd | ``project`` |
| lambda | ``LAMBDA`` |

Deviations from the authors' code: initial words are counted in tokens (``COUNT_WORDS``, on with CTX_INIT "data set", counts as
theirs does: of "a type of pet, a photo of a" the last token stays in front of the name); the projection lives here, where theirs
needs a fork of Dassl; it also works under ``amp``, where theirs fails. L_kl is reported as a divergence (theirs leaves out the
teacher's entropy, which has no gradient).

A context that starts as the zero-shot model's own template (same words, no zeros before them) stays there: the divergence is at
its minimum, and with LAMBDA 1 no step may raise it. The authors' 16 vectors start elsewhere, and an ensemble as ``TEMPLATES`` is
elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from promptmix.plugins.distillation.zeroshot_kl import ZeroshotKL
from promptmix.plugins.prompt_bank.soft import Soft
from torch import Tensor, nn
from yacs.config import CfgNode

from promptmix import register
from promptmix.config.declare import Setting, inherits
from promptmix.config.published import Theirs
from promptmix.engine.layout import Layout, Rule
from promptmix.errors import SettingError
from promptmix.parallel import group
from promptmix.prompts.learner import Learner, LossTerms
from promptmix.prompts.roles import Task
from promptmix.prompts.trainer import PromptTrainer

#: What CTX_INIT says where the words are those of the data set.
OF_DATA_SET = "data set"
#: The authors' words for a data set: where the context starts, and what the zero-shot model is asked
#: (github.com/BeierZhu/Prompt-align, commit 1b76203).
WORDS = {
    "DescribableTextures": "a texture of",
    "EuroSAT": "a centered satellite photo of",
    "FGVCAircraft": "a type of aircraft, a photo of a",
    "Food101": "a type of food, a photo of",
    "OxfordFlowers": "a type of flower, a photo of a",
    "OxfordPets": "a type of pet, a photo of a",
    "UCF101": "a photo of a person doing",
}
OTHERS = "a photo of a"


def project(specific: Tensor, general: Tensor, factor: float = 1.0) -> Tensor:
    """Return the prompt-aligned gradient G_prograd of one tensor.

    Where the two directions conflict (negative cosine), the part of ``specific`` that points against ``general`` is taken
    out, ``factor`` times: G_d - factor <G_d, G_g> / |G_g|^2 G_g. Otherwise G_d stays as it is.

    Args:
        specific: gradient of the cross-entropy, G_d.
        general: gradient of the divergence from the zero-shot model, G_g, of the same shape and any scale.
        factor: the paper's lambda; 1 makes the result orthogonal to ``general``.
    """
    overlap = torch.sum(specific * general)
    projected = specific - factor * overlap / general.square().sum() * general
    return projected.where(overlap < 0, specific)  # chosen on the device, which nothing waits for


@register
class ProGrad(PromptTrainer):
    """One soft prompt whose steps never go against what the zero-shot model knows."""

    published_keys = {
        "TRAINER.COOP.*": "*",
        "TRAINER.COOP.CTX_INIT": Theirs("CTX_INIT", {"True": OF_DATA_SET, "False": ""}),
        "LOSS.LAMBDA": "LAMBDA",
        "LOSS.T": "T",
        "LOSS.NAME": Theirs(values={"prograd": "prograd"}, instead="give prograd; --trainer CoOp is cross-entropy alone"),
    }
    layout = Layout("prompt_learner", (Rule("ctx", "bank.ctx", expert_axis=True),))

    @classmethod
    def validate(cls, cfg: CfgNode) -> None:
        """Let N_CTX and CTX_INIT stand together: here the words fill the last of N_CTX vectors."""

    @inherits(Soft, without=["n_prompts"], ctx_init=OTHERS)
    def compose(
        self,
        task: Task,
        templates: Annotated[Sequence[str], Setting("hard prompts of the zero-shot model; () = the data set's first")] = (),
        lambda_: Annotated[
            float, Setting("how much of the conflicting part is taken out, from 0 (CoOp) to 1 (all)", low=0)
        ] = 1.0,
        t: Annotated[float, Setting("temperature T of the divergence", above=0)] = 1.0,
        **soft: Any,
    ) -> Learner:
        """Return one soft prompt whose divergence from the zero-shot model is measured, but not part of the loss.

        With CTX_INIT "data set" it starts from ``WORDS``, and so does the zero-shot model.
        """
        if soft["ctx_init"] == OF_DATA_SET:
            words = WORDS.get(self.cfg.DATASET.NAME, OTHERS)
            soft |= {"ctx_init": words, "count_words": True}
            templates = templates or (f"{words} {{}}.",)
        prompt = Soft(task, **soft)
        missing = soft["n_ctx"] - prompt.ctx.shape[-2]
        if missing < 0:
            raise SettingError(
                "n_ctx",
                soft["n_ctx"],
                f"but CTX_INIT {soft['ctx_init']!r} has {prompt.ctx.shape[-2]} tokens; shorten the words or lengthen the context",
            )
        prompt.ctx = nn.Parameter(F.pad(prompt.ctx.detach(), (0, 0, missing, 0)))
        self.factor = lambda_
        return Learner(task, prompt, measures={"kl": ZeroshotKL(task, prompt, templates, t)})

    def take_gradients(self, loss: Tensor, terms: LossTerms) -> None:
        """Put the prompt-aligned gradient into every learned tensor; the projection keeps the scale of ``loss``."""
        self.detect_anomaly(terms.total)
        learned = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        general = torch.autograd.grad(terms.parts["kl"], learned, retain_graph=True)
        specific = torch.autograd.grad(loss, learned)
        group.average((*general, *specific))
        for parameter, ours, theirs in zip(learned, specific, general, strict=True):
            parameter.grad = project(ours, theirs, self.factor)
