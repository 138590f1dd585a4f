"""Is a series flat? The slope of its second half with a confidence interval that allows for autocorrelation.

Samples taken tenths of a second apart are far from independent, so an ordinary regression's interval is much too narrow.
The half is cut into stretches of equal length; their means are nearly independent once a stretch is longer than what one
sample tells of the next (the method of batch means). A least-squares line through n such means has Student's interval with
n - 2 degrees of freedom.

What moves a series and is itself bounded and known, as the bytes of a cache move the memory of its process, may stand
beside it: then the line is fitted together with it (analysis of covariance, n - 3 degrees of freedom), its ups and downs are no
noise any more, and the interval is of what they do not explain. ``test_slope.py`` holds false alarms and power to figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BATCH_SECONDS = 19.0
"""Several times as long as the noise of a process' memory lasts, and no multiple of anything the engine does by the clock."""
LEAST_BATCHES, MOST_BATCHES = 6, 16
NEEDS_SECONDS = 450.0
"""A shorter series can be told, but not judged: an engine's memory takes minutes to be level, and a half needs its stretches."""
LEVEL = 0.995
"""Of each interval. A full run asks ten times (five soaks, two series), so it cries wolf in 3 of 100 runs."""
STUDENT = {
    3: 7.453, 4: 5.598, 5: 4.773, 6: 4.317, 7: 4.029, 8: 3.833, 9: 3.690, 10: 3.581, 11: 3.497, 12: 3.428, 13: 3.372, 14: 3.326,
}  # fmt: skip
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


def slope(seconds: Sequence[float], values: Sequence[float], beside: Sequence[float] | None = None) -> Slope:
    """The slope of the second half of a series, by time, and of what ``beside`` does not explain where that is given.

    Raises ValueError below two samples a batch.
    """
    when, columns = (
        np.asarray(seconds, dtype=float),
        np.asarray([values, values if beside is None else beside], dtype=float),
    )
    late = when >= (when[0] + when[-1]) / 2
    when, (what, other) = when[late], columns[:, late]
    if when.size < 2 * MOST_BATCHES:
        message = f"{when.size} samples in the second half are too few for {MOST_BATCHES} batches: let it run longer"
        raise ValueError(message)
    if np.ptp(what) == 0.0:
        return Slope(0.0, 0.0, 0.0)
    batches = int(np.clip((when[-1] - when[0]) / BATCH_SECONDS, LEAST_BATCHES, MOST_BATCHES))
    which = np.searchsorted(np.linspace(when[0], when[-1], batches + 1)[1:-1], when, side="right")
    means = [np.bincount(which, weights=series) / np.bincount(which) for series in (when / 60.0, other, what)]
    explains = beside is not None and np.ptp(means[1]) > 0.0
    known = np.column_stack([np.ones(batches), *means[: 1 + explains]])
    found, *_ = np.linalg.lstsq(known, means[2], rcond=None)
    residuals, free = means[2] - known @ found, batches - known.shape[1]
    variance = residuals @ residuals / free * np.linalg.inv(known.T @ known)[1, 1]
    half = STUDENT[free] * float(np.sqrt(variance))
    return Slope(float(found[1]), float(found[1]) - half, float(found[1]) + half)
