"""The one door to LanceDB: tables that carry their identity, one commit per kind and batch, and searches."""

from __future__ import annotations

import math
import os
import re
import shutil
import uuid
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from urllib.parse import quote

import numpy as np
import trio

os.environ.setdefault("LANCEDB_LOG", "error")  # read once, when the library is loaded; its warnings are for its authors

import lancedb  # noqa: E402 - after LANCEDB_LOG is set
import pyarrow as pa  # noqa: E402 - after LANCEDB_LOG is set
from lancedb.index import FTS  # noqa: E402 - after LANCEDB_LOG is set
from lancedb.query import MatchQuery, MultiMatchQuery  # noqa: E402 - after LANCEDB_LOG is set

from everos_engine.errors import Exhausted, Fatal, Transient, UnknownOutcome, exhausted  # noqa: E402 - after LANCEDB_LOG is set
from everos_engine.stores.generation import Generation, Generations  # noqa: E402 - after LANCEDB_LOG is set

if TYPE_CHECKING:
    from lancedb import AsyncConnection, AsyncTable
    from numpy.typing import NDArray

    from everos_engine.settings import DescriptorMode, LanceDBSettings

T = TypeVar("T")
LIBRARY = f"lancedb {lancedb.__version__}"
FORMAT = "2"
MERGE_ROWS = 2048
OPTIMIZE_LEAST_ROWS = 64
"""Fewer rows are as soon read one by one as looked up."""
DELETE_KEYS = 1000
EXHAUSTED_PAUSE_SECONDS = 0.1
VECTOR_INDEX_ROWS = 200_000
"""Below this many rows an exact scan of 512-wide vectors answers in tens of milliseconds, so none is built."""
_PLACE = re.compile(r",? /\S+\.rs:\d+(:\d+)?")
"""Where in the library's source an error was made."""
KEY_COLUMNS = ("md_path", "entry_id", "content_hash")
_ARROW = {
    "string": pa.string(),
    "int": pa.int64(),
    "float": pa.float64(),
    "timestamp": pa.timestamp("us", tz="UTC"),
    "strings": pa.list_(pa.string()),
}


class TableKind(Protocol):
    """What the index needs to know of a kind."""

    @property
    def name(self) -> str:
        """The table's name."""

    @property
    def columns(self) -> Mapping[str, str]:
        """Column -> string, int, float, timestamp or strings."""

    @property
    def fts_columns(self) -> Sequence[str]:
        """Columns with a full-text index."""


class Bridge(Protocol):
    """Runs lancedb's coroutines on their own event loop."""

    async def read(self, function: Callable[..., Awaitable[T]], *args: object, deadline_seconds: float) -> T:
        """Cancellable."""

    async def write(self, function: Callable[..., Awaitable[T]], *args: object, deadline_seconds: float) -> T:
        """Shielded; past its deadline the outcome is unknown and Transient is raised."""


@dataclass(frozen=True, slots=True)
class Model:
    """Which vectors a table holds; ``name`` is unique per model fingerprint, ``dimension`` 0 means none."""

    name: str
    dimension: int


@dataclass(frozen=True, slots=True)
class Row:
    """One row to write; ``vector`` has shape (dimension,) or is None for a row without text."""

    md_path: str
    entry_id: str
    content_hash: bytes
    values: Mapping[str, object]
    vector: NDArray[np.float32] | None


