"""The judge of the soak is itself judged: how often it cries wolf, and what it can see."""

from __future__ import annotations

import numpy as np
import pytest

from fuzz.soak.slope import crest, slope

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
    """A Session's bytes: they grow to 8 MiB at paces of their own and fall at each rotation, as in the soaks."""
    turns = np.cumsum(rng.uniform(12.0, 32.0, 70)) - 20.0
    at = np.searchsorted(turns, SECONDS, side="right") - 1
    return 8 * (SECONDS - turns[at]) / (turns[at + 1] - turns[at])


def soaked(rng: np.random.Generator, *, leak_per_minute: float) -> np.ndarray:
    """An engine's memory: a cache, noise of 0.8 MiB that lasts a second as in the soaks, and a leak.

    At first all that the cache lets go is returned, after ten minutes a third of it.
    """
    held = cache(rng)
    kept = (8 - held) * 0.67 * SECONDS / SECONDS[-1]
    return held + kept + 0.8 * correlated(rng, time_seconds=1.1) + leak_per_minute * SECONDS / 60.0


def test_a_low_tide_that_rises_to_a_high_tide_that_does_not_is_no_leak() -> None:
    rng = np.random.default_rng(11)
    alarms = by_mean = 0
    for _ in range(200):
        level = soaked(rng, leak_per_minute=0.0)
        alarms += slope(SECONDS, level, crest).rises
        by_mean += slope(SECONDS, level).rises
    assert alarms <= 3
    assert by_mean > 20


def test_a_leak_of_half_a_mebibyte_a_minute_is_seen_in_the_crests() -> None:
    rng = np.random.default_rng(12)
    seen = sum(slope(SECONDS, soaked(rng, leak_per_minute=0.5), crest).rises for _ in range(100))
    assert seen >= 95


def test_a_constant_series_has_a_slope_of_exactly_zero() -> None:
    found = slope(SECONDS, np.full(SECONDS.size, 31.0))
    assert (found.low, found.per_minute, found.high) == (0.0, 0.0, 0.0)


def test_too_short_a_series_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="too few"):
        slope([0.0, 1.0, 2.0], [1.0, 1.0, 1.0])
