"""The engine: open the stores, check that they agree, and run the loops."""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar, cast

import trio
from loguru import logger

from everos_engine.embed import open_embedder
from everos_engine.embed.protocol import Embedder
from everos_engine.errors import Damaged, EngineError, Fatal, SettingsError, Transient, Unexpected, split_end, unwrap
from everos_engine.keys import key_of
from everos_engine.loops.acknowledge import retry_for_settings
from everos_engine.loops.compactor import compact, maintain
from everos_engine.loops.context import READER, Base, Context, base_now, now_milliseconds, wait_moved
from everos_engine.loops.deletion_guard import write_marker
from everos_engine.loops.erase import forget
from everos_engine.loops.fd_guard import guard
from everos_engine.loops.reconcile import audit, reconcile_tree
from everos_engine.loops.recovery import inspect, reconcile_index, repair_reads
from everos_engine.loops.requests import enqueue
from everos_engine.loops.scanner import AUDIT_FILES, scan
from everos_engine.loops.vectors import Vectors, open_vectors
from everos_engine.loops.watcher import watch
from everos_engine.loops.worker import work
from everos_engine.search import Filter, Mode, Result, check_question
from everos_engine.search import search as search_index
from everos_engine.settings import Settings
from everos_engine.stores import embeddings, held, ledger, meta, models, queue, reports
from everos_engine.stores.database import Database, Transaction, open_or_replace
from everos_engine.stores.held import Held
from everos_engine.stores.index import Index, open_index
from everos_engine.stores.reports import Counts, Outcome
from everos_engine.supervise import WITHIN_SECONDS, Health, keep, keep_open
from everos_engine.system import ceiling, descriptors, files, locks, private, slope, wake
from everos_engine.system.asyncio_thread import AsyncioThread, open_asyncio_thread
from everos_engine.system.control import serve_control
from everos_engine.system.instrument import LoopBlocks, watching_the_loop
from everos_engine.text import kinds

T = TypeVar("T")
CALL_PATIENCE_SECONDS = 30.0
"""How long a call waits for stores that are being opened again."""
CALL_TRIES = 3
REOPENED = "stores_reopened"
REOPENED_REMEDY = (
    "nothing is lost, and searches go on. If this comes again, look at the log for the error, and report it with "
    "`everos-engine doctor --bundle`"
)


SCHEMA_VERSION = 3
"""Version 2 was written by everos-engine 0.1.0."""
STORES = (queue, held, models, ledger)
"""The modules whose tables are in engine.db."""


@dataclass(frozen=True, slots=True)
class Status:
    """The queue, the rows per kind and the time of the last full scan (milliseconds since the epoch)."""

    counts: Counts
    rows: dict[str, int]
    last_scan_milliseconds: int | None
    held: list[Held]


