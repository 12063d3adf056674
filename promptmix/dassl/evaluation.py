"""``dassl.evaluation``: evaluators and their registry."""

from __future__ import annotations

import os.path as osp
from collections import OrderedDict, defaultdict

import numpy as np
import torch

from promptmix.dassl.importing import lacking
from promptmix.dassl.utils import Registry, check_availability
from promptmix.engine.evaluator import EVALUATOR_REGISTRY, Classification, EvaluatorBase, build_evaluator

__all__ = ["EVALUATOR_REGISTRY", "Classification", "EvaluatorBase", "Registry", "build_evaluator", "check_availability"]
__all__ += ["OrderedDict", "defaultdict", "np", "osp", "torch"]  # for ``from dassl.evaluation.evaluator import *``

__getattr__ = lacking("dassl.evaluation")