@dataclass(frozen=True, slots=True)
class Hit:
    """One row found; ``score`` grows with relevance (BM25, or cosine similarity)."""

    kind: str
    md_path: str
    entry_id: str
    score: float
    values: Mapping[str, object]


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
    _reads: trio.CapacityLimiter = field(init=False)

    def __post_init__(self) -> None:
        self._reads = trio.CapacityLimiter(self.settings.concurrent_reads)

    async def read(self, function: Callable[..., Awaitable[T]], *args: object) -> T:
        """Run a coroutine function on LanceDB's loop, its troubles sorted."""
        with _sorted():
            return await self.bridge.read(function, *args, deadline_seconds=self.settings.read_deadline_seconds)

    async def write(self, function: Callable[..., Awaitable[T]], *args: object) -> T:
        """Run a shielded coroutine function on LanceDB's loop, its troubles sorted."""
        with _sorted():
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
                    await self.write(_drop, await self.read(self._connect, generation), kind)
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
        """Begin a new life of a kind's table, dropping what was there; its incarnation."""
        with self._generations.using() as generation:
            async with generation.opening:
                old = generation.tables.pop(kind, None)
                if old is not None:
                    old.close()
                self._lives.pop(kind, None)
                self._unmade.add(kind)  # until it has its indexes nobody may take it for a table
                try:
                    table, incarnation = await self.write(self._create, generation, kind, model)
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
                batch = self._batch(self.kinds[kind], life, rows[start : start + MERGE_ROWS])
                version = await self.write(_merge, table, batch)
            for start in range(0, len(deletes), DELETE_KEYS):
                version = await self.write(_delete, table, deletes[start : start + DELETE_KEYS])
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
            message = f"{place} is no directory"
            raise Transient(message)
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
            optimize = partial(_optimize, nobody_else=alone and kind not in self._adrift)
            version, life.indexed = await self.write(optimize, table, self.kinds[kind], keep_seconds)
        life.commits -= commits
        life.rows -= rows
        return version

    async def keys(self, kind: str) -> dict[tuple[str, str], bytes]:
        """(md_path, entry_id) -> content hash of every row."""
        return await self._ask(kind, _keys) or {}

    async def rows(self, kind: str, *, where: str = "") -> list[dict[str, object]]:
        """Every row of a kind, vectors as lists; for checks and small tables."""
        return await self._ask(kind, _rows, where) or []

    async def search_text(self, kind: str, query: str, *, where: str, limit: int) -> list[Hit]:
        """The best rows by BM25 over the kind's text columns; words only, no operators."""
        return await self._ask(kind, _search_text, self.kinds[kind], query, where, limit) or []

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
        return await self._ask(kind, _search_vector, self.kinds[kind], vector, where, limit) or []

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
                self._adrift.add(kind)  # it may go on, with files that no version names yet
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
        connection = await self._connect(generation)
        try:
            table = await connection.open_table(kind)
        except ValueError as error:
            if "was not found" not in str(error):
                raise
            return None  # its directory is being made, or its maker died before the first manifest
        schema = await table.schema()
        facts = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
        incarnation, model = facts.get("everos_engine.incarnation", ""), facts.get("everos_engine.model", "")
        dimension = int(facts.get("everos_engine.dimension", "0"))
        if not incarnation:
            raise Fatal(_drift(kind, schema, self._schema(self.kinds[kind], Model(model, dimension), "")))
        expected = self._schema(self.kinds[kind], Model(model, dimension), incarnation)
        current = schema.equals(expected) and facts.get("everos_engine.format") == FORMAT
        life = _Life(incarnation, model, dimension=dimension, current=current)
        if current and kind not in self._lives:
            life.indexed, life.rows = await _covered(table, self.kinds[kind])
        return table, life

    async def _create(self, generation: Generation, kind: str, model: Model) -> tuple[AsyncTable, str]:
        connection = await self._connect(generation)
        if (self.directory / f"{kind}.lance").exists():
            try:
                await connection.drop_table(kind)
            except (RuntimeError, ValueError, OSError):
                shutil.rmtree(self.directory / f"{kind}.lance")
        incarnation = uuid.uuid4().hex
        schema = self._schema(self.kinds[kind], model, incarnation)
        table = await connection.create_table(kind, schema=schema)
        for column in self.kinds[kind].fts_columns:
            await table.create_index(
                column, config=FTS(base_tokenizer="icu", with_position=False, remove_stop_words=False)
            )
        return table, incarnation

    async def _connect(self, generation: Generation) -> AsyncConnection:
        if generation.connection is None:
            self.directory.mkdir(exist_ok=True)  # without its parents: a root that is gone stays gone
            session = lancedb.Session(index_cache_size_bytes=self.cap_bytes)
            uri = uri_of(self.directory, self.settings.descriptor_mode)
            generation.connection = await lancedb.connect_async(uri, session=session)
            generation.session = session
        return generation.connection

    def _schema(self, kind: TableKind, model: Model, incarnation: str) -> pa.Schema:
        fields = [
            pa.field("md_path", pa.string(), nullable=False),
            pa.field("entry_id", pa.string(), nullable=False),
            pa.field("content_hash", pa.string(), nullable=False),
            *(pa.field(name, _ARROW[column]) for name, column in kind.columns.items()),
        ]
        if model.dimension:
            fields.append(pa.field("vector", pa.list_(pa.float32(), model.dimension)))
        facts = {"format": FORMAT, "incarnation": incarnation, "model": model.name, "dimension": str(model.dimension)}
        return pa.schema(fields, metadata={f"everos_engine.{name}": value for name, value in facts.items()})

    def _batch(self, kind: TableKind, life: _Life, rows: Sequence[Row]) -> pa.RecordBatch:
        arrays = [
            pa.array([row.md_path for row in rows], pa.string()),
            pa.array([row.entry_id for row in rows], pa.string()),
            pa.array([row.content_hash.hex() for row in rows], pa.string()),
            *(
                pa.array([row.values.get(name) for row in rows], _ARROW[column])
                for name, column in kind.columns.items()
            ),
        ]
        names = [*KEY_COLUMNS, *kind.columns]
        if life.dimension:
            arrays.append(_vectors([row.vector for row in rows]))
            names.append("vector")
        return pa.RecordBatch.from_arrays(arrays, names=names)


