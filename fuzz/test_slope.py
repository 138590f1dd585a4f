"""The judge of the soak is itself judged: how often it cries wolf, and what it can see."""

from __future__ import annotations

import numpy as np
import pytest
from slope import slope

SECONDS = np.arange(0.0, 600.0, 0.2)


def correlated(rng: np.random.Generator, *, time_seconds: float) -> np.ndarray:
    """An AR(1) series with the given correlation time and unit variance."""
    keep = np.exp(-0.2 / time_seconds)
    noise = rng.standard_normal(SECONDS.size) * np.sqrt(1 - keep**2)
    series = np.empty_like(noise)
    series[0] = rng.standard_normal()
    for at in range(1, noise.size):
        series[at] = keep * series[at - 1] + noise[at]
    return series


@pytest.mark.parametrize("time_seconds", [0.1, 2.0, 5.0])
def test_a_flat_series_rarely_raises_an_alarm_however_autocorrelated(time_seconds: float) -> None:
    rng = np.random.default_rng(7)
    alarms = sum(slope(SECONDS, correlated(rng, time_seconds=time_seconds)).rises for _ in range(200))
    assert alarms <= 3


def test_a_sawtooth_is_flat() -> None:
    for period in (3.0, 7.0, 19.0):
        assert not slope(SECONDS, 20 * ((SECONDS / period) % 1.0)).rises


def test_a_slow_leak_under_loud_noise_is_seen() -> None:
    rng = np.random.default_rng(8)
    seen = sum(slope(SECONDS, 2 * correlated(rng, time_seconds=2.0) + SECONDS / 60.0).rises for _ in range(50))
    assert seen >= 48


def test_growth_that_ends_within_the_first_half_is_warm_up() -> None:
    rng = np.random.default_rng(9)
    series = np.minimum(SECONDS, 290.0) + correlated(rng, time_seconds=1.0)
    assert not slope(SECONDS, series).rises


def test_what_comes_round_about_every_half_minute_rarely_raises_an_alarm() -> None:
    rng = np.random.default_rng(10)
    alarms = 0
    for _ in range(200):
        turns = np.cumsum(rng.uniform(20.0, 35.0, 40)) - 20.0
        last = turns[np.searchsorted(turns, SECONDS, side="right") - 1]
        alarms += slope(SECONDS, 30 * (SECONDS - last) / 30.0 + correlated(rng, time_seconds=2.0)).rises
    assert alarms <= 3


def cache(rng: np.random.Generator) -> np.ndarray:
    """A Session's bytes: they grow to 12 MiB at paces of their own and fall at each rotation, as in the soaks."""
    turns = np.cumsum(rng.uniform(20.0, 45.0, 40)) - 20.0
    at = np.searchsorted(turns, SECONDS, side="right") - 1
    return 12 * (SECONDS - turns[at]) / (turns[at + 1] - turns[at])


def soaked(rng: np.random.Generator, held: np.ndarray, *, leak_per_minute: float) -> np.ndarray:
    """An engine's memory about its cache: noise of 1.4 MiB that lasts a second, as in the soaks, and a leak."""
    return 0.5 * held + 1.4 * correlated(rng, time_seconds=1.1) + leak_per_minute * SECONDS / 60.0


def test_what_a_cache_explains_rarely_raises_an_alarm() -> None:
    rng = np.random.default_rng(11)
    alarms = 0
    for _ in range(200):
        held = cache(rng)
        alarms += slope(SECONDS, soaked(rng, held, leak_per_minute=0.0), held).rises
    assert alarms <= 3


def test_a_leak_of_half_a_mebibyte_a_minute_is_seen_where_the_cache_stands_beside_it() -> None:
    rng = np.random.default_rng(12)
    seen = blind = 0
    for _ in range(100):
        held = cache(rng)
        leaking = soaked(rng, held, leak_per_minute=0.5)
        seen += slope(SECONDS, leaking, held).rises
        blind += slope(SECONDS, leaking).rises
    assert seen >= 95
    assert blind < seen / 2


def test_a_cache_that_holds_still_explains_nothing() -> None:
    rng = np.random.default_rng(14)
    series = correlated(rng, time_seconds=1.0)
    assert slope(SECONDS, series, np.full(SECONDS.size, 4.0)) == slope(SECONDS, series)


def test_a_constant_series_has_a_slope_of_exactly_zero() -> None:
    found = slope(SECONDS, np.full(SECONDS.size, 31.0))
    assert (found.low, found.per_minute, found.high) == (0.0, 0.0, 0.0)


def test_too_short_a_series_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="too few"):
        slope([0.0, 1.0, 2.0], [1.0, 1.0, 1.0])