class Engine:
    """A running engine. Get one from ``open_engine``. It stays the same object while its stores are opened again."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.last_context: Context | None = None
        self._calls: set[trio.CancelScope] = set()
        self._calls_gone = trio.Event()
        self.health = Health()
        self.base = base_now()

    @property
    def settings(self) -> Settings:
        """Return its settings."""
        return self._settings

    @property
    def context(self) -> Context:
        """Return the parts, for status lines and tests. They are replaced when the stores are opened again."""
        if self.last_context is None:
            raise Transient(self._closed_because())
        return self.last_context

    @contextmanager
    def spare(self) -> Iterator[None]:
        """Lend the spare descriptor for the length of the block, if there is one."""
        with nullcontext() if self.last_context is None else self.last_context.reserve.borrow():
            yield

    def snapshot(self) -> dict[str, object]:
        """Return what the control socket answers to "pulse": plain data, from memory."""
        told: dict[str, object] = {"pid": os.getpid()} if self.last_context is None else self.last_context.snapshot()
        return told | {"health": self.health.as_data()}

    @asynccontextmanager
    async def using(self, context: Context) -> AsyncIterator[None]:
        """Let searches use these stores for the length of the block. Calls that still run at its end are cancelled."""
        self.last_context = context
        self.health.state.value = "searching"
        try:
            yield
        finally:
            self.health.state.value = "closed"
            with trio.move_on_after(CALL_PATIENCE_SECONDS, shield=True):
                while self._calls:
                    self._calls_gone = trio.Event()
                    for scope in self._calls:
                        scope.cancel()
                    await self._calls_gone.wait()

    def serve(self) -> None:
        """Let every call through, because the loops run."""
        self.health.state.value = "serving"
        self.health.tried.set()

    async def _call(self, work: Callable[[Context], Awaitable[T]], *, needs_loops: bool = True) -> T:
        """Run ``work`` on the open stores, and again on the new ones if they are opened again meanwhile.

        Raises Transient if they do not open within CALL_PATIENCE_SECONDS.
        """
        fitting = {"serving", "ended"} if needs_loops else {"searching", "serving", "ended"}
        for _ in range(CALL_TRIES):
            with trio.move_on_after(CALL_PATIENCE_SECONDS):
                await self.health.state.wait_value(lambda state: state in fitting)
            if self.health.state.value not in fitting:
                break
            if self.health.state.value == "ended":
                raise EngineError("this engine has ended: open another with open_engine")
            context = self.context
            with trio.CancelScope() as scope:
                self._calls.add(scope)
                try:
                    return await work(context)
                except Damaged:
                    if context.database.on_damage is None or context.database.damage is None:
                        raise
                finally:
                    self._calls.discard(scope)
                    if not self._calls:
                        self._calls_gone.set()
            with trio.move_on_after(CALL_PATIENCE_SECONDS):  # the supervisor closes these stores now
                await self.health.state.wait_value(
                    lambda state, context=context: state not in fitting or self.last_context is not context
                )
        raise Transient(self._closed_because())

    def _closed_because(self) -> str:
        reason = f" after an error ({self.health.reason})" if self.health.reason else ""
        return f"the engine opens its stores again{reason}: try again in a moment, `everos-engine status` says more"

    async def settle(self) -> Status:
        """Return when every change on disk at the time of the call is searchable or failed.

        Raises Transient if the tree cannot be scanned, or a table cannot be looked at, and TableDamaged if one may not
        be made again yet.
        """
        return await self._call(_settle)

    async def sync(self, paths: Sequence[str] = ()) -> list[Outcome]:
        """Queue ``paths`` in any state, or all that a full scan finds changed, and wait.

        Returns where each path stands.

        Raises OutsideRoot for a path outside the root or without a kind.
        """

        async def work(context: Context) -> list[Outcome]:
            if not paths:
                await _settle(context)
                return await context.database.aread(reports.troubled)
            if (not_in_step := await inspect(context)) is not None:
                raise not_in_step
            keys, lsn = await enqueue(context.settings, context.database, paths, threads=context.threads)
            await _reach(context, lsn)
            return await context.database.aread(lambda tx: reports.standing(tx, keys))

        return await self._call(work)

    async def reach(self, lsn: int) -> None:
        """Wait until every change up to ``lsn`` is applied or dead-lettered.

        Raises Unavailable once the embedding service has been down for ``embedder.outage_patience_seconds``, and
        Transient if a deletion waits because the root looks wrong. The changes continue to wait.
        """
        await self._call(lambda context: _reach(context, lsn))

    async def search(
        self, query: str, *, mode: Mode | None = None, only: Filter | None = None, limit: int = 10
    ) -> list[Result]:
        """Return the best ``limit`` entries. ``mode`` None is hybrid with an embedding service, else full text.

        Hybrid falls back to words, with a warning in the log, if the embedder refuses the query, fails or takes too
        long. Raises BadQuestion for a limit below 1 or above 1,000, and for an unknown mode or kind.
        """
        filtered = only or Filter()
        check_question(mode, filtered.kind, limit)

        async def work(context: Context) -> list[Result]:
            chosen = mode or default_mode(context.settings)
            parts = (context.index, context.database, context.vectors, query)
            try:
                return await search_index(*parts, mode=chosen, only=filtered, limit=limit)
            except Unexpected as error:
                if context.owner == READER:
                    raise Unexpected(
                        f"{error}: `everos-engine sync` checks the tables, and makes a damaged one again"
                    ) from error
                with trio.CancelScope(shield=True):
                    if not await repair_reads(context, query):
                        raise
            return await search_index(*parts, mode=chosen, only=filtered, limit=limit)

        return await self._call(work, needs_loops=False)

    async def status(self) -> Status:
        """Return everything in numbers, of one moment."""
        return await self._call(lambda context: context.database.aread(status_of), needs_loops=False)

    async def release(self) -> list[Outcome]:
        """Apply every held deletion. Returns what became of each."""
        released: list[str] = []

        async def work(context: Context) -> list[Outcome]:
            write_marker(context.settings)
            released.extend(
                await context.database.awrite(lambda tx: held.release(tx, now_milliseconds=now_milliseconds()))
            )
            await _reach(context, await context.database.aread(queue.newest))
            return await context.database.aread(lambda tx: reports.outcomes(tx, released))

        return await self._call(work)

    async def forget(self, paths: Sequence[str] = (), *, text: str | None = None, delete: bool = False) -> int:
        """Bring the index in step, then leave no byte below it of what is to be forgotten.

        That is what these files held, ``text``, and any older state. ``delete`` deletes the files first. Returns by how
        many bytes the index is smaller. Raises BadQuestion if a file still holds it, and OutsideRoot for a path outside
        the root or without a kind.
        """

        async def work(context: Context) -> int:
            keys = [key_of(context.settings, path) for path in paths]
            for key in keys if delete else ():
                with suppress(FileNotFoundError):
                    os.unlink(files.path_of(context.settings.root, key))
            await _settle(context)
            if keys:
                _, lsn = await enqueue(context.settings, context.database, paths, threads=context.threads)
                await _reach(context, lsn)
            return await forget(context, keys, text)

        return await self._call(work)

    async def audit(self) -> list[str]:
        """Read every file again and index what differs from what was indexed, with any fingerprint.

        Returns its paths.
        """

        async def work(context: Context) -> list[str]:
            after, found = "", list[str]()
            while True:
                _, queued, end = await audit(
                    context.settings, context.database, context.threads, after=after, limit=AUDIT_FILES
                )
                found += queued
                if end is None:
                    break
                after = end
            await _reach(context, await context.database.aread(queue.newest))
            return found

        return await self._call(work)

    async def compact(self) -> None:
        """Optimize the tables that are due for it. A watching engine does so by itself, in pauses."""
        await self._call(compact)

    async def fix(self) -> list[Outcome]:
        """Try every retryable failure again. Returns what became of each."""
        tried: list[str] = []

        async def work(context: Context) -> list[Outcome]:
            tried.extend(
                await context.database.awrite(lambda tx: queue.requeue_failed(tx, now_milliseconds=now_milliseconds()))
            )
            await _reach(context, await context.database.aread(queue.newest))
            return await context.database.aread(lambda tx: reports.outcomes(tx, tried))

        return await self._call(work)


async def _settle(context: Context) -> Status:
    found = await reconcile_tree(
        context.settings,
        context.database,
        source="sync",
        deletion_guard=context.deletion_guard,
        threads=context.threads,
    )
    context.progress.last_scan_milliseconds = now_milliseconds()
    if (not_in_step := await inspect(context)) is not None:
        raise not_in_step
    await _reach(context, found.lsn)
    while (again := await context.database.aread(queue.rebuilding)) is not None:
        await _reach(context, again)  # a table was recreated meanwhile, and what it held is not searchable before that
    return await context.database.aread(status_of)


async def _reach(context: Context, lsn: int) -> None:
    patience_seconds = context.settings.embedder.outage_patience_seconds
    context.wake_up()
    while True:
        seen = context.applied.value
        if await context.database.aread(lambda tx: queue.reached(tx, lsn)):
            return
        context.vectors.raise_if_down(longer_than_seconds=patience_seconds)
        if (why := await context.database.aread(lambda tx: queue.refused(tx, lsn))) is not None:
            raise Transient(why)
        await wait_moved(context.applied, seen, at_most_seconds=context.settings.worker_poll_interval_seconds)


@asynccontextmanager
async def open_engine(
    settings: Settings, *, embedder: Embedder | None = None, watching: bool = True
) -> AsyncIterator[Engine]:
    """Own a memory root: open its stores, repair what a crash left, and run the loops until the block ends.

    ``embedder`` replaces the one that the settings name. ``watching=False`` runs the worker alone, for a one-shot sync,
    and only if there is a root. A watching engine waits for stores that cannot be opened now, and opens them again if a
    loop keeps failing. A command that works on the root now is waited for, ``lock_wait_seconds`` at most. Raises
    AlreadyRunning if another engine owns it, Fatal and SettingsError as they come, and an error of the block as it is.
    """
    check_root(settings, may_make=watching)
    if not settings.root.exists():
        logger.warning("root_made root={}", settings.root)
    engine, of_block = Engine(settings), None
    try:
        async with _owned(settings, watching=watching) as owner, trio.open_nursery() as nursery:
            await nursery.start(_serve, engine, embedder, owner, watching)
            try:
                yield engine
            except BaseException as error:
                of_block = error
                raise
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        ended_by = _of_block(group, of_block) or unwrap(group)
        if ended_by is group:
            raise
    else:
        return
    finally:
        engine.health.state.value = "ended"
    raise ended_by  # outside of the handler: the error keeps the cause and the context that it had


def _of_block(group: BaseExceptionGroup[BaseException], error: BaseException | None) -> BaseException | None:
    """Return the block's own error, as it was raised. None for a cancellation, and if the engine failed first."""
    if error is None or split_end(error)[1] is None or group.subgroup((Fatal, SettingsError)) is not None:
        return None
    return error


