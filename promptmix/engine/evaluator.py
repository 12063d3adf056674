"""Evaluation: accuracy, error, macro F1 and class-balanced accuracy, printed as Dassl prints them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from yacs.config import CfgNode

from promptmix.errors import ConfigError, DataError, PluginError, TrainingError
from promptmix.parallel import group
from promptmix.plugin_manager import get_plugin_manager
from promptmix.registry import EVALUATOR_REGISTRY, Registry, register
from promptmix.utils import get_logger, mkdir_if_missing

__all__ = ["EVALUATOR_REGISTRY", "Classification", "EvaluatorBase", "build_evaluator", "compute_accuracy"]


NOTHING_SEEN = "there is nothing to evaluate: the split has no items; check DATASET and TEST.SPLIT"
SCORES_ARE_NAN = (
    "the model's scores are NaN, so no class can be chosen; train with a lower OPTIM.LR, or with TRAIN.CLIP_GRAD_NORM 1.0"
)


class EvaluatorBase:
    """Takes model outputs batch by batch and makes numbers of them.

    Args:
        cfg: the whole config tree.
    """

    registry: ClassVar[Registry] = EVALUATOR_REGISTRY

    def __init__(self, cfg: CfgNode) -> None:
        self.cfg = cfg

    def reset(self) -> None:
        """Forget everything seen."""
        raise NotImplementedError

    def process(self, mo: torch.Tensor, gt: torch.Tensor) -> None:
        """Take in a batch: model output (B, C) and true labels (B,)."""
        raise NotImplementedError

    def evaluate(self) -> dict[str, float]:
        """Print and return the results; the first is the one that model selection goes by."""
        raise NotImplementedError


@register
class Classification(EvaluatorBase):
    """Top-1 classification, all numbers in percent.

    Args:
        cfg: the whole config tree; ``TEST.PER_CLASS_RESULT`` and ``TEST.COMPUTE_CMAT`` ask for more.
        lab2cname: label -> class name.

    Raises:
        ConfigError: per-class results are asked for without class names.
    """

    def __init__(self, cfg: CfgNode, lab2cname: Mapping[int, str] | None = None, **_: Any) -> None:
        super().__init__(cfg)
        self._lab2cname = lab2cname
        if cfg.TEST.PER_CLASS_RESULT and lab2cname is None:
            raise ConfigError("TEST.PER_CLASS_RESULT is True, but the evaluator was given no class names (lab2cname)")
        self.reset()

    def reset(self) -> None:
        """Forget everything seen."""
        self._true: list[torch.Tensor] = []
        self._predicted: list[torch.Tensor] = []
        self._nan: list[torch.Tensor] = []

    def process(self, mo: torch.Tensor, gt: torch.Tensor) -> None:
        """Take in a batch: scores (B, C) and true labels (B,). Nothing waits for the device here."""
        self._predicted.append(mo.detach().argmax(dim=1))
        self._nan.append(mo.detach().isnan().any())
        self._true.append(gt.detach())

    def evaluate(self) -> dict[str, float]:
        """Print the result block and return accuracy, error_rate, macro_f1, macro_accuracy (and perclass_accuracy).

        Raises:
            DataError: nothing was evaluated.
            TrainingError: scores were no numbers, from which any class would follow.
        """
        if not sum(len(batch) for batch in self._true):
            raise DataError(NOTHING_SEEN)
        if torch.stack(self._nan).any():
            raise TrainingError(SCORES_ARE_NAN)
        true, predicted = torch.cat(self._true).cpu(), torch.cat(self._predicted).cpu()
        size = int(max(true.max(), predicted.max())) + 1
        # counts[i, j]: items of class i that were taken for class j
        counts = torch.bincount(true * size + predicted, minlength=size * size).reshape(size, size)
        hits, items, guesses = counts.diagonal().double(), counts.sum(1).double(), counts.sum(0).double()
        present = items > 0
        total, correct = len(true), int(hits.sum())
        accuracy = 100.0 * correct / total
        f1 = 100.0 * float((2 * hits / (items + guesses))[present].mean())
        balanced = 100.0 * float((hits / items)[present].mean())
        results: dict[str, float] = OrderedDict(
            accuracy=accuracy, error_rate=100.0 - accuracy, macro_f1=f1, macro_accuracy=balanced
        )
        get_logger().info(
            f"=> result\n* total: {total:,}\n* correct: {correct:,}\n* accuracy: {accuracy:.1f}%\n"
            f"* error: {100.0 - accuracy:.1f}%\n* macro_f1: {f1:.1f}%\n* macro_acc: {balanced:.1f}%"
        )
        if self.cfg.TEST.PER_CLASS_RESULT:
            self._print_classes(hits, items)
            results["perclass_accuracy"] = balanced
        if self.cfg.TEST.COMPUTE_CMAT:
            self._save_cmat(counts)
        return results

    def _print_classes(self, hits: torch.Tensor, items: torch.Tensor) -> None:
        """Print a line for each class that the split has; ``hits`` and ``items`` are (C,)."""
        names = self._lab2cname or {}
        lines = ["=> per-class result"]
        shares = []
        for label in items.nonzero().flatten().tolist():
            correct, total = int(hits[label]), int(items[label])
            shares.append(100.0 * correct / total)
            name = names.get(label, "?")
            lines.append(f"* class: {label} ({name})\ttotal: {total:,}\tcorrect: {correct:,}\tacc: {shares[-1]:.1f}%")
        lines.append(f"* average: {sum(shares) / len(shares):.1f}%")
        get_logger().info("\n".join(lines))

    def _save_cmat(self, counts: torch.Tensor) -> None:
        """Save the confusion matrix, rows (true classes) summing to 1, over classes that occur in either role."""
        if not group.writes():
            return
        seen = (counts.sum(0) + counts.sum(1)) > 0
        counts = counts[seen][:, seen].double()
        path = Path(self.cfg.OUTPUT_DIR) / "cmat.pt"
        mkdir_if_missing(path.parent)
        torch.save(counts / counts.sum(1, keepdim=True).clamp(min=1), path)
        get_logger().info("Confusion matrix is saved to %s", path)


def build_evaluator(cfg: CfgNode, **kwargs: Any) -> EvaluatorBase:
    """Build the evaluator that ``TEST.EVALUATOR`` names.

    Raises:
        RegistryError: no such evaluator; the message lists those there are.
    """
    get_plugin_manager()
    if cfg.VERBOSE:
        get_logger().info("Loading evaluator: %s", cfg.TEST.EVALUATOR)
    kind = EVALUATOR_REGISTRY.get(cfg.TEST.EVALUATOR)
    if not isinstance(kind, type) or not issubclass(kind, EvaluatorBase):
        raise PluginError(f"evaluator {cfg.TEST.EVALUATOR!r} is not a class that extends EvaluatorBase; fix the plugin")
    evaluator: EvaluatorBase = kind(cfg, **kwargs)
    return evaluator


def compute_accuracy(
    output: torch.Tensor | Sequence[torch.Tensor], target: torch.Tensor, topk: Sequence[int] = (1,)
) -> list[torch.Tensor]:
    """Return the accuracy in percent among the k best guesses, for each k.

    Args:
        output: scores (B, C); of a tuple or list the first is taken.
        target: true labels (B,).
        topk: the k.

    Returns:
        One tensor of shape (1,) per k.
    """
    scores = output if isinstance(output, torch.Tensor) else output[0]
    guesses = scores.topk(min(max(topk), scores.shape[1]), dim=1).indices  # (B, K), best first
    hits = guesses.eq(target.view(-1, 1))
    return [hits[:, :k].any(dim=1).float().mean().mul(100.0).view(1) for k in topk]
