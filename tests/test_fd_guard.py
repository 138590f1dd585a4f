from __future__ import annotations

import json
import mmap
import os
import random
import resource
import shutil
import subprocess
import sys
import time
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loguru import logger

from everos_engine.engine import Engine, open_engine, open_reader
from everos_engine.errors import SettingsError
from everos_engine.loops import context
from everos_engine.loops.context import HISTORY, History, Point
from everos_engine.loops.fd_guard import Guard, share_of_descriptors
from everos_engine.loops.fd_self_test import self_test
from everos_engine.loops.memory_guard import MIN_SHARE
from everos_engine.settings import DescriptorMode, EmbedderSettings, LanceDBSettings, Settings, load
from everos_engine.stores import meta
from everos_engine.system import ceiling, descriptors
from everos_engine.system.asyncio_thread import open_asyncio_thread
from everos_engine.system.control import ask
from everos_engine.testing import FakeEmbedder
from patience import HANG_SECONDS, until
from writer import fact, facts, put

HERE = Path(__file__).parent
EXAMPLE = HERE.parent / "examples" / "memory"
HOARD_SECONDS = 2.0
MAX_ROUNDS = 20
SEARCHES = 100
WORDS = [f"word{number}" for number in range(20_000)]


class Starving:
    """An engine in another process, at a low limit of descriptors; see starving.py for what it understands."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def hear(self, word: str) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the engine died: see its log above"
        found: dict[str, Any] = json.loads(line)
        assert found["word"] == word
        return found


@contextmanager
def starving(root: Path, *, limit: int, **flags: object) -> Iterator[Starving]:
    given = {"memory.root": os.fspath(root), "worker_max_retry": 1, "worker_retry_backoff_seconds": 0.05, **flags}
    command = [sys.executable, os.fspath(HERE / "starving.py"), str(limit), json.dumps(given)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Starving(process)
        except BaseException:
            process.kill()
            raise
    assert process.returncode == 0


def snapshot(root: Path) -> dict[str, Any]:
    found = ask(root / ".index/engine/control.sock", "pulse", deadline_seconds=HANG_SECONDS)
    assert found is not None
    return found


def notes(root: Path) -> set[str]:
    return {note["code"] for note in snapshot(root)["watch"]["conditions"]}


def day(number: int) -> str:
    return f"users/u1/.atomic_facts/atomic_fact-2025-02-{number:02d}.md"


def edit(root: Path, *, seconds: float, turns: int = 40) -> None:
    """Edits, new files, deletions and renames, spread over so many seconds."""
    chance = random.Random(0)
    for acquire in range(turns):
        words = " ".join(chance.choices(WORDS, k=200))
        put(root, day(1 + acquire % 20), facts(fact(1, f"heron {acquire} {words}"), fact(2, f"otter {acquire}")))
        if acquire % 7 == 6:
            (root / day(1 + (acquire * 3) % 20)).unlink(missing_ok=True)
        if acquire % 11 == 10:
            (root / day(1 + acquire % 20)).rename(root / day(25))
        time.sleep(seconds / turns)


@pytest.mark.parametrize("tables", ["there before", "made meanwhile"])
def test_without_any_descriptor_for_a_while_nothing_is_lost_and_nothing_fails(
    root: Path, tables: str, capfd: pytest.CaptureFixture[str]
) -> None:
    if tables == "there before":
        for number in range(1, 10):
            put(root, day(number), facts(fact(1, f"heron {number}")))
    with starving(root, limit=160, scan_interval_seconds=2) as engine:
        engine.hear("ready")
        engine.tell("hoard")
        engine.hear("full")
        edit(root, seconds=HOARD_SECONDS)
        until(lambda: "descriptors_exhausted" in notes(root))  # asked without a descriptor to spare
        engine.tell("release")
        released = engine.hear("released")
        assert released["answered"] >= 1
        assert released["cpu_share"] < 0.7  # it waits, and does not spin
        edit(root, seconds=0.5)
        until(lambda: "descriptors_exhausted" not in notes(root))
        engine.tell("end")
        end = engine.hear("end")
    log = capfd.readouterr().err
    assert end["failures"] == {}
    assert end["agrees"]
    assert (end["pending"], end["rows"] > 10, end["exhaustions"] > 0) == (0, True, True)
    assert "descriptors_exhausted_over" in log
    assert "loop_died" not in log
    assert "deletions_held" not in log  # a root that cannot be looked at now is not one that is gone


def test_at_a_limit_of_64_all_is_indexed_and_searched_under_edits_below_48_descriptors(root: Path) -> None:
    shutil.copytree(EXAMPLE, root, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".index"))
    for number in range(1, 21):
        put(root, day(number), facts(*(fact(entry, f"the user met heron {entry}") for entry in range(30))))
    with starving(root, limit=64) as engine:
        engine.hear("ready")
        engine.tell(f"search {SEARCHES}")
        edit(root, seconds=5)
        assert engine.hear("searched")["hits"] > SEARCHES
        seen = snapshot(root)
        engine.tell("end")
        end = engine.hear("end")
    assert (end["failures"], end["pending"], end["agrees"], end["exhaustions"]) == ({}, 0, True, 0)
    assert end["peak"] <= 48 <= seen["fds"]["soft_budget"]
    assert (seen["pressure"], end["rotations"]) == (1, 0)  # it is neither slowed nor rotated for what it always holds


def test_pinned_indexes_are_kept_under_budget_by_rotation(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pinned = {
        "lancedb.descriptor_mode": "pinned",
        "lancedb.descriptors_per_mebibyte": 1,
        "lancedb.index_cache_size_bytes": 12 << 20,
        "lancedb.concurrent_reads": 2,
    }
    eager = {"lancedb.optimize_after_commits": 1, "lancedb.optimize_idle_seconds": 0}
    with starving(root, limit=128, **pinned, **eager) as engine:
        engine.hear("ready")
        for _ in range(MAX_ROUNDS):  # each optimize pins more; how many there are in a second is the machine's
            engine.tell("search 20")
            edit(root, seconds=4, turns=60)
            engine.hear("searched")
            if snapshot(root)["fds"]["rotations"]:
                break
        engine.tell("end")
        end = engine.hear("end")
    assert (end["failures"], end["pending"], end["agrees"]) == ({}, 0, True)
    assert end["rotations"] >= 1
    assert end["peak"] < 128
    assert "session_rotated reason=over_budget before=" in capfd.readouterr().err


@pytest.mark.parametrize(("mode", "claimed", "holds"), [
    ("reopen", "reopen", True), ("pinned", "pinned", True), ("pinned", "reopen", False),
])  # fmt: skip
async def test_the_self_test_tells_whether_the_law_of_the_mode_holds(
    tmp_path: Path, mode: DescriptorMode, claimed: DescriptorMode, *, holds: bool
) -> None:
    (tmp_path / "self-test-stale").mkdir()
    async with open_asyncio_thread() as bridge:
        law = await self_test(bridge, LanceDBSettings(descriptor_mode=mode), directory=tmp_path, claimed=claimed)
    assert (law.holds, law.bound) == (holds, 0 if claimed == "reopen" else 11)
    assert law.pinned in ({0} if mode == "reopen" else range(7, 12))  # 7 stay; a reader may be closing beside them
    assert list(tmp_path.iterdir()) == []


async def test_a_broken_law_is_said_and_a_proven_one_is_proven_once(settings: Settings) -> None:
    async with open_engine(settings, embedder=FakeEmbedder(), watching=False) as engine:
        context, index = engine.context, engine.context.index
        index.settings = replace(
            index.settings, descriptor_mode="pinned"
        )  # as if the library pinned in spite of the URI
        await Guard(context).learn_slope()
        note = context.conditions.now["descriptor_law_broken"]
        assert "pins 7 index descriptors where lancedb.descriptor_mode=reopen allows 0" in note.message
        index.settings = settings.lancedb
        guard = Guard(context)
        await guard.learn_slope()
        await guard.look()
        assert "descriptor_law_broken" not in context.conditions.now
        assert context.fds["law"]["holds"]  # type: ignore[index]
        kept = await context.database.aread(lambda tx: meta.get(tx, "descriptor_law"))
        await Guard(context).learn_slope()
        assert await context.database.aread(lambda tx: meta.get(tx, "descriptor_law")) == kept


@asynccontextmanager
async def quiet(settings: Settings) -> AsyncIterator[Engine]:
    """What an engine has indexed, with no loop running: nobody but the test's own guard looks or rotates."""
    async with open_engine(settings, embedder=FakeEmbedder(), watching=False) as engine:
        await engine.settle()
    async with open_reader(settings) as reader:
        yield reader


