"""Fixtures, and the Hypothesis profile of the suite: what it draws is the same in each run, and no example is timed."""

from __future__ import annotations

from pathlib import Path

import hypothesis
import pytest

from everos_engine.settings import Settings, load

hypothesis.settings.register_profile(
    "suite",
    derandomize=True,  # a law that fails for one input in a million is for the fuzz runs to find, not for CI to meet
    database=None,
    deadline=None,  # a machine that pauses is no slow parser
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("suite")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    found = tmp_path / "a root with %, # and ünï"
    found.mkdir()
    return found


@pytest.fixture
def settings(root: Path) -> Settings:
    flags = {
        "memory.root": str(root),
        "note.globs": ["**/*.md"],
        "worker_retry_backoff_seconds": 0.01,
        "settle_milliseconds": 20,
    }
    return load(flags, environment={}, user_file=root / "none.toml")
