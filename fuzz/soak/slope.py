"""Is a series flat? The slope of its second half with a confidence interval that allows for autocorrelation.

Samples taken tenths of a second apart are far from independent, so an ordinary regression's interval is much too narrow.
The half is cut into stretches of equal length, each is summed up in one number, and these are nearly independent once a stretch is as
long as what comes round in the series (the method of batch means): here STRETCH_SECONDS, in which a soaked engine rotates its Session
once at least. A least-squares line through n such numbers has Student's interval with n - 2 degrees of freedom.
``test_slope.py`` holds the false-alarm rate and the power to figures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

STRETCH_SECONDS = 37.0
"""Longer than any such cycle, and no multiple of one."""
MIN_STRETCHES, MAX_STRETCHES = 6, 12
NEEDS_SECONDS = 2 * MIN_STRETCHES * STRETCH_SECONDS
"""A shorter series can be told, but not judged: its stretches are parts of one cycle."""
LEVEL = 0.995
"""Of each interval. A full run asks ten times (five soaks, two series), so it cries wolf in 3 of 100 runs."""
STUDENT = {4: 5.598, 5: 4.773, 6: 4.317, 7: 4.029, 8: 3.833, 9: 3.690, 10: 3.581}
"""The two-sided 99.5 % quantiles of Student's t, by degrees of freedom."""
CREST = 0.9


@dataclass(frozen=True, slots=True)
class Slope:
    """``per_minute`` with its ``low`` and ``high`` bounds, in the unit of the series."""

    per_minute: float
    low: float
    high: float

    @property
    def rises(self) -> bool:
        """Whether the interval lies above zero: a leak."""
        return self.low > 0.0

    def as_json(self) -> dict[str, float]:
        """For the results."""
        return {"per_minute": self.per_minute, "low": self.low, "high": self.high, "level": LEVEL}


def mean(stretch: NDArray[np.float64]) -> float:
    """Sums a stretch up: of all its samples."""
    return float(stretch.mean())


def crest(stretch: NDArray[np.float64]) -> float:
    """Sums a stretch up: what it exceeds a tenth of the time.

    For memory that fills and is let go in turns. What a cache lets go the allocator cannot return whole once younger
    blocks lie among it, so its low tide rises for half an hour, towards a high tide that does not; a leak raises both.
    """
    return float(np.quantile(stretch, CREST))


def slope(
    seconds: Sequence[float], values: Sequence[float], sum_up: Callable[[NDArray[np.float64]], float] = mean
) -> Slope:
    """The slope of the second half of a series, by time. Raises ValueError below two samples a stretch."""
    when, what = np.asarray(seconds, dtype=float), np.asarray(values, dtype=float)
    late = when >= (when[0] + when[-1]) / 2
    when, what = when[late], what[late]
    if when.size < 2 * MAX_STRETCHES:
        message = f"{when.size} samples in the second half are too few for {MAX_STRETCHES} stretches: let it run longer"
        raise ValueError(message)
    count = int(np.clip((when[-1] - when[0]) / STRETCH_SECONDS, MIN_STRETCHES, MAX_STRETCHES))
    if np.ptp(what) == 0.0:
        return Slope(0.0, 0.0, 0.0)
    which = np.searchsorted(np.linspace(when[0], when[-1], count + 1)[1:-1], when, side="right")
    x = np.array([when[which == stretch].mean() for stretch in range(count)]) / 60.0
    y = np.array([sum_up(what[which == stretch]) for stretch in range(count)])
    centred = x - x.mean()
    spread = float(centred @ centred)
    found = float(centred @ y) / spread
    residuals = y - y.mean() - found * centred
    half = STUDENT[count - 2] * float(np.sqrt(residuals @ residuals / (count - 2) / spread))
    return Slope(found, found - half, found + half)
