"""Limit repeated log lines. Each key is due once in an interval, with the number of times it came."""

from __future__ import annotations

from dataclasses import dataclass, field

MAX_KEYS = 1024


@dataclass(slots=True)
class Repeats:
    """Count how often each key comes, and decide when it is due."""

    every_seconds: float
    _keys: dict[str, tuple[float, int]] = field(default_factory=dict)

    def due(self, key: str, now_seconds: float) -> int:
        """Return how often ``key`` came since it was last due, this time included. 0 if it is not due now."""
        at, times = self._keys.pop(key, (float("-inf"), 0))
        due = now_seconds - at >= self.every_seconds
        self._keys[key] = (now_seconds, 0) if due else (at, times + 1)
        if len(self._keys) > MAX_KEYS:
            del self._keys[next(iter(self._keys))]  # the key that was seen the longest time ago
        return times + 1 if due else 0
