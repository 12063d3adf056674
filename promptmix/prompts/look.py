"""What a trained method sees in pictures of its choice, beside those it is tested on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from promptmix.data.datum import Datum
from promptmix.data.reading.manager import build_data_loader
from promptmix.prompts.trainer import PromptTrainer

__all__ = ["look_at"]


@torch.no_grad()
def look_at(trainer: PromptTrainer, items: Sequence[Datum]) -> tuple[Tensor, Tensor]:
    """Return what the model sees in N pictures, read as in evaluation, on the CPU in float32.

    Returns:
        Normalised image features (N, D), and class scores (N, C).
    """
    cfg, tested = trainer.cfg, trainer.test_loader
    source: Any = tested.dataset  # it has the transform of evaluation
    size = cfg.DATALOADER.TEST.BATCH_SIZE
    trainer.test_loader = build_data_loader(cfg, data_source=items, batch_size=size, tfm=source.transform, is_train=False)
    trainer.set_model_mode("eval")
    seen: list[tuple[Tensor, Tensor]] = []
    try:
        with trainer._evaluating("test"):
            for batch in trainer.test_loader:
                with trainer.precision.autocast():
                    features = trainer.encode_images(trainer.parse_batch_test(batch)[0])
                    query = trainer.model.step(features).query
                seen.append((query.float().cpu(), trainer.model_inference(features).cpu()))
    finally:
        trainer.test_loader = tested
    images, logits = zip(*seen, strict=True)
    return torch.cat(images), torch.cat(logits)
