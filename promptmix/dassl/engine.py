"""``dassl.engine``: trainers and their registry."""

from __future__ import annotations

import datetime
import os.path as osp
import time
from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from promptmix.dassl.data import DataManager
from promptmix.dassl.evaluation import build_evaluator
from promptmix.dassl.importing import lacking
from promptmix.dassl.modeling import SimpleNet, build_backbone, build_head
from promptmix.dassl.optim import build_lr_scheduler, build_optimizer
from promptmix.dassl.utils import (
    AverageMeter,
    MetricMeter,
    Registry,
    check_availability,
    count_num_param,
    load_checkpoint,
    load_pretrained_weights,
    mkdir_if_missing,
    resume_from_checkpoint,
    save_checkpoint,
    tolist_if_not,
)
from promptmix.engine import TRAINER_REGISTRY, SimpleTrainer, TrainerBase, TrainerX, TrainerXU, build_trainer

__all__ = ["TRAINER_REGISTRY", "SimpleNet", "SimpleTrainer", "TrainerBase", "TrainerX", "TrainerXU", "build_trainer"]

#: What forks import from ``dassl.engine.trainer``, which imports it itself; some take all of it (``import *``).
_PASSED_ON = {
    **{"datetime": datetime, "nn": nn, "np": np, "osp": osp, "time": time, "torch": torch, "tqdm": tqdm},
    **{
        passed.__name__: passed
        for passed in (
            *(AverageMeter, DataManager, MetricMeter, OrderedDict, Registry, build_backbone, build_evaluator, build_head),
            *(build_lr_scheduler, build_optimizer, check_availability, count_num_param, load_checkpoint, mkdir_if_missing),
            *(load_pretrained_weights, resume_from_checkpoint, save_checkpoint, tolist_if_not),
        )
    },
}
__all__ += list(_PASSED_ON)


def __getattr__(name: str) -> Any:
    if name == "SummaryWriter":  # importing tensorboard costs a second
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter
    return _lacking(name)


_METHODS = "ADDA AdaBN CDAC CrossGrad DAEL DAELDG DANN DDAIG DomainMix EntMin FixMatch M3SDA MCD MME MeanTeacher MixMatch SE"
_lacking = lacking(
    "dassl.engine",
    [*_METHODS.split(), "SourceOnly", "SupBaseline", "Vanilla", "da", "dg", "ssl"],
    "a method for domain adaptation, domain generalisation or semi-supervised learning",
)
