"""``dassl.evaluation``: evaluators and their registry."""

from __future__ import annotations

from promptmix.dassl.importing import lacking
from promptmix.dassl.utils import Registry, check_availability
from promptmix.engine.evaluator import EVALUATOR_REGISTRY, Classification, EvaluatorBase, build_evaluator

__all__ = ["EVALUATOR_REGISTRY", "Classification", "EvaluatorBase", "Registry", "build_evaluator", "check_availability"]

__getattr__ = lacking("dassl.evaluation")
