"""What caches keep of pictures for a trainer whose image tower is frozen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from promptmix.clip.model import unit
from promptmix.data.features.rows import Kept
from promptmix.prompts.learner import Learner, PromptLearner

__all__ = ["kept_of"]


def kept_of(trainer: Any, *, own: bool) -> Kept:
    """Return what caches keep: the tower's features as they come, also for methods that read them at length 1.

    So that adapters and linear probes, which read the former, share them with all others. The length is taken on the device that
    encodes, row by row, so that bits are those of encoding. Learners that encode in a way of their own keep what they give.

    Args:
        trainer: a ``PromptTrainer``.
        own: whether its class encodes in a way of its own.
    """
    model, clip = trainer.model, trainer.clip
    own = own or type(model).encode_images not in (PromptLearner.encode_images, Learner.encode_images)
    if own or model.feature_kind or getattr(model, "stacks_images", False):
        return Kept(trainer._encode_frozen, model.feature_kind)

    def encode(images: Tensor) -> Tensor:
        with trainer.precision.autocast():
            given = images.to(trainer.device, non_blocking=True)
            return clip.encode_frozen(lambda: clip.image(given))

    def finish(features: Tensor) -> Tensor:
        with torch.no_grad(), trainer.precision.autocast():
            return unit(features.to(trainer.device)).cpu()

    return Kept(encode, "raw", finish)