async def _serve(
    engine: Engine,
    embedder: Embedder | None,
    owner: str,
    watching: bool,  # noqa: FBT001 - trio passes arguments by their place
    *,
    task_status: trio.TaskStatus[None],
) -> None:
    """Keep the stores open and the loops running. Reports as started once the loops run for the first time."""
    settings, health = engine.settings, engine.health

    waiting = [task_status.started]

    async def epoch(wait_seconds: float) -> None:
        async with (
            _stores(settings, embedder, owner, blocks, base=engine.base, before=engine.last_context) as context,
            engine.using(context),
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(_end_if_damaged, context.database)
            await _open_conditions(context, health)
            await trio.sleep(wait_seconds)
            context.deletion_guard.arm()
            await _recover(context)
            await retry_for_settings(context)
            await reconcile_index(context)
            for name, loop in _loops(context, watching=watching).items():
                nursery.start_soon(partial(keep, name, loop), name=name)
            engine.serve()
            if waiting:
                waiting.pop()()
            if health.reopenings:
                await trio.sleep(WITHIN_SECONDS)
                health.reason = ""
                with suppress(Transient):
                    await context.conditions.over(REOPENED)

    with watching_the_loop() as blocks:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(keep, "control", partial(_control, engine)), name="control")
            await keep_open(health, epoch, forever=watching)


