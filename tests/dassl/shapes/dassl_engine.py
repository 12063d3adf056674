"""A Dassl of a checkout's own, as small as it can be: written for the tests, with Dassl's interfaces and log lines."""

import os
import sys

import gdown  # noqa: F401  (Dassl imports it at its top, and needs it for downloads only)

TRAINERS = {}


class Registry:
    def register(self):
        return lambda kind: TRAINERS.setdefault(kind.__name__, kind)


TRAINER_REGISTRY = Registry()


def build_trainer(cfg):
    return TRAINERS[cfg.TRAINER.NAME](cfg)


class Tee:
    def __init__(self, path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        self.console = sys.stdout
        self.file = open(path, "w")  # noqa: SIM115

    def write(self, text):
        self.console.write(text)
        self.file.write(text)

    def flush(self):
        self.file.flush()


def setup_logger(folder):
    sys.stdout = Tee(os.path.join(folder, "log.txt"))


class TrainerX:
    """Its evaluator counts in its own way, which is why numbers differ."""

    def __init__(self, cfg):
        self.cfg = cfg

    def train(self):
        print(
            "Evaluate on the *test* set\n=> result\n* total: 4\n"
            "* correct: 3\n* accuracy: 75.0%\n* error: 25.0%\n* macro_f1: 74.0%"
        )

    test = train
