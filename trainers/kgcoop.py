"""KgCoOp: Visual-Language Prompt Tuning with Knowledge-guided Context Optimization.

Hantao Yao, Rui Zhang, Changsheng Xu. CVPR 2023. https://arxiv.org/abs/2303.13283

| paper | here |
|---|---|
| t_i, learnable prompt | ``Soft.ctx`` (1, M, W), M = 4 from "a photo of a" |
| w_i^clip, general knowledge | ``CosineToHard.hard``: features of the data set's hard template |
| w_i, learned embedding | ``Soft.forward`` |
| L_kg | ``CosineToHard.forward``: 1 - mean cosine, half the squared distance of unit vectors |
| lambda = 8 | ``W`` |
| L = L_ce + lambda L_kg | ``KgCoOp.compose`` |

Deviations from the authors' code: hard features have the trainer's precision (theirs stay fp16 even in fp32 mode). Their
meta-net, adapter and bias vectors touch nothing that is used and are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from promptmix.plugins.prompt_bank.soft import Soft
from promptmix.plugins.text_supervision.hard_prompts import CosineToHard

from promptmix import register
from promptmix.config.declare import Setting, inherits
from promptmix.config.published import Theirs
from promptmix.engine.layout import Layout, Rule
from promptmix.prompts.learner import Learner
from promptmix.prompts.losses import CrossEntropy
from promptmix.prompts.roles import Task
from promptmix.prompts.trainer import PromptTrainer


@register
class KgCoOp(PromptTrainer):
    """One soft prompt, held near the hard prompt by the cosine of their text features."""

    published_keys = {
        "TRAINER.COOP.*": "*",
        "TRAINER.COOP.CTX_INIT": Theirs("CTX_INIT", {"True": "a photo of a", "False": ""}),
    }
    layout = Layout(
        "prompt_learner",
        (Rule("ctx", "bank.ctx", expert_axis=True),),
        unused=(r"bias_vectors", r"meta_net\.linear1\.(weight|bias)"),
    )

    @inherits(Soft, without=["n_prompts"], n_ctx=4, ctx_init="a photo of a")
    def compose(
        self,
        task: Task,
        w: Annotated[float, Setting("lambda: factor on 1 - mean cosine", low=0)] = 8.0,
        templates: Annotated[Sequence[str], Setting("hard prompts to stay near, ensembled; () = the data set's first")] = (),
        **soft: Any,
    ) -> Learner:
        """Return one soft prompt with the loss L_ce + lambda L_kg."""
        prompt = Soft(task, **soft)
        return Learner(task, prompt, loss=CrossEntropy() + w * CosineToHard(task, prompt, templates))
