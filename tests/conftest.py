from __future__ import annotations

from pathlib import Path

import pytest

from everos_engine.settings import Settings, load


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
