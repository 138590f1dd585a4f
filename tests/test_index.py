from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import trio
import trio.lowlevel
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from everos_engine.errors import SettingsError, Transient, UnknownOutcome
from everos_engine.settings import DescriptorMode, EmbedderSettings, LanceDBSettings, Settings, load
from everos_engine.stores.index import Index, open_index
from everos_engine.stores.lance import Model, Row
from everos_engine.stores.session_pool import SessionPool
from everos_engine.system import descriptors
from everos_engine.system.asyncio_thread import open_asyncio_thread
from everos_engine.system.ceiling import BASE_DESCRIPTORS, cap_of, ceiling_of, own_of, reads_of

MIB = 1 << 20
WORDS = [f"word{number}" for number in range(20_000)]
"""Many, so that the index files are too large to be held whole: only then is a descriptor kept."""
NO_VECTORS = Model("none", 0)


@dataclass(frozen=True)
class Letter:
    name: str = "letter"
    columns = {"text": "string"}  # noqa: RUF012 - read only
    fts_columns = ("text",)


@asynccontextmanager
async def opened(
    directory: Path, mode: DescriptorMode = "reopen", *, keep_versions_seconds: float = 600.0
) -> AsyncIterator[Index]:
    settings = LanceDBSettings(descriptor_mode=mode, keep_versions_seconds=keep_versions_seconds)
    async with open_asyncio_thread() as bridge:
        index = open_index(bridge, settings, kinds={"letter": Letter()}, directory=directory, cap_bytes=16 * MIB)
        try:
            yield index
        finally:
            index.close()


def row(number: int, text: str) -> Row:
    return Row("a.md", f"e{number}", bytes([number % 256]), {"text": text}, None)


async def pinned(directory: Path, expected: int) -> int:
    """Index descriptors that stay: a reader that is just being closed on a thread of Lance does not count."""
    for _ in range(500):
        found = descriptors.classify(descriptors.limits()[0], lancedb=directory, engine=directory / "none")
        if found["lance_index"] + found["deleted"] <= expected:
            break
        await trio.sleep(0.01)
    return found["lance_index"] + found["deleted"]


async def found(index: Index, word: str) -> set[str]:
    return {hit.entry_id for hit in await index.search_text("letter", word, where="", limit=1000)}


async def test_no_query_fails_and_none_is_blind_while_the_session_is_rotated(tmp_path: Path) -> None:
    async with opened(tmp_path / "lance") as index:
        await index.create("letter", NO_VECTORS)
        await index.commit("letter", [row(n, "heron") for n in range(20)], [])
        stop = trio.Event()

        async def ask() -> None:
            while not stop.is_set():
                assert len(await found(index, "heron")) >= 20

        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(ask)
            for number in range(40):
                assert index.rotate() == number + 1
                await index.commit("letter", [row(100 + number, "heron")], [])
                assert f"e{100 + number}" in await found(index, "heron")
            stop.set()
        assert index.rotations == 40
        assert index.sessions_open == 1


