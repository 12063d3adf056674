"""PromptKD: Unsupervised Prompt Distillation for Vision-Language Models.

Zheng Li, Xiang Li, Xinyi Fu, Xin Zhang, Weiqiang Wang, Shuo Chen, Jian Yang. CVPR 2024. https://arxiv.org/abs/2403.02781

| paper | here |
|---|---|
| teacher, a prompted larger CLIP | ``TEACHER``: a run of any method with one vector a class; "" = the frozen backbone |
| W, its text features as shared class vectors | ``ClassVectors``: made once, kept in the checkpoint and in a file |
| unlabelled domain images | ``DATASET.UNLABELED: all`` (base and new classes); ``none`` = the labelled pictures |
| student: image prompts and projector | ``Student.vision``, ``Student.projector`` (1x1 convolutions, batch norm, ReLU) |
| L = T^2 KL(softmax(teacher / T) || softmax(student / T)) | ``TeacherKL``, over all classes and divided by their number |

Another league than methods that see base classes with labels: it sees pictures of the new classes, all of them, and learns from
a larger model. The student's own text tower is never run. Checkpoints hold class vectors, so that evaluation needs no teacher;
names that they lack need TEACHER or CLASS_VECTORS. Which epoch is tested: the best on the validation part of the base classes
(``TEST.FINAL_MODEL: best_val``); the authors choose on the base classes' test pictures, whose best is their number.

Deviations from the authors' code (github.com/zhengli97/PromptKD, trainers/promptkd.py): the teacher is any run, theirs is
PromptSRC on ViT-L/14; its text tower runs once, not for each batch; keys that their code never reads (CE_WEIGHT, PROJECT_LAYER,
those of text prompts) are not there; widths follow the models; fp32 and amp work.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
from promptmix.plugins.distillation.run_teacher import Run
from promptmix.plugins.prompt_bank.student import Student
from torch import Tensor
from yacs.config import CfgNode

from promptmix import register
from promptmix.config.declare import Setting
from promptmix.config.published import Theirs
from promptmix.engine.layout import VISUAL, Layout, Rule, linear
from promptmix.engine.league import TEACHER
from promptmix.errors import ConfigError
from promptmix.prompts.heads import Cosine
from promptmix.prompts.learner import Learner
from promptmix.prompts.roles import Distiller, Task
from promptmix.prompts.step import Step
from promptmix.prompts.teachers import Backbone, ClassVectors, Teacher
from promptmix.prompts.trainer import PromptTrainer

FILE = "class_vectors.safetensors"


class TeacherKL(Distiller):
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) over all class names, base and new: mean over images and classes.

    Args:
        bank: the student, which knows its teacher.
        t: temperature T.
    """

    def __init__(self, bank: Student, t: float) -> None:
        super().__init__()
        self.class_vectors, self.teacher, self.t = bank.class_vectors, bank.teacher, t

    def forward(self, step: Step) -> Tensor:
        if step.images is None:
            raise ValueError("the teacher needs the pictures")
        vectors = self.class_vectors(step.task.all_classnames)
        with torch.no_grad():
            seen = self.teacher.image(step.images)
            taught = (self.teacher.scale * seen @ vectors.to(seen.dtype).T).float()
        scores = step.scores(vectors).float()
        target, student = ((logits / self.t).log_softmax(dim=-1) for logits in (taught, scores))
        return self.t**2 * F.kl_div(student, target, reduction="batchmean", log_target=True) / vectors.shape[0]


@register
class PromptKD(PromptTrainer):
    """Visual prompts and a projector that learn a teacher's class probabilities from pictures without labels."""

    league = TEACHER
    unlabeled = True
    ignores = tuple(key for key in PromptTrainer.ignores if key != "DATASET.UNLABELED")
    published_keys = {
        "TRAINER.MODAL": Theirs(  # the pictures and the names are those that DATASET says
            values={"base2novel": "", "cross": ""}, instead="give base2novel or cross"
        ),
        "TRAINER.PROMPTKD.TEMPERATURE": "T",
    }
    layout = Layout(
        "VLPromptLearner",
        (
            *VISUAL,
            *(rule for place in (0, 1, 3) for rule in linear(f"VPT_image_trans.conv1.{place}", f"bank.projector.conv1.{place}")),
            *(
                Rule(f"VPT_image_trans.conv1.1.{name}", f"bank.projector.conv1.1.{name}")
                for name in ("running_mean", "running_var", "num_batches_tracked")
            ),
        ),
        whole=True,
        beside=r"VPT_image_trans\..*",
        ours_alone=r"bank\.(vectors|names|of_backbone)",
    )

    @classmethod
    def validate(cls, cfg: CfgNode) -> None:
        """Refuse batches of one picture, which batch norm can't take statistics of."""
        super().validate(cfg)
        part = "TRAIN_X" if cfg.DATASET.UNLABELED == "none" or cfg.DATALOADER.TRAIN_U.SAME_AS_X else "TRAIN_U"
        if cfg.DATALOADER[part].BATCH_SIZE == 1:
            raise ConfigError(
                f"DATALOADER.{part}.BATCH_SIZE is 1, but the projector normalises over a batch; set it to 2 or more"
            )

    def compose(
        self,
        task: Task,
        teacher: Annotated[
            str, Setting('run folder of the teacher; "" = the frozen backbone\'s hard prompts', at_test=True, place=True)
        ] = "",
        teacher_weights: Annotated[
            str, Setting("file of the teacher's backbone, where its run had one", at_test=True, place=True)
        ] = "",
        class_vectors: Annotated[
            str, Setting('safetensors file of class vectors; "" = asked of the teacher', at_test=True, place=True)
        ] = "",
        t: Annotated[float, Setting("T: temperature of both probabilities", above=0)] = 1.0,
        kd_weight: Annotated[
            float, Setting("factor on the divergence, which is divided by the number of classes", above=0)
        ] = 1000.0,
        n_ctx_vision: Annotated[int, Setting("learned tokens of each layer", low=1)] = 4,
        prompt_depth_vision: Annotated[int, Setting("layers with tokens of their own, from the first", low=1)] = 9,
    ) -> Learner:
        """Return the student with the loss KD_WEIGHT T^2 KL(teacher || student)."""
        if teacher:
            seen = {key: self.cfg.INPUT[key] for key in ("SIZE", "PIXEL_MEAN", "PIXEL_STD")}
            who: Teacher = Run(teacher, teacher_weights, self.device.type, seen)
        else:
            who = Backbone(task)
        given = ClassVectors.read(class_vectors) if class_vectors else None
        bank = Student(task, who, given, n_ctx_vision, prompt_depth_vision, bool(teacher or class_vectors))
        loss = kd_weight * TeacherKL(bank, t)
        return Learner(task, bank, head=Cosine(task, bank), loss=loss)

    def before_train(self) -> None:
        """Write the class vectors beside the results."""
        super().before_train()
        bank: Student = self.model.bank
        names = tuple(bank.task.all_classnames)
        vectors = ClassVectors(names, bank.class_vectors(names), bank.teacher.scale, bank.teacher.name)
        vectors.save(Path(self.output_dir, FILE))
