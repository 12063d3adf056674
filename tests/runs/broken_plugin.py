"""A plugin whose trainers go wrong in the ways that a sweep must outlive."""

import os
import signal

from promptmix import hookimpl
from promptmix.engine import TrainerX
from promptmix.errors import DataError


class Raises(TrainerX):
    def build_model(self):
        raise ZeroDivisionError("a mistake in the method")


class Refuses(TrainerX):
    def build_model(self):
        raise DataError("a file is missing; get it again")


class Dies(TrainerX):
    def build_model(self):
        os.kill(os.getpid(), signal.SIGKILL)


@hookimpl
def register_trainers(registry):
    for trainer in (Raises, Refuses, Dies):
        registry.register(trainer)