def open_index(
    bridge: Bridge, settings: LanceDBSettings, *, kinds: Mapping[str, TableKind], directory: Path, cap_bytes: int
) -> Index:
    """The index of one memory root, its cache capped; connects when first used.

    Arrow's buffers are the system allocator's from then on: mimalloc, its own choice, keeps what it once had.
    """
    pa.set_memory_pool(pa.system_memory_pool())
    warnings.filterwarnings("ignore", message=r"optimize\(cleanup_older_than", category=UserWarning)
    return Index(bridge, settings, kinds, directory, cap_bytes)


def uri_of(directory: Path, mode: DescriptorMode) -> str:
    """Where to connect. Mode ``reopen`` is a URI under which no index descriptor is ever pinned, ``pinned`` the plain path.

    Unquoted, ``%``, ``#`` and ``?`` in a URI would open another folder.
    """
    return "file-object-store://" + quote(os.fspath(directory)) if mode == "reopen" else os.fspath(directory)


def _remove(place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    place.unlink(missing_ok=True)


def text_literal(text: str) -> str:
    """A SQL string literal."""
    return "'" + text.replace("'", "''") + "'"


def _vectors(vectors: Sequence[NDArray[np.float32] | None]) -> pa.Array:
    width = next((vector.shape[0] for vector in vectors if vector is not None), 1)
    flat = np.zeros((len(vectors), width), dtype=np.float32)
    for at, vector in enumerate(vectors):
        if vector is not None:
            flat[at] = vector
    mask = pa.array([vector is None for vector in vectors])
    return pa.FixedSizeListArray.from_arrays(pa.array(flat.ravel()), width, mask=mask)


async def _drop(connection: AsyncConnection, kind: str) -> None:
    await connection.drop_table(kind)


async def _merge(table: AsyncTable, batch: pa.RecordBatch) -> int:
    merge = table.merge_insert(["md_path", "entry_id"]).when_matched_update_all().when_not_matched_insert_all()
    result = await merge.execute(batch)
    return int(result.version)


async def _delete(table: AsyncTable, keys: Sequence[tuple[str, str]]) -> int:
    paths = ", ".join(text_literal(path) for path in dict.fromkeys(path for path, _ in keys))
    wanted = ", ".join(text_literal(f"{path}\n{entry_id}") for path, entry_id in keys)
    result = await table.delete(f"md_path IN ({paths}) AND concat(md_path, '\n', entry_id) IN ({wanted})")
    return int(result.version)


async def _optimize(table: AsyncTable, kind: TableKind, keep_seconds: float, *, nobody_else: bool) -> tuple[int, int]:
    """The version then, and the rows that the full-text indexes cover.

    Lance keeps files of no version for a week, since a writer may be about to commit them; with ``nobody_else`` writing they go.
    """
    await table.optimize(cleanup_older_than=timedelta(seconds=keep_seconds), delete_unverified=nobody_else)
    return int(await table.version()), (await _covered(table, kind))[0]


async def _covered(table: AsyncTable, kind: TableKind) -> tuple[int, int]:
    """Rows in the full-text indexes, and rows in none yet; an index is called as Lance calls it by default."""
    found = await table.index_stats(f"{kind.fts_columns[0]}_idx")
    return (0, 0) if found is None else (int(found.num_indexed_rows), int(found.num_unindexed_rows))


async def _keys(table: AsyncTable) -> dict[tuple[str, str], bytes]:
    found: dict[tuple[str, str], bytes] = {}
    async for batch in await table.query().select(list(KEY_COLUMNS)).to_batches():
        paths, entries, hashes = (batch.column(name).to_pylist() for name in KEY_COLUMNS)
        found.update(zip(zip(paths, entries, strict=True), map(bytes.fromhex, hashes), strict=True))
    return found


async def _rows(table: AsyncTable, where: str) -> list[dict[str, object]]:
    query = table.query().where(where) if where else table.query()
    return list((await query.to_arrow()).to_pylist())


async def _search_text(table: AsyncTable, kind: TableKind, text: str, where: str, limit: int) -> list[Hit]:
    columns = list(kind.fts_columns)
    query = MatchQuery(text, columns[0]) if len(columns) == 1 else MultiMatchQuery(text, columns)
    search = table.query().nearest_to_text(query).select([*KEY_COLUMNS, *kind.columns, "_score"]).limit(limit)
    if where:
        search = search.where(where)
    return _hits(kind, (await search.to_arrow()).to_pylist(), lambda row: float(row["_score"]))


async def _search_vector(
    table: AsyncTable, kind: TableKind, vector: NDArray[np.float32], where: str, limit: int
) -> list[Hit]:
    search = table.query().nearest_to(vector).distance_type("cosine")
    search = search.select([*KEY_COLUMNS, *kind.columns, "_distance"]).limit(limit)
    if where:
        search = search.where(where)
    return _hits(kind, (await search.to_arrow()).to_pylist(), lambda row: 1.0 - float(row["_distance"]))


def _hits(kind: TableKind, rows: Iterable[dict[str, Any]], score: Callable[[dict[str, Any]], float]) -> list[Hit]:
    hits = []
    for row in rows:
        value = score(row)
        if math.isfinite(value):
            hits.append(
                Hit(kind.name, row["md_path"], row["entry_id"], value, {name: row[name] for name in kind.columns})
            )
    return hits


class _sorted:  # noqa: N801 - a context manager used as a verb
    """LanceDB reports the world's troubles as bare RuntimeErrors and OSErrors; here they become Transient."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (RuntimeError, OSError)) and not isinstance(error, (RecursionError, NotImplementedError)):
            first_line = _PLACE.sub("", str(error).strip().split("\n", 1)[0])[:400]
            message = f"LanceDB: {first_line}"
            raise (Exhausted if exhausted(error) else Transient)(message) from error


def _drift(kind: str, found: pa.Schema, expected: pa.Schema) -> str:
    missing = [name for name in expected.names if name not in found.names]
    extra = [name for name in found.names if name not in expected.names]
    return (
        f"LanceDB table {kind!r} schema drift: missing={missing}, extra={extra}. It was not made by this engine. The index is "
        "rebuildable from markdown: remove `<root>/.index/lancedb` and start again."
    )


@dataclass(frozen=True, slots=True)
class Examination:
    """One table as it is on disk; ``error`` where it does not open, ``drift`` where its columns are not ours."""

    kind: str
    error: str = ""
    drift: str = ""
    incarnation: str = ""
    model: str = ""
    dimension: int = 0
    version: int = 0
    rows: int = 0


async def examine(directory: Path, kinds: Mapping[str, TableKind]) -> list[Examination]:
    """Look at every table there is, on a connection of its own and on the asyncio loop at hand. Changes nothing."""
    present = [kind for kind in kinds if (directory / f"{kind}.lance").is_dir()]
    if not present:
        return []
    connection = await lancedb.connect_async(uri_of(directory, mode="reopen"))
    try:
        return [await _examined(connection, kinds[kind]) for kind in present]
    finally:
        connection.close()


async def count_of(directory: Path, kind: str, md_path: str) -> int:
    """Rows of one path in the table itself, counted as ``examine`` looks; 0 where there is no table."""
    if not (directory / f"{kind}.lance").is_dir():
        return 0
    connection = await lancedb.connect_async(uri_of(directory, mode="reopen"))
    try:
        table = await connection.open_table(kind)
        try:
            return int(await table.count_rows(f"md_path = {text_literal(md_path)}"))
        finally:
            table.close()
    finally:
        connection.close()


async def _examined(connection: AsyncConnection, kind: TableKind) -> Examination:
    try:
        table = await connection.open_table(kind.name)
        try:
            schema, version, rows = await table.schema(), await table.version(), await table.count_rows()
        finally:
            table.close()
    except (RuntimeError, OSError, ValueError) as error:
        return Examination(kind.name, error=str(error).strip().split("\n", 1)[0][:400] or type(error).__name__)
    facts = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
    wanted = {
        **dict.fromkeys(KEY_COLUMNS, pa.string()),
        **{name: _ARROW[type_] for name, type_ in kind.columns.items()},
    }
    missing = [name for name in wanted if name not in schema.names]
    extra = [name for name in schema.names if name not in wanted and name != "vector"]
    other = [name for name, type_ in wanted.items() if name in schema.names and schema.field(name).type != type_]
    drift = f"missing={missing}, extra={extra}, of another type={other}" if missing or extra or other else ""
    dimension = facts.get("everos_engine.dimension", "0")
    return Examination(
        kind.name,
        drift=drift,
        incarnation=facts.get("everos_engine.incarnation", ""),
        model=facts.get("everos_engine.model", ""),
        dimension=int(dimension) if dimension.isdigit() else 0,
        version=version,
        rows=rows,
    )
