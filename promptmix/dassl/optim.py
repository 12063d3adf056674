"""``dassl.optim``: optimizers and learning-rate schedules from the ``OPTIM`` node."""

from __future__ import annotations

from promptmix.dassl.importing import lacking
from promptmix.engine.optim import OPTIMIZERS as AVAI_OPTIMS
from promptmix.engine.optim import SCHEDULES as AVAI_SCHEDS
from promptmix.engine.optim import build_lr_scheduler, build_optimizer

__all__ = ["AVAI_OPTIMS", "AVAI_SCHEDS", "build_lr_scheduler", "build_optimizer"]

__getattr__ = lacking(
    "dassl.optim",
    ["ConstantWarmupScheduler", "LinearWarmupScheduler", "RAdam"],
    "build_lr_scheduler and build_optimizer make these from the OPTIM node",
)
