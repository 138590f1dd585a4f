"""No change stays claimed for the life of the process, whatever SQLite refuses in the meantime."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import apsw
import pytest
import trio
from loguru import logger

from derived import described, indexed
from everos_engine.engine import Engine, open_engine
from everos_engine.loops import worker
from everos_engine.settings import Settings, load
from everos_engine.stores import database as door
from everos_engine.stores import queue
from everos_engine.stores.conditions import kept
from everos_engine.testing import FakeEmbedder
from patience import HANG_SECONDS
from trapped_disk import TrappedDisk, trapped_disk
from writer import fact, facts, put

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

TROUBLES = ["full", "failing", "locked"]
DISKS: list[TrappedDisk] = []


class HeldUp(FakeEmbedder):
    """Answers nothing but the probe until ``go``; ``asked`` is set once somebody waits."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.go = trio.Event(), trio.Event()

    async def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        if any("word" in text for text in texts):
            self.asked.set()
            await self.go.wait()
        return await super().embed(texts)


@contextmanager
def event(word: str) -> Iterator[trio.Event]:
    """An event that is set when something is logged that begins with ``word``."""
    happened, token = trio.Event(), trio.lowlevel.current_trio_token()
    number = logger.add(
        lambda message: token.run_sync_soon(happened.set) if message.record["message"].startswith(word) else None,
        level="DEBUG",
    )
    try:
        yield happened
    finally:
        logger.remove(number)


@contextmanager
def trouble(kind: str, engine: Engine) -> Iterator[None]:
    """SQLite refuses every write for the length of the block."""
    if kind == "locked":
        other = apsw.Connection(str(engine.settings.engine_directory / "engine.db"))
        other.set_busy_timeout(60_000)
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")
        other.close()
        return
    (disk,) = DISKS
    disk.error = {"full": apsw.FullError, "failing": apsw.IOError}[kind]
    try:
        yield
    finally:
        disk.error = None


@pytest.fixture
def _disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(door, "BUSY_RETRIES", 1)
    monkeypatch.setattr(door, "BUSY_TIMEOUT_MILLISECONDS", 10)
    monkeypatch.setattr(worker, "MAX_DELAY_SECONDS", 0.2)
    with trapped_disk() as found:
        DISKS.append(found)
        yield
        DISKS.clear()


@pytest.fixture
def quiet(root: Path) -> Settings:
    chosen = {"memory.root": str(root), "watch.mode": "off", "scan_interval_seconds": 3600, "settle_milliseconds": 20}
    return load({**chosen, "worker_retry_backoff_seconds": 0.01}, environment={}, user_file=root / "none")


@pytest.mark.usefixtures("_disk")
@pytest.mark.parametrize("kind", TROUBLES)
async def test_changes_held_while_sqlite_refuses_every_write_are_indexed_when_it_takes_them_again(
    kind: str, quiet: Settings, root: Path
) -> None:
    for number in range(5):
        put(root, f"users/u1/.atomic_facts/{number}.md", facts(fact(number, f"word{number}")))
    embedder = HeldUp()
    embedder.go.set()
    async with open_engine(quiet, embedder=embedder) as engine:
        await engine.settle()
        embedder.go, embedder.asked = trio.Event(), trio.Event()
        for number in range(5):
            put(root, f"users/u1/.atomic_facts/{number}.md", facts(fact(number, f"another word{number}")))
        with trio.fail_after(HANG_SECONDS):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(engine.settle)
                await embedder.asked.wait()
                with event(worker.UNAVAILABLE) as said, trouble(kind, engine):
                    embedder.go.set()
                    await said.wait()
                    assert worker.UNAVAILABLE in engine.context.conditions.now
        with trio.fail_after(HANG_SECONDS):
            status = await engine.settle()
        assert (status.counts.pending, status.counts.processing, status.counts.done) == (0, 0, 5)
        assert worker.UNAVAILABLE not in engine.context.conditions.now
        assert await indexed(engine) == described(quiet)


@pytest.mark.parametrize("count", [1, 3])
async def test_a_claim_that_no_task_holds_is_handed_back(
    count: int, quiet: Settings, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the COMMIT of a claim fails after it took effect."""
    monkeypatch.setattr(worker, "REAP_SECONDS", 0.02)
    async with open_engine(quiet, embedder=FakeEmbedder()) as engine:
        await engine.settle()
        context = engine.context
        seen = [queue.Observation(f"users/u1/.atomic_facts/{n}.md", "atomic_fact", (1, 1, 1, 1)) for n in range(count)]

        def lose(tx: queue.Transaction) -> int:
            queue.record(tx, seen, source="watch", now_milliseconds=1)
            return len(queue.claim(tx, context.owner, limit=10, now_milliseconds=1))

        with trio.fail_after(HANG_SECONDS), event("cascade_recovered_orphan_processing count=") as recovered:
            assert await context.database.awrite(lose) == count
            await recovered.wait()
            status = await engine.settle()
        assert (status.counts.pending, status.counts.processing) == (0, 0)


@pytest.mark.usefixtures("_disk")
async def test_a_worker_that_starts_takes_back_what_the_one_before_it_held(quiet: Settings, root: Path) -> None:
    for number in range(3):
        put(root, f"users/u1/.atomic_facts/{number}.md", facts(fact(number, f"word{number}")))
    embedder = HeldUp()
    async with open_engine(quiet, embedder=embedder, watching=False) as engine:
        context = engine.context
        with trio.fail_after(HANG_SECONDS):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(engine.settle)
                await embedder.asked.wait()
                assert len(await context.database.aread(lambda tx: queue.claimed(tx, context.owner))) == 3
                async with trio.open_nursery() as second:  # the claims of the first are in no task's hands for this one
                    second.start_soon(worker.work, context)
                    with event("claims_taken_back count=3") as taken:
                        await taken.wait()
                    embedder.go.set()
                    await engine.settle()
                    second.cancel_scope.cancel()
        assert await indexed(engine) == described(quiet)


@pytest.mark.usefixtures("_disk")
async def test_a_condition_that_sqlite_refuses_is_kept_when_it_takes_it(quiet: Settings) -> None:
    async with open_engine(quiet, embedder=FakeEmbedder(), watching=False) as engine:
        notes = engine.context.conditions
        with trouble("full", engine):
            await notes.say("watch_failed", "a message", "a remedy")
        assert [note.code for note in await engine.context.database.aread(kept)] == []
        await notes.keep()
        assert [note.code for note in await engine.context.database.aread(kept)] == ["watch_failed"]
        with trouble("full", engine):
            await notes.over("watch_failed")
        await notes.keep()
        assert await engine.context.database.aread(kept) == []
