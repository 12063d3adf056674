"""OpenworldAUC: base and new classes together (arXiv 2505.05180, ICML 2025)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from promptmix.errors import DataError

__all__ = ["openworld_auc"]

Numbers = Sequence[float] | np.ndarray


def openworld_auc(base_scores: Numbers, base_right: Numbers, new_scores: Numbers, new_right: Numbers) -> float:
    """Return the share of pairs of a base and a new picture that a model gets right as a whole.

    A pair counts where the base picture is classified rightly among the base names, the new one rightly among the new names, and
    the base picture has the larger base score; equal scores count one half. How many pictures either side has does not matter.

    The authors' code orders pictures after moving the wrong ones to the ends, which is this number too, unless scores are so
    inverted that a pair wrong on both sides counts as right there.

    Args:
        base_scores: (N,) of the pictures of base classes, higher = more likely base, such as the largest softmax probability.
        base_right: (N,) whether each is classified rightly among the base names.
        new_scores: (M,) of the pictures of new classes.
        new_right: (M,) whether each is classified rightly among the new names.

    Returns:
        From 0 to 1.

    Raises:
        DataError: a side has no pictures, a score is NaN, or scores and answers differ in number.
    """
    base, new = np.asarray(base_scores, dtype=float), np.asarray(new_scores, dtype=float)
    rights = np.asarray(base_right, dtype=bool), np.asarray(new_right, dtype=bool)
    for side, scores, right in zip(("base", "new"), (base, new), rights, strict=True):
        if not scores.size or scores.ndim != 1 or scores.shape != right.shape or np.isnan(scores).any():
            raise DataError(
                f"OpenworldAUC: {side} classes have scores of shape {scores.shape} and answers of shape {right.shape}; give one "
                "number and one answer for each of at least 1 picture, without NaN"
            )
    found = np.sort(new[rights[1]])
    below = np.searchsorted(found, base[rights[0]], side="left")
    equal = np.searchsorted(found, base[rights[0]], side="right") - below
    return float((below + 0.5 * equal).sum() / (base.size * new.size))