async def _end_if_damaged(database: Database) -> None:
    """Raise Damaged as soon as any statement finds the database damaged.

    It may have been in any task, and its error may have been handled.
    """
    found, token = trio.Event(), trio.lowlevel.current_trio_token()

    def report() -> None:
        with suppress(trio.RunFinishedError):
            token.run_sync_soon(found.set)

    database.on_damage = report
    if database.damage is None:
        await found.wait()
    if database.damage is not None:
        raise database.damage


async def _open_conditions(context: Context, health: Health) -> None:
    """Forget the conditions of an earlier process, and report if the stores had to be opened again.

    A disk that accepts no writes now stops nothing. The conditions stay in memory, and the snapshot has them.
    """
    with suppress(Transient):
        await context.conditions.begin()
        await context.report_replaced()
    if health.reopenings:
        message = f"the stores were opened again {health.reopenings} times, last after: {health.reason}"
        with suppress(Transient):
            await context.conditions.say(REOPENED, message, REOPENED_REMEDY)


def _loops(context: Context, *, watching: bool) -> dict[str, Callable[[], Awaitable[None]]]:
    """Return the loops by their names."""
    loops: dict[str, Callable[[Context], Awaitable[None]]] = {
        "work": work,
        "wake": _wake_ups,
        "guard": partial(guard, proving=watching),
    }
    if watching:
        loops |= {"watch": watch, "scan": scan, "maintain": maintain}
    return {name: partial(loop, context) for name, loop in loops.items()}


@asynccontextmanager
async def _stores(
    settings: Settings, embedder: Embedder | None, owner: str, blocks: LoopBlocks, *, base: Base, before: Context | None
) -> AsyncIterator[Context]:
    """Yield the stores of one root, open for the length of the block.

    The shared values are those of the context ``before``.
    """
    is_first = before is None
    async with open_asyncio_thread() as bridge, _open_vectors(settings, embedder, connecting=is_first) as vectors:
        with _databases(settings, may_replace=True) as database:
            ceiling.check_limit(descriptors.limits()[1])
            index = _index(settings, bridge, database)
            if before is None:
                context = Context(settings, database, index, vectors, owner, blocks=blocks, base=base)
            else:
                context = replace(before, database=database, index=index, vectors=vectors)
            index.on_exhausted = context.exhaust
            try:
                yield context
            finally:
                index.close()


