"""Cross-modal adaptation: Multimodality Helps Unimodality, the linear probe, with an adapter or partial finetuning.

Zhiqiu Lin, Samuel Yu, Zhiyi Kuang, Deepak Pathak, Deva Ramanan. CVPR 2023. https://arxiv.org/abs/2301.06267

| paper | here |
|---|---|
| w_y, classifier, from the zero-shot weights at the start | ``LinearHead.weight`` (C, D), rows not normalised |
| H(y, w phi(x)) over pictures and texts alike | ``ImageTextCrossEntropy`` |
| half a batch of pictures, half of texts | ``DATALOADER.TRAIN_X.BATCH_SIZE`` pictures, as many texts |
| WiSE-FT: half trained, half zero-shot weights | ``ZEROSHOT_SHARE 0.5`` |
| adapter in front of the classifier, for both kinds | ``AdaptedHead``, ``RATIO`` |
| partial finetuning of the image tower | ``TunedRawHard``, ``IMAGE_BLOCKS`` |

The zero-shot weights are the mean of the templates' features as they come from the tower, then normalised.

Deviations from the authors' code: each batch draws its texts anew (theirs go round in shuffled passes), all where there are fewer
than pictures. Their checkpoints are pickled modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from promptmix.plugins.heads.linear import LinearHead
from promptmix.plugins.prompt_bank.hard import Hard, bottleneck
from promptmix.plugins.prompt_bank.tuned_towers import TunedTowers, blocks_of
from torch import Tensor

from promptmix import register
from promptmix.config.declare import Setting, inherits
from promptmix.errors import SettingError
from promptmix.prompts.learner import Learner
from promptmix.prompts.roles import Loss, PromptBank, Task
from promptmix.prompts.step import Step
from promptmix.prompts.trainer import PromptTrainer


class RawHard(Hard):
    """Hard prompts whose unnormalised features are averaged."""

    def encode(self, names: Sequence[str], *, full_stop: bool | None = None) -> Tensor:
        """Return normalised text features (1, C, D)."""
        return self.task.clip.raw_ensemble(self.templates, names)[None]


class TunedRawHard(TunedTowers):
    """Hard prompts as ``RawHard`` has them, in front of an image tower whose last blocks learn.

    Args:
        blocks: how many of them, with what stands behind; of a ResNet the attention pool is the last one.
        templates: hard templates that are averaged.
    """

    def __init__(self, task: Task, blocks: int, templates: Sequence[str]) -> None:
        depth = len(blocks_of(task.clip.image))
        if blocks > depth:
            remedy = "give no more" if depth else "leave it out, or choose a vision transformer such as ViT-B/16 or tiny-vit"
            raise SettingError("image_blocks", blocks, f"but the image tower of {task.clip.name} has {depth} blocks; {remedy}")
        super().__init__(task, "all", "vision", vision_start=depth - blocks)
        self.templates = tuple(templates) or task.templates[:1]

    def references(self, names: Sequence[str]) -> Tensor:
        """Return normalised text features (1, C, D)."""
        return self.once("hard", names, lambda: self.task.clip.raw_ensemble(self.templates, names)[None])


class AdaptedHead(LinearHead):
    """``s <r A(f) + (1 - r) f, w_c>`` with A(f) = ReLU(W2 ReLU(W1 f)): CLIP-Adapter's network, on normalised f.

    Args:
        bank: of one expert; its text features may be the start.
        ratio: r.
        head: settings of the linear head.
    """

    def __init__(self, task: Task, bank: PromptBank, ratio: float, **head: Any) -> None:
        super().__init__(task, bank, **head)
        self.ratio, self.adapter = ratio, bottleneck(task.clip.embed_dim, 4)

    def scores(self, features: Tensor) -> Tensor:
        """Return class scores (B, C) of normalised features (B, D)."""
        return super().scores(self.ratio * self.adapter(features) + (1 - self.ratio) * features)


class ImageTextCrossEntropy(Loss):
    """Cross-entropy over a batch of pictures and as many texts, which the head scores as if they were pictures.

    Args:
        head: the probe.
        texts: (R, D) features of all texts.
        labels: (R,) their classes.
    """

    part = "ce"
    needs_all_experts = False

    def __init__(self, head: LinearHead, texts: Tensor, labels: Tensor) -> None:
        super().__init__()
        self.scores = head.scores
        self.texts: Tensor
        self.text_labels: Tensor
        self.register_buffer("texts", F.normalize(texts, dim=-1), persistent=False)
        self.register_buffer("text_labels", labels, persistent=False)

    def draw(self, count: int) -> Tensor:
        """Return ``count`` rows of the texts, each at most once."""
        return torch.randperm(len(self.texts), device=self.texts.device)[:count]

    def forward(self, step: Step) -> Tensor:
        rows = self.draw(len(step.labels))
        scores = torch.cat([step.logits, self.scores(self.texts[rows].to(step.logits.dtype))])
        return F.cross_entropy(scores, torch.cat([step.labels, self.text_labels[rows]]))


@register
class CrossModal(PromptTrainer):
    """A linear probe on pictures and texts together."""

    schedule_unit = "step"

    @inherits(LinearHead, scale=100.0)
    def compose(
        self,
        task: Task,
        templates: Annotated[Sequence[str], Setting("hard templates: texts to learn from; () = the data set's first")] = (),
        ratio: Annotated[float, Setting("share of the adapter in front of the classifier; 0 = none", low=0, high=1)] = 0.0,
        image_blocks: Annotated[int, Setting("last blocks of the image tower that learn too; 0 = none", low=0)] = 0,
        **head: Any,
    ) -> Learner:
        """Return the probe with the loss over both kinds."""
        prompts = TunedRawHard(task, image_blocks, templates) if image_blocks else RawHard(task, templates)
        probe = AdaptedHead(task, prompts, ratio, **head) if ratio else LinearHead(task, prompts, **head)
        texts = task.clip.raw_features(prompts.templates, task.classnames).flatten(0, 1)
        labels = torch.arange(len(task.classnames), device=texts.device).repeat(len(prompts.templates))
        return Learner(task, prompts, head=probe, loss=ImageTextCrossEntropy(probe, texts, labels))
