"""Estimate how many index descriptors one MiB of a Session's caches pins, with an interval, from counted pairs."""

from __future__ import annotations

import json
from collections import deque
from dataclasses import asdict, dataclass, field
from statistics import median

MIB = 1 << 20
MAX_POINTS = 64
MIN_POINTS = 8
MIN_STEP_BYTES = 64 << 10
"""Two points that are closer together count as one."""
TAIL = 0.05


@dataclass(frozen=True, slots=True)
class Slope:
    """Hold the estimated descriptors for each MiB, and its bounds.

    Nine tenths of the observations are between ``low`` and ``high``.
    """

    per_mebibyte: float
    low: float
    high: float
    points: int

    def as_text(self) -> str:
        """Return the slope as text, which ``kept`` reads."""
        return json.dumps(asdict(self))


def kept(text: str | None) -> Slope | None:
    """Return the slope that ``as_text`` made, or None for anything else."""
    try:
        return Slope(**json.loads(text)) if text else None
    except (ValueError, TypeError):
        return None


@dataclass(slots=True)
class Learner:
    """Hold the last ``MAX_POINTS`` different pairs of (bytes of a Session, index descriptors pinned)."""

    _points: deque[tuple[int, int, int]] = field(default_factory=lambda: deque(maxlen=MAX_POINTS))

    def see(self, session: int, session_bytes: int, pinned: int) -> None:
        """Keep a pair of the Session with this number, unless it repeats the last one or nothing is pinned."""
        if not pinned or not session_bytes:
            return
        if self._points:
            last, held, _ = self._points[-1]
            if last == session and abs(session_bytes - held) < MIN_STEP_BYTES:
                return
        self._points.append((session, session_bytes, pinned))

    def forget(self) -> None:
        """Forget all pairs, since another cap changes the share of indexes in a Session."""
        self._points.clear()

    def slope(self) -> Slope | None:
        """Return the slope of the pairs, or None while there are too few.

        Each pair gives a slope, since an empty Session pins nothing. The estimate is their median, which a few wrong
        pairs do not change. The bounds cut off a twentieth at each end, so the next pair is between them in nine of ten
        cases, for any distribution. A Session's bytes include metadata, which pins nothing. So one MiB of them pins
        less than one MiB of the index cache alone.
        """
        ratios = sorted(pinned / held * MIB for _, held, pinned in self._points)
        if len(ratios) < MIN_POINTS:
            return None
        tail = int(TAIL * len(ratios))
        low, middle, high = ratios[tail], median(ratios), ratios[-1 - tail]
        return Slope(round(middle, 2), round(low, 2), round(high, 2), len(ratios))
