"""OpenworldAUC: base and new classes together (arXiv 2505.05180, ICML 2025)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from yacs.config import CfgNode

from promptmix.data.fewshot import num_base
from promptmix.engine.evaluator import NOTHING_SEEN, SCORES_ARE_NAN, EvaluatorBase
from promptmix.errors import ConfigError, DataError, TrainingError
from promptmix.registry import register
from promptmix.utils import get_logger

__all__ = ["OpenWorld", "openworld_auc"]

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


@register
class OpenWorld(EvaluatorBase):
    """Pictures of base and new classes together, by prompts that were trained on the base classes; all numbers in percent.

    A base picture is classified among the base names and a new one among the new names; its base score says which of the two it
    looks like: what the method brings (``Head.base_scores``), or else the largest probability of a base name among all names.

    Args:
        cfg: the whole config tree.

    Raises:
        ConfigError: the test pictures are not those of base and new classes together.
    """

    def __init__(self, cfg: CfgNode, **_: Any) -> None:
        super().__init__(cfg)
        classes = cfg.DATASET.SUBSAMPLE_CLASSES
        if classes != "open":
            raise ConfigError(
                f"TEST.EVALUATOR is 'OpenWorld', which tests base and new classes together, but DATASET.SUBSAMPLE_CLASSES is "
                f"{classes!r}; set it to open (with --eval-only), or use `promptmix run open-world`"
            )
        self.reset()

    def reset(self) -> None:
        """Forget everything seen."""
        self._seen: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def process(self, mo: Tensor, gt: Tensor, base_scores: Tensor | None = None) -> None:
        """Take in a batch.

        Args:
            mo: scores (B, C) of all names, base classes first.
            gt: true labels (B,).
            base_scores: (B,), higher = more likely of a base class; None = the largest probability of a base name.
        """
        scores, labels = mo.detach().float(), gt.detach()
        base = num_base(scores.shape[1])
        parts = scores[:, :base], scores[:, base:]
        found = parts[0].argmax(dim=1), parts[1].argmax(dim=1) + base
        among_own = torch.where(labels < base, *found)
        if base_scores is None:
            base_scores = scores.softmax(dim=1)[:, :base].amax(dim=1)
        ranked = torch.where(scores.isnan().any(dim=1), float("nan"), base_scores.detach().float())
        self._seen.append((labels < base, among_own == labels, scores.argmax(dim=1) == labels, ranked))

    def evaluate(self) -> dict[str, float]:
        """Print the result block and return openworld_auc, base_accuracy, new_accuracy, auroc and accuracy (among all names).

        Raises:
            DataError: one of the two kinds of classes has no pictures.
            TrainingError: scores were no numbers.
        """
        if not self._seen:
            raise DataError(NOTHING_SEEN)
        is_base, right, right_of_all, score = (torch.cat(column).cpu().numpy() for column in zip(*self._seen, strict=True))
        if np.isnan(score).any():
            raise TrainingError(SCORES_ARE_NAN)
        sides = is_base, ~is_base
        whole = openworld_auc(score[sides[0]], right[sides[0]], score[sides[1]], right[sides[1]])
        told_apart = openworld_auc(*(part for side in sides for part in (score[side], np.ones(side.sum(), dtype=bool))))
        shares = [whole, right[sides[0]].mean(), right[sides[1]].mean(), told_apart, right_of_all.mean()]
        names = ("openworld_auc", "base_accuracy", "new_accuracy", "auroc", "accuracy")
        results: dict[str, float] = OrderedDict(zip(names, (100.0 * float(share) for share in shares), strict=True))
        lines = [f"* total: {len(score):,}", *(f"* {name}: {value:.1f}%" for name, value in results.items())]
        get_logger().info("\n".join(["=> result", *lines]))
        return results
