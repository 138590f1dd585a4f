"""Is a series flat? The slope of its second half with a confidence interval that allows for autocorrelation.

Samples taken tenths of a second apart are far from independent, so an ordinary regression's interval is much too narrow.
The half is cut into stretches of equal length; their means are nearly independent once a stretch is as long as what comes
round in the series (the method of batch means): here BATCH_SECONDS, in which an engine trims its heap and rotates its
Session once at least. A least-squares line through n such means has Student's interval with n - 2 degrees of freedom.
``test_slope.py`` holds the false-alarm rate and the power to figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BATCH_SECONDS = 37.0
"""Longer than any such cycle, and no multiple of one."""
LEAST_BATCHES, MOST_BATCHES = 6, 12
NEEDS_SECONDS = 2 * LEAST_BATCHES * BATCH_SECONDS
"""A shorter series can be told, but not judged: its stretches are parts of one cycle."""
LEVEL = 0.995
"""Of each interval. A full run asks ten times (five soaks, two series), so it cries wolf in 3 of 100 runs."""
STUDENT = {4: 5.598, 5: 4.773, 6: 4.317, 7: 4.029, 8: 3.833, 9: 3.690, 10: 3.581}
"""The two-sided 99.5 % quantiles of Student's t, by degrees of freedom."""


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

    @property
    def resolution(self) -> float:
        """The steepest rise that could have gone unseen, per minute."""
        return self.high

    def as_json(self) -> dict[str, float]:
        """For the results."""
        return {"per_minute": self.per_minute, "low": self.low, "high": self.high, "level": LEVEL}


def slope(seconds: Sequence[float], values: Sequence[float]) -> Slope:
    """The slope of the second half of a series, by time. Raises ValueError below two samples a batch."""
    when, what = np.asarray(seconds, dtype=float), np.asarray(values, dtype=float)
    late = when >= (when[0] + when[-1]) / 2
    when, what = when[late], what[late]
    batches = int(np.clip((when[-1] - when[0]) / BATCH_SECONDS, LEAST_BATCHES, MOST_BATCHES)) if when.size else 0
    if when.size < 2 * MOST_BATCHES:
        message = f"{when.size} samples in the second half are too few for {MOST_BATCHES} batches: let it run longer"
        raise ValueError(message)
    if np.ptp(what) == 0.0:
        return Slope(0.0, 0.0, 0.0)
    edges = np.linspace(when[0], when[-1], batches + 1)
    which = np.clip(np.searchsorted(edges, when, side="right") - 1, 0, batches - 1)
    x = np.array([when[which == batch].mean() for batch in range(batches)]) / 60.0
    y = np.array([what[which == batch].mean() for batch in range(batches)])
    centred = x - x.mean()
    spread = float(centred @ centred)
    found = float(centred @ y) / spread
    residuals = y - y.mean() - found * centred
    half = STUDENT[batches - 2] * float(np.sqrt(residuals @ residuals / (batches - 2) / spread))
    return Slope(found, found - half, found + half)