@asynccontextmanager
async def open_reader(settings: Settings) -> AsyncIterator[Engine]:
    """Yield the stores without the loops, for a search while an engine is running.

    Raises SettingsError if there is no root.

    An index that may not be written, as on a read-only mount, is read as it is.
    """
    check_root(settings)
    readonly = not files.may_write(settings.engine_directory)
    if readonly:
        settings = replace(settings, lancedb=replace(settings.lancedb, descriptor_mode="reopen"))
    engine = Engine(settings)
    async with open_asyncio_thread() as bridge, _open_vectors(settings, None, readonly=readonly) as vectors:
        with _databases(settings, readonly=readonly) as database:
            index = _index(settings, bridge, database)
            try:
                async with engine.using(Context(settings, database, index, vectors, READER, base=engine.base)):
                    yield engine
            finally:
                index.close()


def default_mode(settings: Settings) -> Mode:
    """Return hybrid if an embedding service answers, and full text with the local model or none."""
    return "hybrid" if settings.embedder.kind == "http" else "fts"


def check_root(settings: Settings, *, may_make: bool = False) -> None:
    """Raise SettingsError if the memory root is not a directory. With ``may_make`` a missing one will be made.

    Only `run` makes a root. One made in passing blocks the place of the one that is mounted or moved back later.
    """
    root = settings.root
    if root.is_dir():
        return
    if os.path.lexists(root):
        raise SettingsError(f"memory.root={root} is no directory: name one, with --root or EVEROS_ROOT")
    if not may_make:
        raise SettingsError(
            f"memory.root={root} does not exist: mount it or move it back, name another with --root or EVEROS_ROOT, or "
            "make a new one with `everos-engine run --create`"
        )


def open_queue(settings: Settings, *, may_replace: bool = False) -> Database:
    """Open the queue and ledger of a root, and upgrade a file of an older version.

    While an engine runs, only the engine does that, with ``may_replace``. It also sets a damaged file aside and begins
    an empty one, because everything in it can be made again from markdown. Raises SettingsError if there is no root,
    and creates none.
    """
    check_root(settings)
    private.make(settings)
    may_replace = may_replace or locks.running_pid(settings.engine_lock) is None
    path = settings.engine_database
    opened = partial(
        Database,
        path,
        schema="".join(store.SCHEMA for store in STORES),
        version=SCHEMA_VERSION,
        upgrades={SCHEMA_VERSION: "".join(store.UPGRADE_TO_3 for store in STORES)},
        may_replace=may_replace,
    )
    return open_or_replace(path, opened) if may_replace else opened()


def _read_queue(settings: Settings) -> Database:
    """Open the queue of an index that may not be written.

    Raises SettingsError and Fatal if there is nothing to read.
    """
    path = settings.engine_database
    if not (path.exists() and settings.lancedb_directory.is_dir()):
        raise SettingsError(
            f"{settings.root} was never indexed, and it may not be written here: index it where it may be, or run the command as its owner"
        )
    database = Database(path, readonly=True)
    if (found := database.version()) != SCHEMA_VERSION:
        database.close()
        raise Fatal(
            f"{path} has version {found}, this engine reads version {SCHEMA_VERSION}, and it may not be written here: run this version where it may be"
        )
    return database


def status_of(tx: Transaction) -> Status:
    """Return the status, from the queue's database alone."""
    last_scan = meta.get(tx, "last_scan")
    scanned = None if last_scan is None else int(last_scan)
    return Status(reports.counts(tx), ledger.rows_per_kind(tx), scanned, held.counts(tx))


@asynccontextmanager
async def _owned(settings: Settings, *, watching: bool) -> AsyncIterator[str]:
    directory = settings.engine_directory
    settings.root.mkdir(parents=True, exist_ok=True)
    private.make(settings, whole=True)
    owner = f"{os.getpid()}-{secrets.token_hex(4)}"
    lock = locks.EngineLock(settings.engine_lock, ends_by_itself=not watching)
    await lock.take(wait_seconds=settings.lock_wait_seconds)
    try:
        with locks.OwnerLock(directory / "owners", owner):
            yield owner
    finally:
        lock.__exit__()


