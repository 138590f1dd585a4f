"""Tests of the soak: it passes a sound engine, and fails one with a planted leak."""

from __future__ import annotations

from pathlib import Path

import pytest

from fuzz.soak.driver import soak

PLANTED = ("-m", "fuzz.soak.planted_engine")
MUCH = {
    "lancedb.index_cache_size_bytes": 12 << 20,
    "lancedb.concurrent_reads": 2,
    "lancedb.descriptors_per_mebibyte": 1,
    "lancedb.optimize_after_commits": 2,
}
"""A cap that pins far more than it is said to: only the guard's rotations keep the count down."""
SECONDS = 25


def test_an_engine_whose_cap_pins_more_than_it_says_is_kept_under_its_limit(tmp_path: Path) -> None:
    verdict = soak(128, "pinned", SECONDS / 60, flags=MUCH, folder=tmp_path)
    assert verdict.faults == ()
    assert verdict.told["searches"]
    assert (tmp_path / "stress.jsonl").read_text().count("\n") == 1


@pytest.mark.parametrize(
    ("leak", "mode", "complaint"),
    [
        ("session-kept", "pinned", "pending: "),
        ("rotation-disabled", "pinned", "pending: "),
        ("plain-path-for-reopen", "reopen", "mode reopen holds"),
    ],
)
def test_the_soak_finds_a_planted_leak(tmp_path: Path, leak: str, mode: str, complaint: str) -> None:
    verdict = soak(128, mode, SECONDS / 60, child=[*PLANTED, leak], flags=MUCH, folder=tmp_path)
    assert complaint in "; ".join(verdict.faults)
