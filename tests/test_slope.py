"""Tests of the slope: descriptors for each MiB of a Session, learned from pairs that were counted."""

from __future__ import annotations

import resource
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everos_engine.engine import open_engine, open_reader
from everos_engine.loops.fd_guard import Guard
from everos_engine.settings import LanceDBSettings, Settings
from everos_engine.stores import meta
from everos_engine.stores.lance import Row
from everos_engine.system import ceiling, slope
from everos_engine.system.slope import MIN_POINTS, Learner, Slope
from everos_engine.testing import FakeEmbedder
from writer import fact, facts, put

MIB = 1 << 20
CYCLES, ROWS, WORDS = 14, 30, 60


@given(
    per_mebibyte=st.integers(1, 500),
    sizes=st.lists(st.integers(1, 64), min_size=30, max_size=60, unique=True),
    wrong=st.integers(0, 200_000),
)
def test_a_few_wrong_pairs_do_not_move_the_slope(per_mebibyte: int, sizes: list[int], wrong: int) -> None:
    learner = Learner()
    for number, size in enumerate(sizes):
        learner.see(0, size * MIB, wrong if number % 4 == 3 else size * per_mebibyte)
    found = learner.slope()
    assert found is not None
    assert found.per_mebibyte == per_mebibyte
    assert found.low <= found.per_mebibyte <= found.high


def test_too_few_pairs_or_pairs_that_say_the_same_teach_nothing() -> None:
    learner = Learner()
    for _ in range(50):
        learner.see(0, 5 * MIB, 100)
        learner.see(0, 6 * MIB, 0)
    assert learner.slope() is None
    for number in range(MIN_POINTS):
        learner.see(number, 5 * MIB, 100)
    assert learner.slope() is not None


def test_a_kept_slope_is_read_back_and_anything_else_is_none() -> None:
    one = Slope(7.0, 6.5, 7.9, 20)
    assert slope.kept(one.as_text()) == one
    assert [slope.kept(text) for text in (None, "", "{}", "[1]", "no", "3")] == [None] * 6


@given(
    high=st.floats(0.1, 1000),
    cap=st.integers(0, 1 << 30),
    room=st.integers(-1000, 100_000),
    budget=st.integers(0, 1 << 30),
)
def test_a_cap_is_only_lowered_and_only_if_a_full_session_would_not_fit(
    high: float, cap: int, room: int, budget: int
) -> None:
    settings = LanceDBSettings(session_most_bytes=budget)
    found = ceiling.fitting_cap(settings, Slope(high, high, high, 9), cap_bytes=cap, room=room)
    assert 0 <= found <= cap
    if high * min(cap, budget) / MIB <= room:
        assert found == cap
    elif found > ceiling.MIN_CAP_BYTES:
        assert high * found / MIB <= room + 1


def test_auto_takes_what_was_counted_and_the_setting_only_until_then() -> None:
    auto = LanceDBSettings(descriptor_mode="pinned", index_cache_size_bytes="auto", descriptors_per_mebibyte=110)
    guess = ceiling.cap_of(auto, limit=1024)
    few, many = (ceiling.cap_of(auto, limit=1024, learned=Slope(n, n, n, 9)) for n in (20.0, 300.0))
    assert many < guess < few <= ceiling.MAX_AUTO_BYTES


async def test_the_guard_learns_the_slope_lowers_a_cap_that_would_pin_too_much_and_keeps_what_it_learned(
    settings: Settings, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("everos_engine.loops.fd_guard.CLASSIFY_SECONDS", 0.0)
    given_cap = 16 * MIB
    lancedb = replace(
        settings.lancedb, descriptor_mode="pinned", index_cache_size_bytes=given_cap, descriptors_per_mebibyte=1
    )
    pinned = replace(settings, lancedb=lancedb)
    put(root, "users/u1/.atomic_facts/atomic_fact-2025-02-27.md", facts(fact(1, "heron")))
    async with open_engine(pinned, embedder=FakeEmbedder(), watching=False) as engine:
        await engine.settle()
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with open_reader(pinned) as engine:
        index, guard = engine.context.index, Guard(engine.context)
        kind = "atomic_fact"
        await index.keys(kind)  # opens the table
        for cycle in range(CYCLES):
            texts = [
                " ".join(f"w{(cycle * 7919 + row * 104729 + at * 31) % 5000}" for at in range(WORDS))
                for row in range(ROWS)
            ]
            rows = [
                Row("a.md", f"{cycle}-{row}", b"x", {"fact": f"heron {text}"}, None) for row, text in enumerate(texts)
            ]
            await index.commit(kind, rows, [])
            await index.optimize(kind)
            await index.search_text(kind, "heron", where="", limit=3)
            await guard.look()
        learned, shown = guard.slope, engine.context.fds["slope"]
        assert learned is not None
        assert shown["points"] == learned.points >= MIN_POINTS  # type: ignore[index]
        counted = (guard.classes["lance_index"] + guard.classes["deleted"]) / (index.session_bytes() / MIB)
        assert learned.low / 2 <= counted <= 2 * learned.high
        assert (index.cap_bytes, index.rotations) == (given_cap, 0)
        kept = await engine.context.database.aread(lambda tx: meta.get(tx, meta.SLOPE))
        assert slope.kept(kept) is not None
        others = guard.count() - guard.classes["lance_index"] - guard.classes["deleted"]
        resource.setrlimit(resource.RLIMIT_NOFILE, (2 * (others + int(learned.high * 4)), before[1]))  # room for 4 MiB
        try:
            await guard.look()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        assert ceiling.MIN_CAP_BYTES <= index.cap_bytes < given_cap
        assert index.rotations >= 1
        assert await index.search_text(kind, "heron", where="", limit=3)
