"""``dassl.metrics``: accuracy and distances."""

from __future__ import annotations

import torch
from torch import Tensor

from promptmix.dassl.importing import lacking
from promptmix.engine.evaluator import compute_accuracy

__all__ = ["compute_accuracy", "compute_distance_matrix", "cosine_distance", "euclidean_squared_distance"]


def compute_distance_matrix(input1: Tensor, input2: Tensor, metric: str = "euclidean") -> Tensor:
    """Return the distances (M, N) of features (M, D) and (N, D).

    Args:
        input1: (M, D).
        input2: (N, D).
        metric: ``euclidean`` (squared) or ``cosine``.

    Raises:
        ValueError: another metric, or features that are no matrices of the same width.
    """
    distances = {"euclidean": euclidean_squared_distance, "cosine": cosine_distance}
    if metric not in distances:
        raise ValueError(f"metric is {metric!r}, but must be one of: {', '.join(distances)}")
    if input1.dim() != 2 or input2.dim() != 2 or input1.shape[1] != input2.shape[1]:
        raise ValueError(f"features must be (M, D) and (N, D), not {tuple(input1.shape)} and {tuple(input2.shape)}")
    return distances[metric](input1, input2)


def euclidean_squared_distance(input1: Tensor, input2: Tensor) -> Tensor:
    """Return squared euclidean distances (M, N)."""
    return input1.square().sum(1, keepdim=True) + input2.square().sum(1) - 2 * input1 @ input2.T


def cosine_distance(input1: Tensor, input2: Tensor) -> Tensor:
    """Return 1 - cosine (M, N)."""
    return 1 - torch.nn.functional.normalize(input1, dim=1) @ torch.nn.functional.normalize(input2, dim=1).T


__getattr__ = lacking("dassl.metrics")
