"""The index: tables, commits, searches, and a Session that can be rotated below them.

There is one table per kind, and one commit per kind and batch.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import trio
from lancedb import AsyncConnection, AsyncTable
from numpy.typing import NDArray

from everos_engine.errors import Exhausted, Unexpected, UnknownOutcome
from everos_engine.settings import LanceDBSettings
from everos_engine.settings.paths import SET_ASIDE
from everos_engine.stores import lance, versions
from everos_engine.stores.lance import ForeignTable, Hit, Model, Row, TableKind, Unrecognised
from everos_engine.stores.session_pool import PooledSession, SessionPool
from everos_engine.stores.versions import Version

T = TypeVar("T")
MERGE_ROWS = 2048
MIN_OPTIMIZE_ROWS = 64
"""Fewer rows are read one by one as fast as they are looked up."""
DELETE_KEYS = 1000
EXHAUSTED_PAUSE_SECONDS = 0.1
"""The folder next to the tables that keeps the newest damaged copy of each."""
READERS_LOOK_SECONDS = 0.02


class Bridge(Protocol):
    """Run lancedb's coroutines on their own event loop."""

    async def read(self, function: Callable[..., Awaitable[T]], *args: object, deadline_seconds: float) -> T:
        """Run a read, which can be cancelled."""

    async def write(self, function: Callable[..., Awaitable[T]], *args: object, deadline_seconds: float) -> T:
        """Run a write, shielded. Past its deadline the outcome is unknown and Transient is raised."""


@dataclass(slots=True)
class _TableState:
    """What is known of a table in any Session. ``current`` is False for one of an older schema.

    ``commits`` and ``rows`` were made since the last optimize. ``indexed`` are the rows that its full-text indexes
    cover. ``files`` are the stamps of its files at the last look, and ``pruned`` says that an optimize may have removed
    some since.
    """

    incarnation: str
    model: str
    dimension: int
    commits: int = 0
    rows: int = 0
    indexed: int = 0
    current: bool = True
    files: dict[str, int] = field(default_factory=dict)
    pruned: bool = False


class Found(NamedTuple):
    """A table on disk: its identity, the model of its vectors, and its newest version."""

    incarnation: str
    model: str
    version: Version


