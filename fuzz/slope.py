"""Is a series flat? The slope of its second half with a confidence interval that allows for autocorrelation.

Samples taken tenths of a second apart are far from independent, so an ordinary regression's interval is much too narrow.
The half is cut into BATCHES stretches of equal length; their means are nearly independent once a stretch is a few
correlation times long (the method of batch means), and a least-squares line through those means has Student's interval
with BATCHES - 2 degrees of freedom. ``test_slope.py`` holds the false-alarm rate and the power to figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BATCHES = 12
LEVEL = 0.995
"""Of each interval. A full run asks eight times (four limits, two series), so it cries wolf in 2 of 100 runs."""
STUDENT = 3.581
"""The two-sided 99.5 % quantile of Student's t with BATCHES - 2 = 10 degrees of freedom."""


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
    if when.size < 2 * BATCHES:
        message = f"{when.size} samples in the second half are too few for {BATCHES} batches: let it run longer"
        raise ValueError(message)
    if np.ptp(what) == 0.0:
        return Slope(0.0, 0.0, 0.0)
    edges = np.linspace(when[0], when[-1], BATCHES + 1)
    which = np.clip(np.searchsorted(edges, when, side="right") - 1, 0, BATCHES - 1)
    x = np.array([when[which == batch].mean() for batch in range(BATCHES)]) / 60.0
    y = np.array([what[which == batch].mean() for batch in range(BATCHES)])
    centred = x - x.mean()
    spread = float(centred @ centred)
    found = float(centred @ y) / spread
    residuals = y - y.mean() - found * centred
    half = STUDENT * float(np.sqrt(residuals @ residuals / (BATCHES - 2) / spread))
    return Slope(found, found - half, found + half)
