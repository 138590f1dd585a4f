"""What repeats itself is logged once in a while, with its count."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loguru import logger

from everos_engine.cli import logs
from everos_engine.settings import Settings
from everos_engine.system.repeats import MAX_KEYS, Repeats


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 100)), max_size=60))
def test_every_time_is_counted_once_and_no_key_is_due_twice_within_the_time(steps: list[tuple[str, float]]) -> None:
    repeats, now = Repeats(every_seconds=60), 0.0
    counted: dict[str, int] = {}
    came: dict[str, int] = {}
    last: dict[str, float] = {}
    for key, pause in steps:
        now += pause
        came[key] = came.get(key, 0) + 1
        times = repeats.due(key, now)
        counted[key] = counted.get(key, 0) + times
        assert bool(times) == (now - last.get(key, -100.0) >= 60)
        if times:
            last[key] = now
            assert counted[key] == came[key]


def test_keys_are_bounded() -> None:
    repeats = Repeats(every_seconds=60)
    for number in range(3 * MAX_KEYS):
        assert repeats.due(str(number), 0.0) == 1
    assert len(repeats._keys) == MAX_KEYS


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_lasting_trouble_is_logged_once_a_minute_with_its_count(
    form: str, settings: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(logs, "time", SimpleNamespace(monotonic=lambda: now))
    logs.set_up(replace(settings, log_format=form))  # type: ignore[arg-type]  # one of its values
    try:
        for number in range(100):
            now += 1
            logger.warning("loop_restart loop={} in_seconds={:.1f} error={!r}", "scan", number, "no space left")
            logger.error("unit_failed loop={} what={!r}", "maintain", "optimize note")
            logger.error("unit_failed loop={} what={!r}", "maintain", f"optimize {number % 2}")
            logger.info("engine_started root=x")
    finally:
        logger.remove()
        logger.add(sys.stderr)
    lines = capsys.readouterr().err.splitlines()
    assert len([line for line in lines if "engine_started" in line]) == 100
    assert len([line for line in lines if "loop_restart" in line]) == 2
    assert len([line for line in lines if "optimize note" in line]) == 2
    assert len([line for line in lines if "optimize 1" in line]) == 2
    assert "times=60" in [line for line in lines if "loop_restart" in line][1]