async def test_what_is_written_across_a_rotation_is_seen_by_the_new_session(tmp_path: Path) -> None:
    async with opened(tmp_path / "lance") as index:
        await index.create("letter", NO_VECTORS)
        for number in range(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(index.commit, "letter", [row(number, f"word{number}")], [])
                for _ in range(number % 5):
                    await trio.sleep(0.001)
                index.rotate()
                nursery.start_soon(found, index, "anything")  # opens the table on the new Session, perhaps too early
                nursery.start_soon(index.optimize, "letter") if number % 7 == 3 else None
            assert await found(index, f"word{number}") == {f"e{number}"}
        assert len(await index.rows("letter")) == 30


async def test_writers_of_several_generations_at_once_leave_nobody_blind(tmp_path: Path) -> None:
    chance = random.Random(0)
    async with opened(tmp_path / "lance") as index:
        await index.create("letter", NO_VECTORS)

        async def later(function: Callable[..., Awaitable[object]], *args: object) -> None:
            await trio.sleep(chance.random() / 50)
            await function(*args)

        async def rotate() -> None:
            index.rotate()

        for number in range(25):
            async with trio.open_nursery() as nursery:
                for writer in (1000, 2000):
                    nursery.start_soon(later, index.commit, "letter", [row(writer + number, f"word{number}")], [])
                nursery.start_soon(later, index.optimize, "letter")
                for _ in range(3):
                    nursery.start_soon(later, rotate)
                    nursery.start_soon(later, found, index, "anything")
            assert await found(index, f"word{number}") == {f"e{1000 + number}", f"e{2000 + number}"}
        assert index.sessions_open == 1


@pytest.mark.parametrize("mode", ["reopen", "pinned"])
async def test_only_the_plain_path_pins_indexes_and_a_rotation_lets_go_of_all_of_them(
    tmp_path: Path, mode: DescriptorMode
) -> None:
    directory = tmp_path / "lance"
    async with opened(directory, mode) as index:
        await index.create("letter", NO_VECTORS)
        counts, chance = [], random.Random(0)
        for number, expected in enumerate([1, 3, 7, 11] if mode == "pinned" else [0, 0, 0, 0], start=1):
            rows = [row(number * 100 + n, " ".join(["heron", *chance.choices(WORDS, k=100)])) for n in range(20)]
            await index.commit("letter", rows, [])
            await index.optimize("letter")
            await found(index, "heron")
            counts.append(await pinned(directory, expected))
        assert counts == ([1, 3, 7, 11] if mode == "pinned" else [0, 0, 0, 0])
        index.rotate()
        assert await pinned(directory, 0) == 0
        assert len(await found(index, "heron")) == 80
        assert index.session_bytes() > 0


async def test_an_optimize_of_a_table_that_is_written_without_pause_has_commits_wait_and_succeeds(
    tmp_path: Path,
) -> None:
    async with opened(tmp_path / "lance") as index:
        await index.create("letter", NO_VECTORS)
        for number in range(10):
            await index.commit("letter", [row(number, "heron")], [])
        stop = trio.Event()

        async def write() -> None:
            number = 0
            while not stop.is_set():
                await index.commit("letter", [row(number % 10, f"heron {number}")], [])
                number += 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            for _ in range(5):
                await index.optimize("letter", alone=True)
            stop.set()
        assert len(await found(index, "heron")) == 10


async def test_what_a_voided_optimize_left_behind_goes_with_the_next_that_is_alone(tmp_path: Path) -> None:
    directory = tmp_path / "lance"

    def indexes() -> int:
        return len(list((directory / "letter.lance" / "_indices").iterdir()))

    async with opened(directory) as index:
        await index.create("letter", NO_VECTORS)
        await index.commit("letter", [row(n, "heron") for n in range(300)], [])
        voided = 0

        async def optimize() -> None:
            nonlocal voided
            try:
                await index.optimize("letter", alone=False)
            except Transient:
                voided += 1

        for number in range(100):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(optimize)
                for other in range(4):
                    await index.commit("letter", [row((4 * number + other) % 300, f"heron {number}")], [])
            if voided >= 3:
                break
        assert voided >= 3
        assert indexes() > 2
        index.settings = replace(index.settings, keep_versions_seconds=0.0)
        await index.optimize("letter", alone=True)
        assert indexes() <= 2, "today's, and the one that it replaced a moment ago"
        assert len(await found(index, "heron")) == len(await index.rows("letter"))


async def test_a_table_is_begun_anew_only_when_an_optimize_that_removes_stray_files_is_done(tmp_path: Path) -> None:
    async with opened(tmp_path / "lance") as index:
        await index.create("letter", NO_VECTORS)
        await index.commit("letter", [row(n, " ".join(WORDS[n : n + 50])) for n in range(5000)], [])
        ended = []

        async def optimize() -> None:
            await index.optimize("letter", alone=True)
            ended.append("optimize")

        async def create() -> None:
            await index.create("letter", NO_VECTORS)
            ended.append("create")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(optimize)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(create)
        assert ended == ["optimize", "create"]
        await index.commit("letter", [row(1, "otter")], [])
        assert await found(index, "otter") == {"e1"}


async def test_files_that_a_write_cut_off_at_its_deadline_may_yet_commit_are_left_alone(tmp_path: Path) -> None:
    directory = tmp_path / "lance"
    async with opened(directory, keep_versions_seconds=0.0) as index:
        await index.create("letter", NO_VECTORS)
        await index.commit("letter", [row(0, "heron")], [])
        stray = directory / "letter.lance" / "data" / "stray.lance"
        stray.write_bytes(b"half")
        index.settings = replace(index.settings, write_deadline_seconds=0.0)
        with pytest.raises(UnknownOutcome):
            await index.commit("letter", [row(1, "heron")], [])
        index.settings = replace(index.settings, write_deadline_seconds=60.0)
        await index.optimize("letter", alone=True)
        assert stray.exists()
    async with opened(directory, keep_versions_seconds=0.0) as index:
        assert "e0" in await found(index, "heron")
        await index.optimize("letter", alone=True)
        assert not stray.exists()


async def test_a_table_is_due_once_a_fifth_of_it_is_in_no_index_whoever_wrote_it(tmp_path: Path) -> None:
    async with opened(tmp_path / "lance") as index:
        await index.create("letter", NO_VECTORS)
        await index.commit("letter", [row(n, "heron") for n in range(63)], [])
        assert not index.wants_optimize("letter")
        await index.commit("letter", [row(n, "heron") for n in range(63, 1000)], [])
        assert index.wants_optimize("letter")
    async with opened(tmp_path / "lance") as index:
        assert len(await found(index, "heron")) == 1000
        assert index.wants_optimize("letter")
        await index.optimize("letter")
        assert not index.wants_optimize("letter")
        await index.commit("letter", [row(1000 + n, "otter") for n in range(199)], [])
        assert not index.wants_optimize("letter")
    async with opened(tmp_path / "lance") as index:
        assert len(await found(index, "otter")) == 199
        assert not index.wants_optimize("letter")
        await index.commit("letter", [row(2000, "otter")], [])
        assert index.wants_optimize("letter")


async def test_no_more_reads_run_at_once_than_allowed_and_under_pressure_one_always_does(tmp_path: Path) -> None:
    async with opened(tmp_path / "lance") as index:
        await index.create("letter", NO_VECTORS)
        await index.commit("letter", [row(n, "heron") for n in range(20)], [])
        running: list[int] = []
        read, running_now = index.bridge.read, 0

        async def counted(*args: object, **named: float) -> object:
            nonlocal running_now
            running_now += 1
            running.append(running_now)
            try:
                return await read(*args, **named)  # type: ignore[arg-type]
            finally:
                running_now -= 1

        index.bridge.read = counted  # type: ignore[method-assign]
        for share, most in ((1.0, index.settings.concurrent_reads), (0.5, 2), (0.0, 1), (1.0, 4)):
            index.narrow(share)
            running.clear()
            async with trio.open_nursery() as nursery:
                for _ in range(40):
                    nursery.start_soon(found, index, "heron")
            assert len(running) == 40
            assert max(running) == most


def test_a_reader_keeps_its_session_until_it_is_done() -> None:
    sessions = SessionPool()
    with sessions.using() as early, sessions.using():
        early.session = object()
        sessions.rotate()
        assert (sessions.open, early.session is None) == (2, False)
        with sessions.using() as late:
            assert late is sessions.current
            assert late is not early
    assert (sessions.open, early.session) == (1, None)
    sessions.rotate()
    assert sessions.open == 1


@pytest.mark.parametrize("source", ["environment", "file"])
def test_a_cap_of_the_metadata_cache_is_refused_with_the_reason(tmp_path: Path, source: str) -> None:
    environment = {"EVEROS_LANCEDB__METADATA_CACHE_SIZE_BYTES": "8MB"} if source == "environment" else {}
    file = tmp_path / "settings.toml"
    file.write_text("[lancedb]\nmetadata_cache_size_bytes = 8388608\n" if source == "file" else "")
    with pytest.raises(SettingsError, match="has no effect on the number of file descriptors"):
        load({"memory.root": str(tmp_path)}, environment=environment, user_file=file)


@pytest.mark.parametrize(("text", "expected"), [("8MB", 8 * MIB), ("0", 0), ("auto", "auto"), ("1048576", MIB)])
def test_the_cap_takes_sizes_and_auto(tmp_path: Path, text: str, expected: object) -> None:
    environment = {"EVEROS_LANCEDB__INDEX_CACHE_SIZE_BYTES": text}
    settings = load({"memory.root": str(tmp_path)}, environment=environment, user_file=tmp_path / "none")
    assert settings.lancedb.index_cache_size_bytes == expected


@pytest.mark.parametrize("text", ["much", "-1"])
def test_a_cap_that_is_no_size_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(SettingsError, match="index_cache_size_bytes"):
        load({"lancedb.index_cache_size_bytes": text}, environment={}, user_file=tmp_path / "none")


def test_a_cap_whose_ceiling_does_not_fit_is_refused_with_the_arithmetic() -> None:
    settings = LanceDBSettings(descriptor_mode="pinned", index_cache_size_bytes=16 * MIB, descriptors_per_mebibyte=18)
    assert cap_of(settings, limit=1024) == 16 * MIB
    with pytest.raises(SettingsError, match=r"needs up to 352 .* 704, to be safe. RLIMIT_NOFILE is 256: lower the cap"):
        cap_of(settings, limit=256)
    assert cap_of(LanceDBSettings(index_cache_size_bytes=16 * MIB), limit=64) == 16 * MIB  # reopen pins none


def test_the_ceiling_counts_reads_pinned_indexes_and_the_services_connections() -> None:
    lancedb = LanceDBSettings(index_cache_size_bytes=16 * MIB, descriptors_per_mebibyte=18)
    plain = Settings(lancedb=lancedb)
    served = Settings(lancedb=lancedb, embedder=EmbedderSettings(kind="http", concurrency=8))
    assert ceiling_of(plain, cap_bytes=16 * MIB, pinned=False, limit=64) == BASE_DESCRIPTORS
    assert ceiling_of(plain, cap_bytes=16 * MIB, pinned=False, limit=1024) == BASE_DESCRIPTORS + 2 * 8
    assert ceiling_of(plain, cap_bytes=16 * MIB, pinned=True, limit=1024) == BASE_DESCRIPTORS + 2 * 8 + 16 * 18
    assert ceiling_of(served, cap_bytes=16 * MIB, pinned=False, limit=64) == BASE_DESCRIPTORS + 18


@given(limit=st.integers(64, 1 << 20), wanted=st.integers(1, 1000))
def test_no_more_reads_run_at_once_than_the_limit_has_room_for(limit: int, wanted: int) -> None:
    settings = LanceDBSettings(concurrent_reads=wanted)
    reads = reads_of(settings, limit=limit)
    assert 1 <= reads <= wanted
    room = (limit - BASE_DESCRIPTORS) // 8
    assert reads == min(wanted, max(1, room - 1))  # one place is the writer's
    assert own_of(settings, limit=limit) <= limit


@pytest.mark.parametrize("limit", [64, 96, 128, 256, 1024, 20_000, 1 << 20])
def test_auto_takes_the_largest_cap_whose_ceiling_fits(limit: int) -> None:
    auto = LanceDBSettings(descriptor_mode="pinned", index_cache_size_bytes="auto")
    cap = cap_of(auto, limit=limit)
    assert 0 <= cap <= 64 * MIB
    if cap:
        assert 2 * ceiling_of(Settings(lancedb=auto), cap_bytes=cap, pinned=True, limit=limit) <= limit + 2
