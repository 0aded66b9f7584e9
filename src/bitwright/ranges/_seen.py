"""What all range finders share: taking a statistic, and ranges that contain zero."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeVar

from bitwright.core.stats import Histogram, Statistic
from bitwright.errors import InputError, NumericError

__all__ = ["around_zero", "seen", "seen_histogram"]

Kind = TypeVar("Kind", bound=Statistic)


def seen(stats: Mapping[str, Statistic], kind: type[Kind]) -> Kind:
    """The statistic of this kind. Raises InputError where it is missing or saw no token."""
    found = stats.get(kind.name)
    if not isinstance(found, kind) or found.count == 0:
        raise InputError("no calibration token reached this layer", mend="use more calibration text")
    return found


def seen_histogram(stats: Mapping[str, Statistic]) -> Histogram:
    """The histogram. Raises NumericError where some values were not finite."""
    found = seen(stats, Histogram)
    if found.lost:
        raise NumericError(
            f"{found.lost} values of a layer's inputs are not finite", mend="run the calibration in float32"
        )
    return found


def around_zero(low: float, high: float) -> tuple[float, float]:
    """The range, widened where needed so that it contains zero. Raises NumericError for NaN and infinity.

    >>> around_zero(0.5, 2.0)
    (0.0, 2.0)
    """
    if not (math.isfinite(low) and math.isfinite(high)):
        raise NumericError("the range of a layer's inputs is not finite", mend="run the calibration in float32")
    return min(low, 0.0), max(high, 0.0)
