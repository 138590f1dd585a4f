"""The engine: opens the stores, checks that they agree, and runs the loops."""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import trio
from loguru import logger

from everos_engine.embed import open_embedder
from everos_engine.errors import EngineError, SettingsError, Transient, Unavailable
from everos_engine.loops.agree import agree
from everos_engine.loops.asked import enqueue
from everos_engine.loops.brake import lay_marker
from everos_engine.loops.desk import Desk, now_milliseconds, wait_moved
from everos_engine.loops.guard import guard
from everos_engine.loops.maintain import compact, maintain
from everos_engine.loops.observe import audit, sweep
from everos_engine.loops.scan import AUDIT_FILES, scan
from everos_engine.loops.vectors import Vectors, open_vectors
from everos_engine.loops.watch import watch
from everos_engine.loops.work import work
from everos_engine.search import Filter, Mode, Result, check_question
from everos_engine.search import search as search_index
from everos_engine.stores import census, embeddings, held, ledger, meta, queue
from everos_engine.stores.database import Database
from everos_engine.stores.index import Index, open_index
from everos_engine.supervise import alone, keep
from everos_engine.system import ceiling, fds, locks, wake
from everos_engine.system.asyncio_thread import AsyncioThread, open_asyncio_thread
from everos_engine.system.control import serve_control
from everos_engine.system.instrument import watching_the_loop
from everos_engine.text import kinds

if TYPE_CHECKING:
    from everos_engine.embed.protocol import Embedder
    from everos_engine.settings import Settings
    from everos_engine.stores.census import Counts, Outcome
    from everos_engine.stores.database import Transaction
    from everos_engine.stores.held import Held


SCHEMA_VERSION = 3
"""Version 2 was written by everos-engine 0.1.0."""
STORES = (queue, held, ledger)
"""The modules whose tables are in engine.db."""


@dataclass(frozen=True, slots=True)
class Status:
    """The queue, the rows per kind and the time of the last sweep (milliseconds since the epoch)."""

    counts: Counts
    rows: dict[str, int]
    last_scan_milliseconds: int | None
    held: list[Held]


