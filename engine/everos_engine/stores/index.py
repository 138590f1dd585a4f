"""The index: one table per kind, one commit per kind and batch, searches, and a Session that can be rotated beneath them."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

import trio

from everos_engine.errors import Exhausted, Transient, Unexpected, UnknownOutcome
from everos_engine.stores import lance
from everos_engine.stores.generation import Generation, Generations

if TYPE_CHECKING:
    import numpy as np
    from lancedb import AsyncConnection, AsyncTable
    from numpy.typing import NDArray

    from everos_engine.settings import LanceDBSettings
    from everos_engine.stores.lance import Hit, Model, Row, TableKind

T = TypeVar("T")
MERGE_ROWS = 2048
OPTIMIZE_LEAST_ROWS = 64
"""Fewer rows are as soon read one by one as looked up."""
DELETE_KEYS = 1000
EXHAUSTED_PAUSE_SECONDS = 0.1


class Bridge(Protocol):
    """Runs lancedb's coroutines on their own event loop."""

    async def read(self, function: Callable[..., Awaitable[T]], *args: object, deadline_seconds: float) -> T:
        """Cancellable."""

    async def write(self, function: Callable[..., Awaitable[T]], *args: object, deadline_seconds: float) -> T:
        """Shielded; past its deadline the outcome is unknown and Transient is raised."""


@dataclass(slots=True)
class _Life:
    """What is known of a table, whichever generation has it open; ``current`` is False for one of an older schema.

    ``commits`` and ``rows`` were made since the last optimize; ``indexed`` are the rows that its full-text indexes cover.
    """

    incarnation: str
    model: str
    dimension: int
    commits: int = 0
    rows: int = 0
    indexed: int = 0
    current: bool = True


