"""TPT: Test-Time Prompt Tuning for Zero-Shot Generalization in Vision-Language Models.

Manli Shu, Weili Nie, De-An Huang, Zhiding Yu, Tom Goldstein, Anima Anandkumar, Chaowei Xiao. NeurIPS 2022.
https://arxiv.org/abs/2209.07511

| paper | here |
|---|---|
| A_i(X_test), N views of a test picture | ``Views``, ``VIEWS`` (the picture itself is one), ``VIEW_KIND`` |
| rho, share of the views with the lowest entropy | ``confident``, ``KEEP``; int(rho N) views, chosen before the first step |
| entropy of the mean of their probabilities | ``MarginalEntropy`` |
| one step of AdamW, then the prompt is thrown away | ``TestTimeLearner``, ``STEPS``, ``LR``, ``WEIGHT_DECAY`` |
| start: a hand-written prompt, or CoOp's | ``CTX_INIT``, or ``MODEL.INIT_WEIGHTS``: a checkpoint of CoOp, ours or converted |

Nothing is trained: a run tests, and keeps the start for predictions. The image tower sees each view once, without a graph; the
text tower is prefix-shared in both passes.

Deviations from the authors' code (github.com/azshue/TPT): a picture's views follow from the seed and its pixels (AugMix of one
random state is theirs, draw for draw); class names are the data set's (theirs has lists of its own); contexts count tokens,
theirs words (``COUNT_WORDS``). Starting from CoCoOp is left out: there the context that the meta-net gives is tuned for each
picture in the place of a prompt, which is another learner.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import torch
from promptmix.plugins.prompt_bank.soft import Soft
from torch import Tensor

from promptmix import register
from promptmix.config.declare import Setting, inherits
from promptmix.data.reading.views import KINDS, Views
from promptmix.engine.league import TEST_TIME
from promptmix.errors import SettingError
from promptmix.prompts.heads import Cosine
from promptmix.prompts.roles import Loss, Task
from promptmix.prompts.step import Step
from promptmix.prompts.testtime import TestTimeLearner
from promptmix.prompts.trainer import PromptTrainer


class MarginalEntropy(Loss):
    """Entropy of the mean of the views' class probabilities."""

    part = "entropy"

    def forward(self, step: Step) -> Tensor:
        mean = step.logits.float().log_softmax(dim=-1).logsumexp(dim=0) - math.log(len(step.logits))  # (C,)
        mean = mean.clamp(min=torch.finfo(mean.dtype).min)  # zero times minus infinity is not a number
        return -(mean.exp() * mean).sum()


def confident(step: Step, keep: float) -> Tensor:
    """Return the indices of the int(``keep`` V) of V views with the lowest entropy, the lowest first."""
    logs = step.logits.detach().float().log_softmax(dim=-1)
    entropies = -(logs.exp() * logs).sum(dim=-1)
    return entropies.argsort()[: int(len(entropies) * keep)]


@register
class TPT(PromptTrainer):
    """A soft prompt, tuned anew on the views of each test picture."""

    league = TEST_TIME

    @inherits(Soft, without=["csc", "n_prompts"], n_ctx=4, ctx_init="a photo of a")
    def compose(
        self,
        task: Task,
        views: Annotated[int, Setting("N: views of a test picture, itself included", low=2, at_test=True)] = 64,
        view_kind: Annotated[
            str,
            Setting(
                "random-resized crops with flips, or AugMix of those; auto = crops for ImageNet and its variants",
                choices=("auto", *KINDS),
                at_test=True,
            ),
        ] = "auto",
        keep: Annotated[
            float, Setting("rho: share of the views that counts, those of lowest entropy", above=0, high=1, at_test=True)
        ] = 0.1,
        steps: Annotated[int, Setting("steps on a picture", low=0, at_test=True)] = 1,
        lr: Annotated[float, Setting("learning rate of AdamW", low=0, at_test=True)] = 0.005,
        weight_decay: Annotated[float, Setting("weight decay of AdamW", low=0, at_test=True)] = 0.01,
        **soft: Any,
    ) -> TestTimeLearner:
        if int(views * keep) < 1:
            raise SettingError("keep", keep, f"but of {views} views not one is left; give {1 / views:.3g} or more, or more VIEWS")
        bank = Soft(task, **soft)
        return TestTimeLearner(
            task,
            bank,
            loss=MarginalEntropy(),
            optimizer=lambda tuned: torch.optim.AdamW(tuned, lr=lr, weight_decay=weight_decay),
            steps=steps,
            select=lambda step: confident(step, keep),
            head=Cosine(task, bank),
        )

    def test_transform(self) -> Views:
        """Return what makes the views of a picture."""
        kind = self.node.VIEW_KIND
        if kind == "auto":
            kind = "crops" if self.cfg.DATASET.NAME.startswith("ImageNet") else "augmix"
        return Views(self.cfg, self.node.VIEWS, kind)

    def train(self) -> None:  # type: ignore[override]  # takes no epochs, as in Dassl
        """Keep the start, and test: there is nothing to train."""
        self.save_model(0, self.output_dir)
        if not self.cfg.TEST.NO_TEST:
            self.test()
