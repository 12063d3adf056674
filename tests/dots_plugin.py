"""A plugin for the tests of the command line: a data set of coloured squares and two linear classifiers."""

from pathlib import Path

import torch

from promptmix import hookimpl
from promptmix.data import DatasetBase, Datum
from promptmix.data.base import require_folder
from promptmix.data.fewshot import subsample_classes
from promptmix.engine import TrainerX, build_lr_scheduler, build_optimizer

CLASSES = ("black", "dark", "light", "white")


class Dots(DatasetBase):
    def __init__(self, cfg):
        folder = require_folder(Path(cfg.DATASET.ROOT, "dots"), "Dots")
        items = [
            Datum(impath=str(folder / f"{name}.png"), label=label, classname=name)
            for label, name in enumerate(CLASSES)
            for _ in range(2)
        ]
        train, test = subsample_classes(items, items, subsample=cfg.DATASET.SUBSAMPLE_CLASSES)
        super().__init__(train_x=train, test=test)


class Linear(TrainerX):
    features = 3 * 8 * 8

    def build_model(self):
        self.model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(self.features, self.num_classes))
        self.optim = build_optimizer(self.model, self.cfg.OPTIM)
        self.sched = build_lr_scheduler(self.optim, self.cfg.OPTIM)
        self.register_model("head", self.model, self.optim, self.sched)

    def forward_backward(self, batch):
        image, label, _ = self.parse_batch_train(batch)
        loss = torch.nn.functional.cross_entropy(self.model(image), label)
        self.model_backward_and_update(loss)
        if self.batch_idx + 1 == self.num_batches:
            self.update_lr()
        return {"loss": loss.item()}


class OtherLinear(Linear):
    def build_model(self):
        self.model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LayerNorm(self.features))
        self.model.add_module("out", torch.nn.Linear(self.features, self.num_classes, bias=False))
        self.register_model("head", self.model)


@hookimpl
def register_trainers(registry):
    registry.register(Linear)
    registry.register(OtherLinear)


@hookimpl
def register_datasets(registry):
    registry.register(Dots)
