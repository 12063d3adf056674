"""``dassl.engine``: trainers and their registry."""

from __future__ import annotations

from promptmix.dassl.importing import lacking
from promptmix.dassl.modeling import SimpleNet
from promptmix.engine import TRAINER_REGISTRY, SimpleTrainer, TrainerBase, TrainerX, TrainerXU, build_trainer

__all__ = ["TRAINER_REGISTRY", "SimpleNet", "SimpleTrainer", "TrainerBase", "TrainerX", "TrainerXU", "build_trainer"]

_METHODS = "ADDA AdaBN CDAC CrossGrad DAEL DAELDG DANN DDAIG DomainMix EntMin FixMatch M3SDA MCD MME MeanTeacher MixMatch SE"
__getattr__ = lacking(
    "dassl.engine",
    [*_METHODS.split(), "SourceOnly", "SupBaseline", "Vanilla", "da", "dg", "ssl"],
    "a method for domain adaptation, domain generalisation or semi-supervised learning",
)
