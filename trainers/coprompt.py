"""CoPrompt: Consistency-guided Prompt Learning for Vision-Language Models.

Shuvendu Roy, Ali Etemad. ICLR 2024. https://arxiv.org/abs/2306.01195

| paper | here |
|---|---|
| learnable prompts of both towers, as MaPLe's | ``CoupledDeep``, keys as MaPLe's |
| phi^a, adapters behind both encoders | ``Adapter``: Linear(D, D/4), ReLU, Linear(D/4, D), ReLU, no biases |
| f + adapter, shares 0.1 (image) and 0.2 (text) | ``AdaptedCoupled.adapt``, ``.encode``; ``IMAGE_SHARE``, ``TEXT_SHARE`` |
| s_k, sentences of a language model about class k | ``Task.descriptions``, the same number for each class |
| x, x': two augmented views of a picture | ``Step.images``, ``Step.views[-1]``; ``DATALOADER.K_TRANSFORMS 2`` |
| L_cc = 2 - cos(text, frozen text of s_k) - cos(image(x), frozen image(x')) | ``SentenceConsistency`` + ``ViewConsistency`` |
| L = L_ce + lambda L_cc | ``W`` is lambda |

One sentence is drawn for all classes in each step (its place in the list). Sentences are read by training alone. With
``K_TRANSFORMS 1`` the frozen tower sees the same view. Adapters act behind the towers, so the text tower stays prefix-shared.

Deviations from the authors' code (github.com/ShuvenduRoy/CoPrompt, trainers/coprompt.py): their W and DISTILL sit directly under
TRAINER; the shares and the widths are written into their code; each coupling map has a start of its own, where theirs are copies
of one (``CLONE_MAPS True``); more tokens than CTX_INIT has are refused, not drawn at random; sentences need not be there where
nothing is trained; their table of values per data set overrides the command line, here it is a config for each data set.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Annotated, Any

import torch.nn.functional as F
from promptmix.plugins.prompt_bank.coupled_deep import CoupledDeep
from torch import Tensor, nn

from promptmix import register
from promptmix.config.declare import Setting, inherits
from promptmix.engine.layout import COUPLED_TEXT, Layout, Rule, linear
from promptmix.prompts.heads import Cosine
from promptmix.prompts.learner import Learner
from promptmix.prompts.losses import CrossEntropy
from promptmix.prompts.roles import Distiller, ImageLevel, Task, TextSupervision
from promptmix.prompts.step import Step
from promptmix.prompts.trainer import PromptTrainer

DISTANCES = ("cosine", "mse")


class Adapter(nn.Module):
    """A share of Linear(D, D/4) - ReLU - Linear(D/4, D) - ReLU, the rest of the feature itself.

    Args:
        width: D.
        share: of the adapter.
    """

    def __init__(self, width: int, share: float) -> None:
        super().__init__()
        self.share = share
        self.down, self.up = nn.Linear(width, width // 4, bias=False), nn.Linear(width // 4, width, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """Return the adapted features, (..., D) as those that came from the tower."""
        return self.share * F.relu(self.up(F.relu(self.down(features)))) + (1 - self.share) * features


class AdaptedCoupled(CoupledDeep):
    """MaPLe's prompts, and an adapter behind each tower on features that are not normalised yet.

    Args:
        image_share: of the image adapter.
        text_share: of the text adapter.
        deep: settings of the prompts.
    """

    image_level: ImageLevel = "raw"

    def __init__(self, task: Task, image_share: float, text_share: float, **deep: Any) -> None:
        super().__init__(task, **deep)
        self.adapter_image = Adapter(task.clip.embed_dim, image_share)
        self.adapter_text = Adapter(task.clip.embed_dim, text_share)

    def adapt(self, image: Tensor) -> Tensor:
        """Return normalised, adapted image features (B, D)."""
        return F.normalize(self.adapter_image(image), dim=-1)

    def encode(self, names: Sequence[str], *, full_stop: bool | None = None, experts: Tensor | None = None) -> Tensor:
        """Return adapted text features (1, C, D), not normalised."""
        return self.adapter_text(super().encode(names, full_stop=full_stop, experts=experts))


class SentenceConsistency(TextSupervision):
    """Distance of the text features to the frozen ones of one sentence about each class, another one in each step.

    Args:
        distance: ``cosine`` is 1 - mean cosine, ``mse`` the mean squared difference.
    """

    part = "text"

    def __init__(self, task: Task, distance: str) -> None:
        super().__init__()
        self.task, self.distance = task, distance
        task.descriptions.were_read = True  # by training
        self._sentences: Tensor | None = None

    def before_training(self) -> None:
        """Encode the sentences."""
        _ = self.sentences

    @property
    def sentences(self) -> Tensor:
        """Normalised frozen features (n, C, D) of the n sentences about each of C classes."""
        if self._sentences is None or self._sentences.device != self.task.clip.scale.device:
            rows = self.task.descriptions.of(self.task.classnames, same_number=True)
            texts = [text for place in zip(*rows, strict=True) for text in place]
            self._sentences = self.task.clip.text_features(texts).unflatten(0, (-1, len(rows)))
        return self._sentences

    def forward(self, step: Step) -> Tensor:
        """Return the distance (scalar) of text features (1, C, D) to those of a sentence drawn for all classes."""
        return distance(step.text[0], self.sentences[random.randint(0, len(self.sentences) - 1)], self.distance)


class ViewConsistency(Distiller):
    """Distance of image features to the frozen ones of another augmented view of the same picture.

    Args:
        distance: as in ``SentenceConsistency``.
    """

    part = "image"

    def __init__(self, distance: str) -> None:
        super().__init__()
        self.distance = distance

    def forward(self, step: Step) -> Tensor:
        """Return the distance (scalar) of image features (B, D)."""
        return distance(step.image, step.frozen_view, self.distance)


def distance(learned: Tensor, frozen: Tensor, kind: str) -> Tensor:
    """Return 1 - mean cosine of the rows (N, D), or for ``mse`` the mean squared difference of their elements."""
    learned, frozen = learned.float(), frozen.float()
    return F.mse_loss(learned, frozen) if kind == "mse" else 1 - F.cosine_similarity(learned, frozen, dim=-1).mean()


@register
class CoPrompt(PromptTrainer):
    """MaPLe's prompts with adapters, held near what the frozen model says of sentences and of another view."""

    views = 2
    layout = Layout(
        "MultiModalPromptLearner",
        (
            *COUPLED_TEXT,
            *linear("proj", "bank.couple.0"),
            *linear("compound_prompt_projections.{i}", "bank.couple.{i+1}"),
            *(
                Rule(f"adapter_{tower}.fc.{place}.weight", f"bank.adapter_{tower}.{name}.weight")
                for tower in ("image", "text")
                for place, name in ((0, "down"), (2, "up"))
            ),
        ),
        whole=True,
        beside=r"adapter_(image|text)\..*",
        unused=(r"model_distill\..*",),
    )

    @inherits(CoupledDeep, without=["n_prompts"])
    def compose(
        self,
        task: Task,
        w: Annotated[float, Setting("lambda: factor on both distances", low=0)] = 1.0,
        distill: Annotated[str, Setting("distance to the frozen features", choices=DISTANCES)] = "cosine",
        image_share: Annotated[float, Setting("share of the image adapter in the image feature", above=0, high=1)] = 0.1,
        text_share: Annotated[float, Setting("share of the text adapter in the text feature", above=0, high=1)] = 0.2,
        **deep: Any,
    ) -> Learner:
        """Return the prompts and adapters with the loss L_ce + lambda (L_text + L_image)."""
        bank = AdaptedCoupled(task, image_share, text_share, **deep)
        loss = CrossEntropy() + w * (SentenceConsistency(task, distill) + ViewConsistency(distill))
        return Learner(task, bank, head=Cosine(task, bank), loss=loss)
