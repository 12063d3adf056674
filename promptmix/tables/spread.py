"""What stands behind a ±: the deviation over seeds as the field reports it, or a confidence interval.

The field's ± is the population standard deviation (``numpy.std``, divided by n), as Dassl's ``parse_test_res.py`` prints it. The
95% interval is Student's: t * s / sqrt(n) on either side of the mean, with the sample deviation s (divided by n - 1) and t the
quantile of n - 1 degrees of freedom: 4.30 for 3 seeds, not 1.96. One seed has no interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

STD = "the population standard deviation over seeds"
CI95 = "half a 95% t-interval over seeds"


def spread_of(values: Sequence[float], ci95: bool = False) -> float | None:
    """Return the ± of ``values``, one for each seed.

    Args:
        values: the numbers.
        ci95: half the 95% t-interval of their mean in place of the population standard deviation.

    Returns:
        None where there is none: an interval of fewer than two values.
    """
    if not ci95:
        return float(np.std(values)) if len(values) else 0.0
    count = len(values)
    if count < 2:
        return None
    return student_quantile(count - 1) * float(np.std(values, ddof=1)) / math.sqrt(count)


def student_quantile(freedom: int, inside: float = 0.95) -> float:
    """Return t such that Student's distribution has the share ``inside`` between -t and t.

    Args:
        freedom: degrees of freedom, a whole number from 1.
        inside: share, above 0 and below 1.
    """
    low, high = 0.0, math.pi / 2  # of the angle whose tangent is t / sqrt(freedom)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _share_within(middle, freedom) < inside else (low, middle)
    return math.sqrt(freedom) * math.tan((low + high) / 2)


def _share_within(angle: float, freedom: int) -> float:
    """Return P(|T| < sqrt(freedom) tan(angle)), exact for whole degrees (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term = cosine if odd else 1.0
    total = 0.0 if freedom == 1 else term
    for k in range(3 if odd else 2, freedom - 1, 2):
        term *= (k - 1) / k * cosine * cosine
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
