"""Running averages of losses and times, with Dassl's names and string form."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["AverageMeter", "MetricMeter"]


class AverageMeter:
    """The current value and the average of everything since the last reset.

    Values that lie on a GPU are added up there, in double precision: only reading ``val``, ``avg`` or ``sum`` waits for it.

    Args:
        ema: average with weight 0.1 on the newest value instead of equally.
    """

    def __init__(self, ema: bool = False) -> None:
        self.ema = ema
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._val: float | torch.Tensor = 0.0
        self._avg: float | torch.Tensor = 0.0
        self._sum: float | torch.Tensor = 0.0
        self.count: int = 0

    @property
    def val(self) -> float:
        """The current value."""
        return float(self._val)

    @property
    def avg(self) -> float:
        """The average."""
        return float(self._avg)

    @property
    def sum(self) -> float:
        """The sum, each value times the items it stands for."""
        return float(self._sum)

    @property
    def pending_avg(self) -> float | torch.Tensor:
        """The average, as a tensor where it lies on a GPU."""
        return self._avg

    def update(self, val: float | torch.Tensor, n: int = 1) -> None:
        """Take in ``val``, which stands for ``n`` items."""
        if isinstance(val, torch.Tensor):
            val = val.item() if val.device.type == "cpu" else val.detach().double().reshape(())
        self._val = val
        self._sum = self._sum + val * n
        self.count += n
        self._avg = 0.9 * self._avg + 0.1 * val if self.ema else self._sum / self.count


class MetricMeter:
    """One ``AverageMeter`` per name; prints as ``loss 0.5000 (0.6000) acc 50.0000 (40.0000)``.

    Args:
        delimiter: what stands between two names.
    """

    def __init__(self, delimiter: str = " ") -> None:
        self.meters: defaultdict[str, AverageMeter] = defaultdict(AverageMeter)
        self.delimiter = delimiter

    def update(self, input_dict: Mapping[str, Any] | None) -> None:
        """Take in one value per name; ``None`` (a step without a summary) changes nothing.

        Raises:
            TypeError: ``input_dict`` is not a mapping of names to numbers.
        """
        if input_dict is None:
            return
        if not isinstance(input_dict, Mapping):
            raise TypeError(f"forward_backward must return a dict of numbers or None, not {type(input_dict).__name__}")
        for name, value in input_dict.items():
            self.meters[name].update(value)

    def __str__(self) -> str:
        return self.delimiter.join(f"{name} {meter.val:.4f} ({meter.avg:.4f})" for name, meter in self.meters.items())