async def test_a_session_that_holds_too_many_bytes_is_rotated_once_in_a_while(settings: Settings, root: Path) -> None:
    tight = replace(settings, lancedb=replace(settings.lancedb, session_most_bytes=1))
    put(root, day(1), facts(fact(1, "heron")))
    async with quiet(tight) as engine:
        guard = Guard(engine.context)
        for _ in range(3):
            assert len(await engine.search("heron")) == 1
            await guard.look()
        assert engine.context.index.rotations == 1
        assert len(await engine.search("heron")) == 1


async def test_a_session_that_holds_too_many_bytes_is_rotated_over_the_soft_budget_too(
    settings: Settings, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("everos_engine.loops.fd_guard.BYTES_REST_SECONDS", 0.0)
    tight = replace(settings, lancedb=replace(settings.lancedb, session_most_bytes=1))
    put(root, day(1), facts(fact(1, "heron")))
    async with quiet(tight) as engine:
        guard = Guard(engine.context)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        held = [os.open(os.devnull, os.O_RDONLY) for _ in range(100)]
        resource.setrlimit(resource.RLIMIT_NOFILE, (guard.count() * 3 // 2, hard))
        try:
            for acquire in range(1, 5):  # none of them frees a descriptor, and none has to
                assert len(await engine.search("heron")) == 1
                await guard.look()
                assert guard.count() > engine.context.fds["soft_budget"]
                assert engine.context.index.rotations == acquire
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for handle in held:
                os.close(handle)


@given(
    limit=st.integers(ceiling.MIN_LIMIT, 1 << 20),
    others=st.integers(0, 200),
    reads=st.integers(1, 64),
    soft_share=st.floats(0.1, 0.95),
    http=st.booleans(),
)
def test_budgets_lie_above_what_is_always_open_as_far_as_the_limit_has_room(
    limit: int, others: int, reads: int, soft_share: float, *, http: bool
) -> None:
    lancedb = LanceDBSettings(soft_budget_share=soft_share, hard_budget_share=0.95, concurrent_reads=reads)
    settings = Settings(lancedb=lancedb, embedder=EmbedderSettings(kind="http" if http else "local"))
    soft, hard = ceiling.budgets_of(settings, limit=limit, others=others)
    held = ceiling.ceiling_of(settings, cap_bytes=0, pinned=False, limit=limit) + max(
        0, others - ceiling.OTHERS_DESCRIPTORS
    )
    assert 0 < soft < hard < limit
    assert soft >= min(held, limit - 8)
    assert soft >= min(int(limit * soft_share), limit - 8)


@pytest.mark.skipif(descriptors.memory() is None, reason="needs /proc")
async def test_memory_over_its_ceiling_slows_work_rotates_and_is_reported_until_it_is_free_again(
    settings: Settings, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("everos_engine.loops.memory_guard.OVER_SECONDS", 0.0)
    monkeypatch.setattr("everos_engine.loops.fd_guard.TRIM_SECONDS", 0.0)
    small = replace(settings, embedder=EmbedderSettings(kind="none"))
    put(root, day(1), facts(fact(1, "heron")))
    async with quiet(small) as engine:
        context, guard = engine.context, Guard(engine.context)
        assert len(await engine.search("heron")) == 1
        await guard.look()
        shown = context.fds["memory"]
        assert (context.pressure.value, context.index.rotations) == (1, 0)
        assert shown["rss_bytes"] < shown["soft_bytes"] < shown["ceiling_bytes"]  # type: ignore[index]
        assert sum(shown["parts"].values()) == shown["ceiling_bytes"]  # type: ignore[index]
        hoard = mmap.mmap(-1, shown["ceiling_bytes"])  # type: ignore[index]
        for page in range(0, len(hoard), mmap.PAGESIZE):
            hoard[page] = 1
        for _ in range(3):
            await guard.look()
        assert context.pressure.value == MIN_SHARE  # slow, and never at a stop
        assert context.index.rotations == 1
        assert "MiB are resident" in context.conditions.now["memory_over_ceiling"].message
        assert len(await engine.search("heron")) == 1
        hoard.close()
        for _ in range(2):
            await guard.look()
        assert context.pressure.value == 1
        assert "memory_over_ceiling" not in context.conditions.now


@given(rows=st.integers(0, 10**6), dimension=st.integers(0, 2048), budget=st.integers(0, 1 << 30))
def test_the_ceiling_of_memory_grows_with_each_of_its_parts(rows: int, dimension: int, budget: int) -> None:
    settings = Settings(lancedb=LanceDBSettings(session_most_bytes=budget))
    found = ceiling.memory_ceiling(settings, rows=rows, dimension=dimension)
    more = Settings(lancedb=LanceDBSettings(session_most_bytes=2 * budget))
    assert found.soft_bytes < found.ceiling_bytes == sum(asdict(found).values())
    assert found.session >= budget
    assert ceiling.memory_ceiling(more, rows=rows, dimension=dimension).ceiling_bytes >= found.ceiling_bytes
    assert ceiling.memory_ceiling(settings, rows=rows + 1, dimension=dimension).ceiling_bytes > found.ceiling_bytes


async def test_memory_of_an_old_session_goes_back_once_its_last_reader_is_done(
    settings: Settings, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trims: list[int] = []
    monkeypatch.setattr("everos_engine.system.memory.trim", lambda: trims.append(len(trims)))
    tight = replace(settings, lancedb=replace(settings.lancedb, session_most_bytes=1))
    put(root, day(1), facts(fact(1, "heron")))
    async with quiet(tight) as engine:
        guard, index = Guard(engine.context), engine.context.index
        await guard.look()
        monkeypatch.setattr("everos_engine.loops.fd_guard.TRIM_SECONDS", float("inf"))  # but for what growth asks
        del trims[:]
        assert len(await engine.search("heron")) == 1
        with index._sessions.using():
            await guard.look()
            assert (index.rotations, index.sessions_open, trims) == (1, 2, [])
        for _ in range(3):
            await guard.look()
        assert (index.sessions_open, trims) == (1, [0])


async def test_the_guard_counts_what_is_open_and_tells_the_classes_apart_as_soon_as_the_count_jumps(
    settings: Settings, root: Path
) -> None:
    async with quiet(settings) as engine:
        guard = Guard(engine.context)
        await guard.look()
        with ExitStack() as stack:
            for _ in range(500):
                stack.callback(os.close, os.open(os.devnull, os.O_RDONLY))
            await guard.look()
        after = engine.context.fds
    assert after["count"] >= 500  # type: ignore[operator]
    assert after["classes"]["other"] >= 500  # type: ignore[index]


def test_the_history_holds_the_last_hour_in_the_memory_of_its_first_point() -> None:
    history = History()
    points = [Point(number, number % 50, number << 20, number % 3 / 2, number << 33) for number in range(HISTORY + 7)]
    for number, point in enumerate(points[:3]):
        assert list(history) == points[:number]
        history.append(point)
    tracemalloc.start()
    try:
        for point in points[3:]:
            history.append(point)
        own = tracemalloc.Filter(inclusive=True, filename_pattern=context.__file__)  # other threads are at work too
        kept = tracemalloc.take_snapshot().filter_traces([own])
        assert sum(trace.size for trace in kept.traces) < 1000
    finally:
        tracemalloc.stop()
    assert list(history) == points[-HISTORY:]
    assert len(history) == HISTORY


async def test_the_history_is_kept_and_written(settings: Settings, tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    noted = replace(settings, lancedb=replace(settings.lancedb, history_file=str(path)))
    async with open_engine(noted, embedder=FakeEmbedder(), watching=False) as engine:
        guard = Guard(engine.context)
        with guard.opened():
            for _ in range(3):
                await guard.look()
        assert engine.context.history()["columns"] == [
            "at_milliseconds", "descriptors", "rss_bytes", "pressure", "session_bytes"
        ]  # fmt: skip
        assert len(engine.context.fds_history) >= 3
    lines = [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()]
    assert len(lines) >= 3
    assert all(line["descriptors"] > 0 and line["rss_bytes"] > 0 and line["limit"] > 0 for line in lines)


@pytest.mark.parametrize("place", ["a directory", "below a file", "a pipe", "the full device", "a NUL"])
async def test_a_history_file_that_cannot_be_written_is_a_condition(
    place: str, settings: Settings, tmp_path: Path
) -> None:
    good, path = tmp_path / "good.jsonl", tmp_path / "history.jsonl"
    if place == "a directory":
        path.mkdir()
    elif place == "below a file":
        good.write_text("")
        path = good / "history.jsonl"
    elif place == "a pipe":
        os.mkfifo(path)
    elif place == "the full device":
        path.symlink_to("/dev/full")
    else:
        path = tmp_path / "a\0b"
    noted = replace(settings, lancedb=replace(settings.lancedb, history_file=str(path)))
    async with open_engine(noted, embedder=FakeEmbedder(), watching=False) as engine:
        guard = Guard(engine.context)
        with guard.opened():
            await guard.look()
            note = engine.context.conditions.now["history_file_failed"]
            assert repr(str(path)) in note.message
            assert "lancedb.history_file" in note.remedy
            assert len(engine.context.fds_history) >= 1
            if place == "the full device":  # a disk that has room again
                path.unlink()
                await guard.look()
                await guard.look()
                assert "history_file_failed" not in engine.context.conditions.now
                assert [json.loads(line)["limit"] for line in path.read_text(encoding="ascii").splitlines()]
        assert engine.health.reopenings == 0


@given(st.integers(0, 2000), st.integers(1, 1000), st.integers(0, 1000))
def test_the_share_falls_from_all_to_nothing_between_the_budgets(count: int, soft: int, more: int) -> None:
    hard = soft + more
    share = share_of_descriptors(count, soft=soft, hard=hard)
    assert 0 <= share <= 1
    assert share >= share_of_descriptors(count + 1, soft=soft, hard=hard)
    assert (share == 1.0) == (count <= soft)
    assert count < hard or share == 0 or count <= soft


def test_a_hard_budget_below_the_soft_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"hard_budget_share=0\.3 is below lancedb\.soft_budget_share=0\.5"):
        load({"lancedb.hard_budget_share": 0.3}, environment={}, user_file=tmp_path / "none")


async def test_the_law_found_is_logged(settings: Settings) -> None:
    lines: list[str] = []
    sink = logger.add(lambda line: lines.append(str(line)), level="INFO")
    try:
        async with open_engine(settings, embedder=FakeEmbedder(), watching=False) as engine:
            await Guard(engine.context).learn_slope()
    finally:
        logger.remove(sink)
    assert any("descriptor_law mode=reopen holds=True pinned=0" in line for line in lines)