@dataclass(slots=True)
class Index:
    """All tables of one memory root; open it with ``open_index``.

    ``on_exhausted`` is called when LanceDB found no file descriptor; without one the Session is rotated.
    """

    bridge: Bridge
    settings: LanceDBSettings
    kinds: Mapping[str, TableKind]
    directory: Path
    cap_bytes: int
    on_exhausted: Callable[[], object] | None = None
    _generations: Generations = field(default_factory=Generations)
    _lives: dict[str, _Life] = field(default_factory=dict)
    _moved: dict[str, int] = field(default_factory=dict)
    _unmade: set[str] = field(default_factory=set)
    _turns: dict[str, trio.Lock] = field(default_factory=dict)
    _adrift: set[str] = field(default_factory=set)
    """Kinds of which a write was cut off: it may go on, with files that no version names yet."""
    _reads: trio.CapacityLimiter = field(init=False)

    def __post_init__(self) -> None:
        self._reads = trio.CapacityLimiter(self.settings.concurrent_reads)

    async def read(self, function: Callable[..., Awaitable[T]], *args: object) -> T:
        """Run a coroutine function on LanceDB's loop, its troubles sorted."""
        with lance.sorted_troubles():
            return await self.bridge.read(function, *args, deadline_seconds=self.settings.read_deadline_seconds)

    async def write(self, function: Callable[..., Awaitable[T]], *args: object) -> T:
        """Run a shielded coroutine function on LanceDB's loop, its troubles sorted."""
        with lance.sorted_troubles():
            return await self.bridge.write(function, *args, deadline_seconds=self.settings.write_deadline_seconds)

    async def lives(self) -> dict[str, tuple[str, int, str]]:
        """Kind -> (incarnation, version, model) of each table on disk that is ours and of today's schema.

        One of ours of an older schema is dropped: it is made again from markdown. Raises Fatal for a table of
        somebody else's under one of our names.
        """
        found: dict[str, tuple[str, int, str]] = {}
        for kind in self.kinds:
            with self._generations.using() as generation:
                table = await self._table(generation, kind)
                life = self._lives.get(kind)
                if table is not None and life is not None:
                    found[kind] = (life.incarnation, await self.read(table.version), life.model)
                elif life is not None:
                    await self.write(lance.drop, await self.read(self._connect, generation), kind)
                    del self._lives[kind]
        return found

    def model_of(self, kind: str) -> str | None:
        """The model whose vectors the kind's table holds; None where there is no table yet."""
        life = self._lives.get(kind)
        return None if life is None else life.model

    def incarnation_of(self, kind: str) -> str:
        """The identity of the table's present life; empty where there is none."""
        life = self._lives.get(kind)
        return "" if life is None else life.incarnation

    def dimension_of(self, kind: str) -> int:
        """Width of the vectors in the kind's table; 0 where it has none."""
        return self._lives[kind].dimension

    async def create(self, kind: str, model: Model) -> str:
        """Begin a new life of a kind's table, dropping what was there; its incarnation.

        In its turn: an optimize that is alone removes files that no version names, as those of a table in the making.
        """
        with self._generations.using() as generation:
            async with self._turn(kind), generation.opening:
                old = generation.tables.pop(kind, None)
                if old is not None:
                    old.close()
                self._lives.pop(kind, None)
                self._unmade.add(kind)  # until it has its indexes nobody may take it for a table
                try:
                    table, incarnation = await self.write(self._create, generation, kind, model)
                except UnknownOutcome:
                    self._adrift.add(kind)
                    raise
                finally:
                    self._written(kind, None)
                self._unmade.discard(kind)
                generation.tables[kind] = table
                self._lives[kind] = _Life(incarnation, model.name, dimension=model.dimension)
        return incarnation

    async def commit(self, kind: str, rows: Sequence[Row], deletes: Sequence[tuple[str, str]]) -> int:
        """Upsert ``rows`` and delete (md_path, entry_id) keys; idempotent; the table's new version.

        Raises Transient when the outcome is unknown or the world is in the way: do the same commit again.
        """
        life, version = self._lives[kind], 0
        async with self._turn(kind), self._writing(kind) as table:
            for start in range(0, len(rows), MERGE_ROWS):
                batch = lance.batch_of(self.kinds[kind], life.dimension, rows[start : start + MERGE_ROWS])
                version = await self.write(lance.merge, table, batch)
            for start in range(0, len(deletes), DELETE_KEYS):
                version = await self.write(lance.delete, table, deletes[start : start + DELETE_KEYS])
        life.commits += 1
        life.rows += len(rows) + len(deletes)
        return version

    def wants_optimize(self, kind: str) -> bool:
        """Whether enough was written since the last optimize, whoever wrote it.

        A search reads the rows that no index covers yet one by one; optimizing whenever they are a share of the table costs
        a constant for each row ever written.
        """
        life = self._lives.get(kind)
        if life is None:
            return False
        due = self.settings
        share = max(OPTIMIZE_LEAST_ROWS, due.optimize_after_share * life.indexed)
        return life.commits >= due.optimize_after_commits or life.rows >= min(due.optimize_after_rows, share)

    def lost_kinds(self) -> list[str]:
        """Kinds whose open table has no folder on disk any more."""
        return [kind for kind in self._lives if not (self.directory / f"{kind}.lance").is_dir()]

    def forget(self, kind: str) -> None:
        """Let go of a table that is gone; the next commit makes another."""
        self._lives.pop(kind, None)
        self.rotate()  # the Session's caches speak of files that are gone, and of versions that the next table has too

    async def check(self, kind: str) -> None:
        """Open a kind's table and read its keys and one search of it, where there is one. Raises Transient where that fails."""
        place = self.directory / f"{kind}.lance"
        if place.exists() and not place.is_dir():
            message = f"{place} is not a directory"
            raise Unexpected(message)
        await self.keys(kind)
        await self.search_text(kind, "check", where="", limit=1)

    async def discard(self, kind: str) -> None:
        """Remove a kind's table, whatever is left of it."""
        self.forget(kind)
        await trio.to_thread.run_sync(_remove, self.directory / f"{kind}.lance")

    def open_kinds(self) -> list[str]:
        """Kinds that have a table."""
        return list(self._lives)

    def unoptimized(self, kind: str) -> int:
        """Commits since the last optimize."""
        return self._lives[kind].commits

    async def optimize(self, kind: str, *, alone: bool = True) -> int:
        """Compact, fold new rows into the indexes, prune old versions; the table's new version.

        ``alone`` has commits wait meanwhile; else one that comes in between voids the work, and Transient is raised. What
        voided work and killed engines left in the table's folder is removed by the next that is alone.
        """
        life, keep_seconds = self._lives[kind], self.settings.keep_versions_seconds
        commits, rows = life.commits, life.rows
        async with self._turn(kind) if alone else nullcontext(), self._writing(kind) as table:
            optimize = partial(lance.optimize, nobody_else=alone and kind not in self._adrift)
            version, life.indexed = await self.write(optimize, table, self.kinds[kind], keep_seconds)
        life.commits -= commits
        life.rows -= rows
        return version

    async def keys(self, kind: str) -> dict[tuple[str, str], bytes]:
        """(md_path, entry_id) -> content hash of every row."""
        return await self._ask(kind, lance.keys) or {}

    async def rows(self, kind: str, *, where: str = "") -> list[dict[str, object]]:
        """Every row of a kind, vectors as lists; for checks and small tables."""
        return await self._ask(kind, lance.rows, where) or []

    async def search_text(self, kind: str, query: str, *, where: str, limit: int) -> list[Hit]:
        """The best rows by BM25 over the kind's text columns; words only, no operators."""
        return await self._ask(kind, lance.search_text, self.kinds[kind], query, where, limit) or []

    async def search_vector(
        self, kind: str, vector: NDArray[np.float32], *, model: str, where: str, limit: int
    ) -> list[Hit]:
        """The nearest rows by cosine; none where the table holds another model's vectors."""
        if kind not in self._lives:
            with self._generations.using() as generation:
                await self._table(generation, kind)
        life = self._lives.get(kind)
        if life is None or not life.dimension or life.model != model:
            return []
        return await self._ask(kind, lance.search_vector, self.kinds[kind], vector, where, limit) or []

    @asynccontextmanager
    async def turn_to_read(self) -> AsyncIterator[None]:
        """One of the ``concurrent_reads``, for whoever opens index files by other means meanwhile."""
        async with self._reads:
            yield

    def narrow(self, share: float) -> None:
        """Let only this share of ``concurrent_reads`` run at once, but one always; those that run go on."""
        self._reads.total_tokens = max(1, int(self.settings.concurrent_reads * share))

    def rotate(self) -> int:
        """Begin a new Session, connection and tables, each opened when first used; the number of the generation.

        The old ones, and every descriptor they pin, go when their last reader is done. No call fails for it.
        """
        return self._generations.rotate()

    @property
    def generations_open(self) -> int:
        """1, and one for each old generation that waits for its last reader."""
        return self._generations.open

    @property
    def rotations(self) -> int:
        """How often the Session was rotated."""
        return self._generations.current.number

    def session_bytes(self) -> int:
        """Bytes in the current Session's caches, 0 before the first call."""
        session = self._generations.current.session
        return 0 if session is None else int(session.size_bytes)

    def close(self) -> None:
        """Let go of every table, the connection and the Session."""
        self._lives.clear()
        self._generations.close()

    async def _ask(self, kind: str, function: Callable[..., Awaitable[T]], *args: object) -> T | None:
        """One read of a kind's table, in its turn; None where there is none. Waits for descriptors as long as a read may take.

        A read opens its files for as long as it lasts, so how many run at once bounds descriptors and Lance's threads.
        """
        async with self._reads:
            end = trio.current_time() + self.settings.read_deadline_seconds
            while True:
                try:
                    with self._generations.using() as generation:
                        table = await self._table(generation, kind)
                        return None if table is None else await self.read(function, table, *args)
                except Exhausted:
                    (self.on_exhausted or self.rotate)()
                    if trio.current_time() + EXHAUSTED_PAUSE_SECONDS > end:
                        raise
                    await trio.sleep(EXHAUSTED_PAUSE_SECONDS)

    def _turn(self, kind: str) -> trio.Lock:
        """Held by the one who writes to a table."""
        return self._turns.setdefault(kind, trio.Lock())

    @asynccontextmanager
    async def _writing(self, kind: str) -> AsyncIterator[AsyncTable]:
        """The kind's table, to write to."""
        with self._generations.using() as generation:
            table = await self._table(generation, kind)
            if table is None:
                message = f"the table {kind!r} is not there (any more): restart the engine to build it again"
                raise Transient(message)
            try:
                yield table
            except UnknownOutcome:
                self._adrift.add(kind)
                raise
            finally:
                self._written(kind, table)

    def _written(self, kind: str, table: AsyncTable | None) -> None:
        """A handle does not see what another one commits: where the current one is not the writer's, open anew."""
        if table is None or self._generations.current.tables.get(kind) is not table:
            self._moved[kind] = self._moved.get(kind, 0) + 1
            self._generations.current.tables.pop(kind, None)

    async def _table(self, generation: Generation, kind: str) -> AsyncTable | None:
        """The table of a kind, opened once a generation; None where there is none, or one of an older schema."""
        if kind in generation.tables:
            return generation.tables[kind]
        async with generation.opening:
            if kind in self._unmade:
                return None
            while kind not in generation.tables:
                moved = self._moved.get(kind, 0)
                opened = await self.read(self._open, generation, kind)
                if opened is None:
                    return None
                table, life = opened
                known = self._lives.get(kind)
                if known is None or known.incarnation != life.incarnation:
                    self._lives[kind] = life
                if not life.current:
                    return None
                if moved == self._moved.get(kind, 0):
                    generation.tables[kind] = table
            return generation.tables[kind]

    async def _open(self, generation: Generation, kind: str) -> tuple[AsyncTable, _Life] | None:
        if not (self.directory / f"{kind}.lance").is_dir():
            return None
        opened = await lance.open_table(await self._connect(generation), self.kinds[kind])
        if opened is None:
            return None
        identity = opened.identity
        life = _Life(
            identity.incarnation, identity.model.name, dimension=identity.model.dimension, current=opened.current
        )
        if opened.current and kind not in self._lives:
            life.indexed, life.rows = await lance.covered(opened.table, self.kinds[kind])
        return opened.table, life

    async def _create(self, generation: Generation, kind: str, model: Model) -> tuple[AsyncTable, str]:
        connection = await self._connect(generation)
        return await lance.create_table(connection, self.directory, self.kinds[kind], model)

    async def _connect(self, generation: Generation) -> AsyncConnection:
        if generation.connection is None:
            mode, cap_bytes = self.settings.descriptor_mode, self.cap_bytes
            generation.connection, generation.session = await lance.connect(self.directory, mode, cap_bytes)
        return generation.connection


def open_index(
    bridge: Bridge, settings: LanceDBSettings, *, kinds: Mapping[str, TableKind], directory: Path, cap_bytes: int
) -> Index:
    """The index of one memory root, its cache capped; connects when first used. Prepares LanceDB for the whole process."""
    lance.prepare()
    return Index(bridge, settings, kinds, directory, cap_bytes)


def _remove(place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    place.unlink(missing_ok=True)