@dataclass(slots=True)
class Index:
    """All tables of one memory root. Open it with ``open_index``.

    ``on_exhausted`` is called when LanceDB found no file descriptor. Without it the Session is rotated.
    """

    bridge: Bridge
    settings: LanceDBSettings
    kinds: Mapping[str, TableKind]
    directory: Path
    cap_bytes: int
    on_exhausted: Callable[[], object] | None = None
    _sessions: SessionPool = field(default_factory=SessionPool)
    _states: dict[str, _TableState] = field(default_factory=dict)
    _moved: dict[str, int] = field(default_factory=dict)
    _unmade: set[str] = field(default_factory=set)
    _turns: dict[str, trio.Lock] = field(default_factory=dict)
    _compactions: dict[str, trio.Lock] = field(default_factory=dict)
    doubted: set[str] = field(default_factory=set)
    """Kinds of which a read failed with an unknown error. Their tables may be damaged."""
    shunned: dict[str, str] = field(default_factory=dict)
    """Kind -> why its table is damaged and may not be made again yet. Such a table is not read."""
    _adrift: set[str] = field(default_factory=set)
    """Kinds of which a write was cut off. It may go on, with files that no version names yet."""
    _reads: trio.CapacityLimiter = field(init=False)

    def __post_init__(self) -> None:
        self._reads = trio.CapacityLimiter(self.settings.concurrent_reads)

    async def read(self, function: Callable[..., Awaitable[T]], *args: object) -> T:
        """Run a coroutine function on LanceDB's loop, with its errors translated."""
        with lance.sorted_troubles():
            return await self.bridge.read(function, *args, deadline_seconds=self.settings.read_deadline_seconds)

    async def write(self, function: Callable[..., Awaitable[T]], *args: object) -> T:
        """Run a shielded coroutine function on LanceDB's loop, with its errors translated."""
        with lance.sorted_troubles():
            return await self.bridge.write(function, *args, deadline_seconds=self.settings.write_deadline_seconds)

    def place_of(self, kind: str) -> Path:
        """Return the folder of the kind's table."""
        return self.directory / f"{kind}.lance"

    async def found(self, kind: str) -> Found | None:
        """Look at a kind's table on disk.

        None if there is none that can be read, or only one of an older schema of ours.

        One of an older schema is dropped, and made again from markdown. Raises ForeignTable for a table of another
        program.
        """
        with self._sessions.using() as session:
            newest = await self.newest(kind)
            if newest is None:
                return None
            table = await self._table(session, kind)
            state = self._states.get(kind)
            if table is not None and state is not None:
                return Found(state.incarnation, state.model, newest)
            if state is not None:
                await self.write(lance.drop, await self.read(self._connect, session), kind)
                del self._states[kind]
        return None

    async def newest(self, kind: str) -> Version | None:
        """Return the newest version of a kind's table on disk, or None if it has none."""
        with lance.sorted_troubles():
            return await trio.to_thread.run_sync(versions.newest, self.place_of(kind))

    async def advance(self, kind: str, left: Version) -> Version | None:
        """Return the newest version that holds the rows of ``left``, or None if there is not one.

        ``left`` was recognised before.
        """
        with lance.sorted_troubles():
            return await trio.to_thread.run_sync(versions.advance, self.place_of(kind), left)

    async def recognise(self, kind: str, left: Version) -> Version | None:
        """Return the newest version if it holds the rows of ``left``, else None."""
        with lance.sorted_troubles():
            newest, reached = await trio.to_thread.run_sync(_look, self.place_of(kind), left)
        return reached if newest == reached else None

    async def tampered(self, kind: str) -> bool:
        """Return whether a file of the table changed, or went without an optimize, since the last call.

        Lance never changes a file.
        """
        state = self._states.get(kind)
        if state is None:
            return False
        pruned, state.pruned = state.pruned, False
        with lance.sorted_troubles():
            files = await trio.to_thread.run_sync(versions.stamps, self.place_of(kind))
        before, state.files = state.files, files
        gone = any(name not in files for name in before if not name.isdecimal()) and not pruned and not state.pruned
        return gone or any(before.get(name, stamp) != stamp for name, stamp in files.items())

    def may_have_cut_off(self, kind: str) -> bool:
        """Return whether a write of this process was cut off at its deadline.

        Such a write may have made a version that we do not know.
        """
        return kind in self._adrift

    def model_of(self, kind: str) -> str | None:
        """Return the model whose vectors the kind's table holds, or None if there is no table yet."""
        state = self._states.get(kind)
        return None if state is None else state.model

    def incarnation_of(self, kind: str) -> str:
        """Return the identity of the table's present incarnation. It is empty if there is none."""
        state = self._states.get(kind)
        return "" if state is None else state.incarnation

    def dimension_of(self, kind: str) -> int:
        """Return the width of the vectors in the kind's table. It is 0 if the table has none."""
        return self._states[kind].dimension

    async def create(self, kind: str, model: Model, incarnation: str = "") -> Version:
        """Create a kind's table as a new incarnation, and drop what was there. Returns its version.

        It waits for an optimize. An optimize removes files that no version names, such as those of a table in the
        making, and could leave files of the old table in the new one's folder.
        """
        incarnation = incarnation or lance.new_incarnation()
        with self._sessions.using() as session:
            async with self._writer_lock(kind), self._compaction(kind), session.opening:
                old = session.tables.pop(kind, None)
                if old is not None:
                    old.close()
                self._states.pop(kind, None)
                self._unmade.add(kind)  # without its indexes it must not look like a table
                try:
                    table = await self.write(self._create, session, kind, model, incarnation)
                except UnknownOutcome:
                    self._adrift.add(kind)
                    raise
                finally:
                    self._written(kind, None)
                self._unmade.discard(kind)
                session.tables[kind] = table
                self._states[kind] = _TableState(incarnation, model.name, dimension=model.dimension)
                self.shunned.pop(kind, None)
                return await self.newest(kind) or Version(0, b"")

    async def commit(
        self, kind: str, rows: Sequence[Row], deletes: Sequence[tuple[str, str]], *, left: Version | None = None
    ) -> Version:
        """Upsert ``rows`` and delete (md_path, entry_id) keys. It is idempotent. Returns the table's new version.

        ``left`` is the version after our last commit. Unrecognised is raised if the table does not hold its rows, or if
        another program's commit came between ours. Raises Transient when the outcome is unknown or the surroundings
        prevent it. Repeat the same commit then.
        """
        state = self._states.get(kind)
        if state is None:
            raise Unrecognised(self._gone(kind))
        with lance.sorted_troubles():
            batches = [
                lance.batch_of(self.kinds[kind], state.dimension, rows[start : start + MERGE_ROWS])
                for start in range(0, len(rows), MERGE_ROWS)
            ]
        keys = [deletes[start : start + DELETE_KEYS] for start in range(0, len(deletes), DELETE_KEYS)]
        async with self._writer_lock(kind), self._writing(kind) as table:
            version = await self._commit(table, kind, left, batches, keys)
        state.commits += 1
        state.rows += len(rows) + len(deletes)
        return version

    async def _commit(
        self, table: AsyncTable, kind: str, left: Version | None, batches: list[Any], keys: list[Any]
    ) -> Version:
        """Commit in parts. Each merge and each delete is a separate call with a whole deadline."""
        version = left
        for batch in batches:
            version = await self.write(lance.commit, table, self.place_of(kind), version, [batch], [])
        for some in keys:
            version = await self.write(lance.commit, table, self.place_of(kind), version, [], [some])
        return version or Version(0, b"")

    def wants_optimize(self, kind: str) -> bool:
        """Return whether enough was written since the last optimize, by any process.

        A search reads the rows that no index covers yet one by one. Optimizing whenever they are a share of the table
        costs a constant for each row written.
        """
        state = self._states.get(kind)
        if state is None:
            return False
        due = self.settings
        share = max(MIN_OPTIMIZE_ROWS, due.optimize_after_share * state.indexed)
        return state.commits >= due.optimize_after_commits or state.rows >= min(due.optimize_after_rows, share)

    def reopen(self, kind: str) -> None:
        """Have the table opened again at its next use. A handle does not see what other processes commit."""
        self._written(kind, None)

    def forget(self, kind: str) -> None:
        """Let go of a table that is gone. The next commit makes another."""
        self._states.pop(kind, None)
        self.rotate()  # the Session's caches speak of files that are gone, and of versions that the next table has too

    async def probe(self, kind: str, words: str = lance.PROBE_WORD) -> None:
        """Read the whole of a kind's table, and search each of its indexes, on a new connection.

        Does nothing if there is none.

        Raises Unexpected if that fails with an unknown error, and Transient if the surroundings prevent it.
        """
        place = self.place_of(kind)
        if not os.path.lexists(place):
            return
        if not place.is_dir():
            raise Unexpected(f"{place} is not a directory")
        async with self._reads:
            deadline_seconds = max(self.settings.read_deadline_seconds, self.settings.write_deadline_seconds)
            with lance.sorted_troubles():
                await self.bridge.read(
                    lance.probe, self.directory, self.kinds[kind], words, deadline_seconds=deadline_seconds
                )

    async def set_aside(self, kind: str) -> Path:
        """Move what is left of a kind's table out of the way. Returns where it is kept, in place of an earlier copy."""
        async with self._writer_lock(kind), self._compaction(kind):
            self.forget(kind)
            self.shunned.pop(kind, None)
            with lance.sorted_troubles():
                return await trio.to_thread.run_sync(_set_aside, self.place_of(kind))

    def open_kinds(self) -> list[str]:
        """Return the kinds that have a table."""
        return list(self._states)

    def unoptimized(self, kind: str) -> int:
        """Return the number of commits since the last optimize."""
        return self._states[kind].commits

    async def optimize(self, kind: str, *, alone: bool = True) -> None:
        """Compact, fold new rows into the indexes, and prune old versions.

        With ``alone`` commits wait meanwhile. Otherwise a commit that comes in between voids the work, and Transient is
        raised. The next optimize that is alone removes what voided work and killed engines left in the table's folder.
        """
        state, keep_seconds = self._states[kind], self.settings.keep_versions_seconds
        commits, rows = state.commits, state.rows
        async with (
            self._writer_lock(kind) if alone else nullcontext(),
            self._compaction(kind),
            self._writing(kind) as table,
        ):
            optimize = partial(lance.optimize, nobody_else=alone and kind not in self._adrift)
            state.pruned = True
            state.indexed = await self.write(optimize, table, self.kinds[kind], keep_seconds)
            state.pruned = True
        state.commits -= commits
        state.rows -= rows

    async def erase(self, kind: str, *, keep_seconds: float) -> None:
        """Leave nothing in a kind's table, if there is one, but its rows and its young versions.

        Versions younger than ``keep_seconds`` stay. Commits wait meanwhile. If no old version is to be kept, their
        readers are waited for.
        """
        with self._sessions.using() as session:
            if await self._table(session, kind) is None:
                return
        async with self._writer_lock(kind), self._compaction(kind):
            state = self._states[kind]
            state.pruned = True
            async with self._writing(kind) as table:
                await self.write(lance.erase, table, self.kinds[kind])
            if not keep_seconds:
                await self._last_readers()
            async with self._writing(kind) as table:
                optimize = partial(lance.optimize, nobody_else=kind not in self._adrift)
                state.indexed = await self.write(optimize, table, self.kinds[kind], keep_seconds)
            state.pruned = True
            state.commits = state.rows = 0

    async def _last_readers(self) -> None:
        """Open a new Session, and wait until no task reads in an old one, as long as a read may take."""
        self.rotate()
        with trio.move_on_after(self.settings.read_deadline_seconds):
            while self.sessions_open > 1:  # noqa: ASYNC110 - a reader that ends does not announce it
                await trio.sleep(READERS_LOOK_SECONDS)

    async def visit(self, kind: str, names: Sequence[str], take: Callable[[list[dict[str, object]]], None]) -> None:
        """Give ``take`` every row of a kind, with only these columns, a batch at a time, in LanceDB's thread.

        After an error some come twice.
        """
        await self._ask(kind, lance.visit, names, take)

    async def keys(self, kind: str) -> tuple[dict[tuple[str, str], bytes], set[tuple[str, str]]]:
        """Return (md_path, entry_id) -> content hash of every row, and the keys that more than one row has."""
        return await self._ask(kind, lance.keys) or ({}, set())

    async def rows(self, kind: str, *, where: str = "") -> list[dict[str, object]]:
        """Return every row of a kind, vectors as lists, for checks and small tables."""
        return await self._ask(kind, lance.rows, where) or []

    async def search_text(self, kind: str, query: str, *, where: str, limit: int) -> list[Hit]:
        """Return the best rows by BM25 over the kind's text columns. The query is words only, without operators."""
        return await self._ask(kind, lance.search_text, self.kinds[kind], query, where, limit) or []

    async def search_vector(
        self, kind: str, vector: NDArray[np.float32], *, model: str, where: str, limit: int
    ) -> list[Hit]:
        """Return the nearest rows by cosine, or none if the table holds another model's vectors."""
        if kind not in self._states:
            with self._sessions.using() as session:
                await self._table(session, kind)
        state = self._states.get(kind)
        if state is None or not state.dimension or state.model != model:
            return []
        return await self._ask(kind, lance.search_vector, self.kinds[kind], vector, where, limit) or []

    @asynccontextmanager
    async def acquire_read(self) -> AsyncIterator[None]:
        """Hold one of the ``concurrent_reads``, to open index files by other means meanwhile."""
        async with self._reads:
            yield

    def narrow(self, share: float) -> None:
        """Let only this share of ``concurrent_reads`` run in parallel, but always one. Those that run go on."""
        self._reads.total_tokens = max(1, int(self.settings.concurrent_reads * share))

    def rotate(self) -> int:
        """Open a new Session, connection and tables, each when first used. Returns the number of the Session.

        The old ones, and every descriptor they pin, go when their last reader is done. No call fails for it.
        """
        return self._sessions.rotate()

    @property
    def sessions_open(self) -> int:
        """Return 1, plus one for each old Session that waits for its last reader."""
        return self._sessions.open

    @property
    def rotations(self) -> int:
        """Return how often the Session was rotated."""
        return self._sessions.current.number

    def session_bytes(self) -> int:
        """Return the bytes in the current Session's caches, 0 before the first call."""
        session = self._sessions.current.session
        return 0 if session is None else int(session.size_bytes)

    def close(self) -> None:
        """Let go of every table, the connection and the Session."""
        self._states.clear()
        self._sessions.close()

    async def _ask(self, kind: str, function: Callable[..., Awaitable[T]], *args: object) -> T | None:
        """Read a kind's table under the limit of reads.

        None if there is none. Waits for descriptors as long as a read may take.

        A read keeps its files open while it lasts, so the number of parallel reads bounds descriptors and Lance's
        threads.
        """
        async with self._reads:
            end = trio.current_time() + self.settings.read_deadline_seconds
            while True:
                try:
                    with self._sessions.using() as session:
                        table = await self._table(session, kind)
                        return None if table is None else await self.read(function, table, *args)
                except Exhausted:
                    (self.on_exhausted or self.rotate)()
                    if trio.current_time() + EXHAUSTED_PAUSE_SECONDS > end:
                        raise
                    await trio.sleep(EXHAUSTED_PAUSE_SECONDS)
                except Unexpected:
                    self.doubted.add(kind)
                    raise

    def _writer_lock(self, kind: str) -> trio.Lock:
        """Return the lock of a table's writer."""
        return self._turns.setdefault(kind, trio.Lock())

    def _compaction(self, kind: str) -> trio.Lock:
        """Return the lock for optimizing a table, or putting another in its place."""
        return self._compactions.setdefault(kind, trio.Lock())

    def _gone(self, kind: str) -> str:
        return f"the table {kind!r} is not there any more: it is made again from markdown"

    @asynccontextmanager
    async def _writing(self, kind: str) -> AsyncIterator[AsyncTable]:
        """Yield the kind's table, to write to."""
        with self._sessions.using() as session:
            table = await self._table(session, kind)
            if table is None:
                raise Unrecognised(self._gone(kind))
            try:
                yield table
            except UnknownOutcome:
                self._adrift.add(kind)
                raise
            finally:
                self._written(kind, table)

    def _written(self, kind: str, table: AsyncTable | None) -> None:
        """Have the table opened again if the writer used another handle, which does not see the commit."""
        if table is None or self._sessions.current.tables.get(kind) is not table:
            self._moved[kind] = self._moved.get(kind, 0) + 1
            self._sessions.current.tables.pop(kind, None)

    async def _table(self, session: PooledSession, kind: str) -> AsyncTable | None:
        """Return the table of a kind, opened once for each Session.

        None if there is none, or one of an older schema.
        """
        if kind in session.tables:
            return session.tables[kind]
        async with session.opening:
            if kind in self._unmade:
                return None
            while kind not in session.tables:
                moved = self._moved.get(kind, 0)
                opened = await self.read(self._open, session, kind)
                if opened is None:
                    return None
                table, state = opened
                known = self._states.get(kind)
                if known is None or known.incarnation != state.incarnation:
                    self._states[kind] = state
                if not state.current:
                    return None
                if moved == self._moved.get(kind, 0):
                    session.tables[kind] = table
            return session.tables[kind]

    async def _open(self, session: PooledSession, kind: str) -> tuple[AsyncTable, _TableState] | None:
        if not (self.directory / f"{kind}.lance").is_dir():
            return None
        try:
            opened = await lance.open_table(await self._connect(session), self.kinds[kind])
        except ForeignTable as error:
            if kind not in self._states:
                raise
            raise Unexpected(str(error)) from error  # it was ours a moment ago
        if opened is None:
            return None
        identity = opened.identity
        state = _TableState(
            identity.incarnation, identity.model.name, dimension=identity.model.dimension, current=opened.current
        )
        if opened.current and kind not in self._states:
            state.indexed, state.rows = await lance.covered(opened.table, self.kinds[kind])
        return opened.table, state

    async def _create(self, session: PooledSession, kind: str, model: Model, incarnation: str) -> AsyncTable:
        connection = await self._connect(session)
        return await lance.create_table(connection, self.directory, self.kinds[kind], model, incarnation)

    async def _connect(self, session: PooledSession) -> AsyncConnection:
        if session.connection is None:
            mode, cap_bytes = self.settings.descriptor_mode, self.cap_bytes
            session.connection, session.session = await lance.connect(self.directory, mode, cap_bytes)
        return session.connection


def open_index(
    bridge: Bridge, settings: LanceDBSettings, *, kinds: Mapping[str, TableKind], directory: Path, cap_bytes: int
) -> Index:
    """Return the index of one memory root, with its cache capped.

    It connects when first used. Prepares LanceDB for the whole process.
    """
    lance.prepare()
    return Index(bridge, settings, kinds, directory, cap_bytes)


def _look(place: Path, left: Version) -> tuple[Version | None, Version | None]:
    return versions.newest(place), versions.follow(place, left)


def _set_aside(place: Path) -> Path:
    kept = place.parent.parent / SET_ASIDE / place.name
    kept.parent.mkdir(exist_ok=True)
    lance.remove(kept)
    if os.path.lexists(place):
        place.rename(kept)
    return kept
