"""The engine: Dassl-shaped trainers, optimizers and schedules, evaluation, checkpoints and the run's log."""

from promptmix.engine.checkpoint import (
    load_checkpoint,
    load_pretrained_weights,
    load_state_dict_strict,
    resume_from_checkpoint,
    save_checkpoint,
)
from promptmix.engine.evaluator import (
    EVALUATOR_REGISTRY,
    Classification,
    EvaluatorBase,
    build_evaluator,
    compute_accuracy,
)
from promptmix.engine.log import Logger, progress, setup_logger
from promptmix.engine.meters import AverageMeter, MetricMeter
from promptmix.engine.optim import EpochSchedule, build_lr_scheduler, build_optimizer
from promptmix.engine.precision import Precision, choose_device, clip_gradients
from promptmix.engine.trainer import (
    TRAINER_REGISTRY,
    SimpleTrainer,
    TrainerBase,
    TrainerX,
    TrainerXU,
    build_trainer,
)
from promptmix.utils import collect_env_info, count_num_param, get_logger, set_random_seed

__all__ = [
    "EVALUATOR_REGISTRY",
    "TRAINER_REGISTRY",
    "AverageMeter",
    "Classification",
    "EpochSchedule",
    "EvaluatorBase",
    "Logger",
    "MetricMeter",
    "Precision",
    "SimpleTrainer",
    "TrainerBase",
    "TrainerX",
    "TrainerXU",
    "build_evaluator",
    "build_lr_scheduler",
    "build_optimizer",
    "build_trainer",
    "choose_device",
    "clip_gradients",
    "collect_env_info",
    "compute_accuracy",
    "count_num_param",
    "get_logger",
    "load_checkpoint",
    "load_pretrained_weights",
    "load_state_dict_strict",
    "progress",
    "resume_from_checkpoint",
    "save_checkpoint",
    "set_random_seed",
    "setup_logger",
]