class Engine:
    """A running engine; get one from ``open_engine``."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    @property
    def settings(self) -> Settings:
        """What it runs with."""
        return self._desk.settings

    @property
    def desk(self) -> Desk:
        """The parts, for status lines and tests."""
        return self._desk

    async def settle(self) -> Status:
        """Return when every change on disk at the time of the call is searchable or failed.

        Raises Transient if the tree cannot be swept.
        """
        desk = self._desk
        found = await sweep(desk.settings, desk.database, source="sync", brake=desk.brake)
        self._desk.progress.last_scan_milliseconds = now_milliseconds()
        await self.reach(found.lsn)
        while (again := await desk.database.aread(queue.rebuilding)) is not None:
            await self.reach(again)  # a table was begun anew meanwhile: what it held is not searchable before that
        return await self.status()

    async def sync(self, paths: Sequence[str] = ()) -> list[Outcome]:
        """Queue ``paths`` whatever their state, or all that a sweep finds changed; wait; where each path stands.

        Raises OutsideRoot for a path outside the root or of no kind.
        """
        if not paths:
            await self.settle()
            return await self._desk.database.aread(census.failed)
        keys, lsn = await trio.to_thread.run_sync(
            enqueue, self._desk.settings, self._desk.database, paths, limiter=self._desk.database.limiter
        )
        await self.reach(lsn)
        return await self._desk.database.aread(lambda tx: census.outcomes(tx, keys))

    async def reach(self, lsn: int) -> None:
        """Wait until every change up to ``lsn`` is applied or dead-lettered.

        Raises Unavailable once the embedding service has been down for ``embedder.outage_patience_seconds``, and Transient where a
        deletion waits because the root looks wrong; the changes wait on.
        """
        patience_seconds = self._desk.settings.embedder.outage_patience_seconds
        self._desk.wake_up()
        while True:
            seen = self._desk.applied.value
            if await self._desk.database.aread(queue.watermark) >= lsn:
                return
            self._desk.vectors.raise_if_down(longer_than_seconds=patience_seconds)
            if (why := await self._desk.database.aread(lambda tx: queue.refused(tx, lsn))) is not None:
                raise Transient(why)
            await wait_moved(self._desk.applied, seen, at_most_seconds=self._desk.settings.worker_poll_interval_seconds)

    async def search(
        self, query: str, *, mode: Mode | None = None, only: Filter | None = None, limit: int = 10
    ) -> list[Result]:
        """The best ``limit`` entries; ``mode`` None is hybrid with an embedding service that answers, else full text.

        Raises BadQuestion for a limit below 1, a mode or a kind there is none of.
        """
        desk = self._desk
        check_question(mode, (only or Filter()).kind, limit)
        chosen = mode or default_mode(desk.settings)
        parts = (desk.index, desk.database, desk.vectors, query)
        try:
            return await search_index(*parts, mode=chosen, only=only or Filter(), limit=limit)
        except Unavailable as error:
            if mode is not None:
                raise
            logger.warning("search_without_vectors error={!r}", str(error))
            return await search_index(*parts, mode="fts", only=only or Filter(), limit=limit)

    async def status(self) -> Status:
        """Everything in numbers, of one moment."""
        return await self._desk.database.aread(status_of)

    async def release(self) -> list[Outcome]:
        """Apply every held deletion, and say what became of each."""
        lay_marker(self._desk.settings)
        paths = await self._desk.database.awrite(lambda tx: held.release(tx, now_milliseconds=now_milliseconds()))
        await self.reach(await self._desk.database.aread(queue.newest))
        return await self._desk.database.aread(lambda tx: census.outcomes(tx, paths))

    async def audit(self) -> list[str]:
        """Read every file again and index what differs from what was indexed, whatever its fingerprint; its paths."""
        desk, after, found = self._desk, "", list[str]()
        while True:
            _, queued, end = await trio.to_thread.run_sync(
                lambda start=after: audit(desk.settings, desk.database, after=start, limit=AUDIT_FILES),  # type: ignore[misc]  # a default binds the value of this turn
                limiter=desk.database.limiter,
            )
            found += queued
            if end is None:
                break
            after = end
        await self.reach(await desk.database.aread(queue.newest))
        return found

    async def compact(self) -> None:
        """Optimize the tables that are due for it; a watching engine does so by itself, in pauses."""
        await compact(self._desk)

    async def fix(self) -> list[Outcome]:
        """Re-queue every failed retryable=TRUE change with a fresh lsn, drain once, and say what became of each."""
        paths = await self._desk.database.awrite(
            lambda tx: queue.requeue_failed(tx, now_milliseconds=now_milliseconds())
        )
        await self.reach(await self._desk.database.aread(queue.newest))
        return await self._desk.database.aread(lambda tx: census.outcomes(tx, paths))


@asynccontextmanager
async def open_engine(
    settings: Settings, *, embedder: Embedder | None = None, watching: bool = True
) -> AsyncIterator[Engine]:
    """Own a memory root: open its stores, heal what a crash left, and run the loops until the block ends.

    ``embedder`` replaces the one the settings name; ``watching=False`` runs the worker alone, for a one-shot sync, and only
    where there is a root. Raises AlreadyRunning where another engine owns it, Fatal and SettingsError as they come.
    """
    check_root(settings, may_make=watching)
    if not settings.root.exists():
        logger.warning("root_made root={}", settings.root)
    try:
        async with (
            _owned(settings) as owner,
            open_asyncio_thread() as bridge,
            _open_vectors(settings, embedder) as vectors,
        ):
            with _databases(settings, may_replace=True) as database, watching_the_loop() as blocks:
                ceiling.check_limit(fds.limits()[1])
                index = _index(settings, bridge)
                desk = Desk(settings, database, index, vectors, owner, blocks=blocks)
                index.on_exhausted = desk.exhaust
                try:
                    desk.brake.arm()
                    await desk.notes.begin()
                    await _recover(desk)
                    await agree(desk)
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(keep, "work", lambda: work(desk))
                        nursery.start_soon(_wake_ups, desk)
                        nursery.start_soon(keep, "guard", lambda: guard(desk, proving=watching))
                        nursery.start_soon(keep, "control", lambda: _control(desk))
                        if watching:
                            nursery.start_soon(keep, "watch", lambda: watch(desk))
                            nursery.start_soon(keep, "scan", lambda: scan(desk))
                            nursery.start_soon(keep, "maintain", lambda: maintain(desk))
                        yield Engine(desk)
                        nursery.cancel_scope.cancel()
                finally:
                    index.close()
    except BaseExceptionGroup as group:
        error = alone(group)
        if error is group:
            raise
        raise error from None


@asynccontextmanager
async def open_reader(settings: Settings) -> AsyncIterator[Engine]:
    """The stores without the loops, for searching beside a running engine. Raises SettingsError where there is no root."""
    check_root(settings)
    async with open_asyncio_thread() as bridge, _open_vectors(settings, None) as vectors:
        with _databases(settings) as database:
            index = _index(settings, bridge)
            try:
                yield Engine(Desk(settings, database, index, vectors, "reader"))
            finally:
                index.close()


def default_mode(settings: Settings) -> Mode:
    """Hybrid where an embedding service answers; full text with the local model or none."""
    return "hybrid" if settings.embedder.kind == "http" else "fts"


def check_root(settings: Settings, *, may_make: bool = False) -> None:
    """Raises SettingsError where the memory root is no directory; ``may_make``: one that is not there yet will be made.

    Only `run` makes a root: one made in passing stands in the way of the one that is mounted or moved back later.
    """
    root = settings.root
    if root.is_dir():
        return
    if os.path.lexists(root):
        message = f"memory.root={root} is no directory: name one, with --root or EVEROS_ROOT"
        raise SettingsError(message)
    if not may_make:
        message = (
            f"memory.root={root} does not exist: mount it or move it back, name another with --root or EVEROS_ROOT, or "
            "begin a new one with `everos-engine run`"
        )
        raise SettingsError(message)


def open_queue(settings: Settings, *, may_replace: bool = False) -> Database:
    """Open the queue and ledger of a root, and bring a file of an older version up to date.

    While an engine runs, only the engine does that, with ``may_replace``. Raises SettingsError if there is no root, and
    creates none.
    """
    check_root(settings)
    settings.engine_directory.mkdir(parents=True, exist_ok=True)
    may_replace = may_replace or locks.running_pid(settings.engine_directory / "engine.lock") is None
    return Database(
        settings.engine_directory / "engine.db",
        schema="".join(store.SCHEMA for store in STORES),
        version=SCHEMA_VERSION,
        upgrades={SCHEMA_VERSION: "".join(store.UPGRADE_TO_3 for store in STORES)},
        may_replace=may_replace,
    )


def status_of(tx: Transaction) -> Status:
    """The status, from the queue's database alone."""
    last_scan = meta.get(tx, "last_scan")
    scanned = None if last_scan is None else int(last_scan)
    return Status(census.counts(tx), ledger.rows_per_kind(tx), scanned, held.counts(tx))


