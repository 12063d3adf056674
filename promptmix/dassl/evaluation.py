"""``dassl.evaluation``: evaluators and their registry."""

from __future__ import annotations

from promptmix.dassl.importing import lacking
from promptmix.engine.evaluator import EVALUATOR_REGISTRY, Classification, EvaluatorBase, build_evaluator

__all__ = ["EVALUATOR_REGISTRY", "Classification", "EvaluatorBase", "build_evaluator"]

__getattr__ = lacking("dassl.evaluation")
