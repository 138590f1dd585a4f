"""Hypothesis profiles: `ci` is bounded and repeatable, `fuzz` is long and never the same twice."""

from __future__ import annotations

from datetime import timedelta

from hypothesis import HealthCheck, settings

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
settings.register_profile(
    "ci",
    max_examples=200,
    stateful_step_count=30,
    derandomize=True,
    database=None,
    deadline=None,  # a machine that pauses is no slow parser; the long form has one
    suppress_health_check=SLOW,
)
settings.register_profile(
    "fuzz",
    max_examples=1500,
    stateful_step_count=60,
    deadline=timedelta(seconds=60),
    suppress_health_check=SLOW,
    print_blob=True,
)
settings.load_profile("ci")