@asynccontextmanager
async def _owned(settings: Settings) -> AsyncIterator[str]:
    directory = settings.engine_directory
    directory.mkdir(parents=True, exist_ok=True)
    owner = f"{os.getpid()}-{secrets.token_hex(4)}"
    with locks.EngineLock(directory / "engine.lock"), locks.OwnerLock(directory / "owners", owner):
        yield owner


@asynccontextmanager
async def _open_vectors(settings: Settings, embedder: Embedder | None) -> AsyncIterator[Vectors]:
    settings.engine_directory.mkdir(parents=True, exist_ok=True)
    path = settings.engine_directory / "embeddings.db"
    cache = Database(path, schema=embeddings.SCHEMA, cache_kibibytes=embeddings.PAGES_KIBIBYTES)
    try:
        async with (
            open_embedder(settings.embedder) as configured,
            open_vectors(cache, embedder or configured, settings.embedder) as vectors,
        ):
            yield vectors
    finally:
        cache.close()


@contextmanager
def _databases(settings: Settings, *, may_replace: bool = False) -> Iterator[Database]:
    database = open_queue(settings, may_replace=may_replace)
    try:
        yield database
    finally:
        database.close()


def _index(settings: Settings, bridge: AsyncioThread) -> Index:
    """The index, its cap checked against the descriptor limit, and no more reads at once than that has room for."""
    fds.raise_soft_limit()
    limit, lancedb, directory = fds.limits()[1], settings.lancedb, settings.lancedb_directory
    cap_bytes, reads = ceiling.cap_of(lancedb, limit=limit), ceiling.reads_of(lancedb, limit=limit)
    fitting = replace(lancedb, concurrent_reads=reads)
    return open_index(bridge, fitting, kinds=kinds.KINDS, directory=directory, cap_bytes=cap_bytes)


async def _recover(desk: Desk) -> None:
    """Take back what dead engines held: we hold the engine's lock, but a CLI may live."""

    def reap() -> int:
        others = desk.database.read(queue.owners)
        dead = locks.dead_owners(desk.settings.engine_directory / "owners", others)
        return desk.database.write(lambda tx: queue.recover(tx, dead)) if dead else 0

    count = await trio.to_thread.run_sync(reap, limiter=desk.database.limiter)
    if count:
        logger.info("cascade_recovered_orphan_processing count={}", count)


async def _control(desk: Desk) -> None:
    """Answers to other processes, from memory but for a search; "look" asks for a sweep now."""

    def look() -> dict[str, object]:
        desk.look_again()
        return {"looking": True}

    def answer(question: str) -> dict[str, object]:
        known = {"pulse": desk.pulse, "history": desk.history, "look": look}
        if question in known:
            return known[question]()
        return {"error": f"unknown question {question!r}: ask one of {', '.join(known)}"}

    async def look_up(asked: Mapping[str, object]) -> dict[str, object]:
        only = Filter(*(_word(asked, name) for name in ("kind", "owner", "app", "project")))
        mode, limit = cast("Mode | None", _word(asked, "mode")), asked.get("limit")
        try:
            found = await Engine(desk).search(
                _word(asked, "query") or "", mode=mode, only=only, limit=limit if isinstance(limit, int) else 10
            )
        except EngineError as error:
            return {"error": str(error)}
        return {"results": [result.as_data() for result in found]}

    socket, slow = desk.settings.control_socket, {"search": look_up}
    await serve_control(socket, answer, slow=slow, spare=desk.reserve.lend)


def _word(asked: Mapping[str, object], name: str) -> str | None:
    word = asked.get(name)
    return word if isinstance(word, str) else None


async def _wake_ups(desk: Desk) -> None:
    """Datagrams of other processes: they queued something."""
    async with wake.open_wake(desk.settings.engine_directory / "wake.sock") as messages:
        async for _ in messages.messages():
            desk.wake_up()


__all__ = ["Engine", "Status", "default_mode", "open_engine", "open_reader"]