@asynccontextmanager
async def _open_vectors(
    settings: Settings, embedder: Embedder | None, *, connecting: bool = False, readonly: bool = False
) -> AsyncIterator[Vectors]:
    if not readonly:
        private.make(settings)
    cache = embeddings.Cache(settings.embeddings_database)
    try:
        async with (
            open_embedder(settings.embedder, connecting=connecting and embedder is None) as configured,
            open_vectors(cache, embedder or configured, settings.embedder) as vectors,
        ):
            yield vectors
    finally:
        cache.close()


@contextmanager
def _databases(settings: Settings, *, may_replace: bool = False, readonly: bool = False) -> Iterator[Database]:
    database = _read_queue(settings) if readonly else open_queue(settings, may_replace=may_replace)
    try:
        yield database
    finally:
        database.close()


def _index(settings: Settings, bridge: AsyncioThread, database: Database) -> Index:
    """Return the index. Its cap is checked against the descriptor limit, which also bounds its parallel reads."""
    descriptors.raise_soft_limit()
    limit, lancedb, directory = descriptors.limits()[1], settings.lancedb, settings.lancedb_directory
    learned = slope.kept(database.read(lambda tx: meta.get(tx, meta.SLOPE)))
    cap_bytes = ceiling.cap_of(lancedb, limit=limit, learned=learned)
    reads = ceiling.reads_of(lancedb, limit=limit)
    fitting = replace(lancedb, concurrent_reads=reads)
    return open_index(bridge, fitting, kinds=kinds.KINDS, directory=directory, cap_bytes=cap_bytes)


async def _recover(context: Context) -> None:
    """Take back what dead engines held, and try again what waited for something outside itself.

    We hold the engine's lock, but a command may be running. The reason of a wait may be gone, because of other settings
    for instance, and then no event says so.
    """

    def reap() -> int:
        others = context.database.read(queue.owners)
        dead = locks.dead_owners(context.settings.engine_directory / "owners", others)
        return context.database.write(lambda tx: queue.recover(tx, dead)) if dead else 0

    def try_again(tx: Transaction) -> None:
        queue.hurry(tx, *queue.OUTSIDE)
        meta.note_outage(tx, None, now_milliseconds=now_milliseconds())

    count = await trio.to_thread.run_sync(reap, limiter=context.database.limiter)
    if count:
        logger.info("cascade_recovered_orphan_processing count={}", count)
    await context.database.awrite(try_again)


async def _control(engine: Engine) -> None:
    """Answer other processes, from memory except for a search. "look" asks for a full scan now.

    It does not listen before the stores were open once, or could not be opened.
    """
    await engine.health.tried.wait()

    def look() -> dict[str, object]:
        engine.context.look_again()
        return {"looking": True}

    def history() -> dict[str, object]:
        return engine.context.history()

    def answer(question: str) -> dict[str, object]:
        known = {"pulse": engine.snapshot, "history": history, "look": look}
        if question not in known:
            return {"error": f"unknown question {question!r}: ask one of {', '.join(known)}"}
        try:
            return known[question]()
        except EngineError as error:
            return {"error": str(error)}

    async def look_up(asked: Mapping[str, object]) -> dict[str, object]:
        only = Filter(*(_word(asked, name) for name in ("kind", "owner", "app", "project")))
        mode, limit = cast("Mode | None", _word(asked, "mode")), cast("int", asked.get("limit", 10))
        try:
            found = await engine.search(_word(asked, "query") or "", mode=mode, only=only, limit=limit)
        except EngineError as error:
            return {"error": str(error)}
        return {"results": [result.as_data() for result in found]}

    async def forget_it(asked: Mapping[str, object]) -> dict[str, object]:
        paths, text = asked.get("paths"), _word(asked, "text")
        if not isinstance(paths, list):
            return {"error": "paths must be a list"}
        try:
            saved = await engine.forget([str(path) for path in paths], text=text, delete=asked.get("delete") is True)
        except EngineError as error:
            return {"error": str(error)}
        return {"saved_bytes": saved}

    socket, slow = engine.settings.control_socket, {"search": look_up, "forget": forget_it}
    await serve_control(socket, answer, slow=slow, spare=engine.spare)


def _word(asked: Mapping[str, object], name: str) -> str | None:
    word = asked.get(name)
    return word if isinstance(word, str) else None


async def _wake_ups(context: Context) -> None:
    """Receive datagrams of other processes, which queued something."""
    async with wake.open_wake(context.settings.wake_socket) as messages:
        async for _ in messages.messages():
            context.wake_up()


__all__ = ["Engine", "Status", "default_mode", "open_engine", "open_reader"]
