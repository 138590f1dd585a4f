"""The one door to LanceDB and Arrow: tables that carry their identity, and the calls on them. It keeps no state."""

from __future__ import annotations

import asyncio
import errno
import math
import os
import re
import shutil
import uuid
import warnings
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

import numpy as np
import trio

from everos_engine.stores.late_package import late_package

os.environ.setdefault("LANCEDB_LOG", "error")  # read once, when the library is loaded. Its warnings are for its authors
os.environ.setdefault(
    "LANCE_IO_THREADS", "2"
)  # the default is 8, which is not faster and opens more files. With 1 it hangs

with late_package(
    "lance_namespace_urllib3_client"
):  # a client of remote catalogs, which takes a third of the import's time
    import lancedb
import pyarrow as pa
from lancedb import AsyncConnection, AsyncTable
from lancedb.index import FTS
from lancedb.query import MatchQuery, MultiMatchQuery
from numpy.typing import NDArray

from everos_engine.errors import EngineError, Exhausted, Fatal, Transient, Unexpected, exhausted
from everos_engine.settings import DescriptorMode
from everos_engine.stores import versions
from everos_engine.stores.versions import Version

LIBRARY = f"lancedb {lancedb.__version__}"
FORMAT = "2"
KEY_COLUMNS = ("md_path", "entry_id", "content_hash")
PROBE_WORD = "probe"
_HASH = re.compile(r"(?:[0-9a-f]{2})*")
_PLACE = re.compile(r",? /\S+\.rs:\d+(:\d+)?")
"""The place in the library's source where an error was made."""
_ARROW = {
    "string": pa.string(),
    "int": pa.int64(),
    "float": pa.float64(),
    "timestamp": pa.timestamp("us", tz="UTC"),
    "strings": pa.list_(pa.string()),
}
_FACT = "everos_engine."
"""The prefix of each fact in a schema's metadata."""


class TableKind(Protocol):
    """What the index needs to know of a kind."""

    @property
    def name(self) -> str:
        """Return the table's name."""

    @property
    def columns(self) -> Mapping[str, str]:
        """Return column -> string, int, float, timestamp or strings."""

    @property
    def fts_columns(self) -> Sequence[str]:
        """Return the columns with a full-text index."""


@dataclass(frozen=True, slots=True)
class Model:
    """Which vectors a table holds. ``name`` is unique per model fingerprint, ``dimension`` 0 means none."""

    name: str
    dimension: int


@dataclass(frozen=True, slots=True)
class Row:
    """One row to write. ``vector`` has shape (dimension,) or is None for a row without text."""

    md_path: str
    entry_id: str
    content_hash: bytes
    values: Mapping[str, object]
    vector: NDArray[np.float32] | None


@dataclass(frozen=True, slots=True)
class Hit:
    """One row found. ``score`` grows with relevance (BM25, or cosine similarity)."""

    kind: str
    md_path: str
    entry_id: str
    score: float
    values: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Identity:
    """What a table's schema says of itself. ``incarnation`` is empty for a table that is not ours."""

    incarnation: str
    model: Model
    format: str


@dataclass(frozen=True, slots=True)
class Opened:
    """A table, its identity, and whether its schema is today's."""

    table: AsyncTable
    identity: Identity
    current: bool


def prepare() -> None:
    """Have Arrow use the system's allocator in this process, because its default, mimalloc, does not return memory."""
    pa.set_memory_pool(pa.system_memory_pool())
    warnings.filterwarnings("ignore", message=r"optimize\(cleanup_older_than", category=UserWarning)


async def connect(directory: Path, mode: DescriptorMode, cap_bytes: int) -> tuple[AsyncConnection, lancedb.Session]:
    """Return a connection and its Session, with an index cache of so many bytes.

    Makes the directory, but not its parents.
    """
    directory.mkdir(0o700 | os.stat(directory.parent).st_mode & 0o050, exist_ok=True)  # a root that is gone stays gone
    session = lancedb.Session(index_cache_size_bytes=cap_bytes)
    return await lancedb.connect_async(uri_of(directory, mode), session=session), session


@asynccontextmanager
async def looking(directory: Path) -> AsyncIterator[AsyncConnection]:
    """Yield a separate connection, on the current asyncio loop, only for looking."""
    connection = await lancedb.connect_async(uri_of(directory, mode="reopen"))
    try:
        yield connection
    finally:
        connection.close()


class ForeignTable(Fatal):
    """A table under one of our names was not made by this engine."""


async def open_table(connection: AsyncConnection, kind: TableKind) -> Opened | None:
    """Return the kind's table, or None if it has no version yet. Raises ForeignTable for a table of another program."""
    try:
        table = await connection.open_table(kind.name)
    except ValueError as error:
        if "was not found" not in str(error):
            raise
        return None  # its directory is being made, or its maker died before the first manifest
    schema = await table.schema()
    identity = identity_of(schema)
    expected = schema_of(kind, identity.model, identity.incarnation)
    if not identity.incarnation:
        raise ForeignTable(_drift(kind.name, schema, expected))
    return Opened(table, identity, schema.equals(expected) and identity.format == FORMAT)


def new_incarnation() -> str:
    """Return an identity for a new table."""
    return uuid.uuid4().hex


async def create_table(
    connection: AsyncConnection, directory: Path, kind: TableKind, model: Model, incarnation: str
) -> AsyncTable:
    """Create a table with its full-text indexes, in place of what was there."""
    place = directory / f"{kind.name}.lance"
    if os.path.lexists(place):
        with suppress(Exception):  # it is removed, with any damage
            await connection.drop_table(kind.name)
        remove(place)
    table = await connection.create_table(kind.name, schema=schema_of(kind, model, incarnation))
    for column in kind.fts_columns:
        await table.create_index(column, config=_words())
    return table


def remove(place: Path) -> None:
    """Remove a table's folder, or what stands in its place. Does nothing if there is nothing."""
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)


def schema_of(kind: TableKind, model: Model, incarnation: str) -> pa.Schema:
    """Return the schema of a kind's table.

    It has its keys, its columns, its vectors if the model has any, and its identity.
    """
    fields = [
        *(pa.field(name, pa.string(), nullable=False) for name in KEY_COLUMNS),
        *(pa.field(name, _ARROW[column]) for name, column in kind.columns.items()),
    ]
    if model.dimension:
        fields.append(pa.field("vector", pa.list_(pa.float32(), model.dimension)))
    facts = {"format": FORMAT, "incarnation": incarnation, "model": model.name, "dimension": str(model.dimension)}
    return pa.schema(fields, metadata={_FACT + name: value for name, value in facts.items()})


def identity_of(schema: pa.Schema) -> Identity:
    """Return what a schema says of its table."""
    facts = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
    dimension = facts.get(_FACT + "dimension", "0")
    model = Model(facts.get(_FACT + "model", ""), int(dimension) if dimension.isdigit() else 0)
    return Identity(facts.get(_FACT + "incarnation", ""), model, facts.get(_FACT + "format", ""))


def batch_of(kind: TableKind, dimension: int, rows: Sequence[Row]) -> pa.RecordBatch:
    """Return rows as an Arrow batch.

    ``dimension`` is the table's, 0 if it has no vectors. Raises Unexpected for a bad vector.
    """
    arrays = [
        pa.array([row.md_path for row in rows], pa.string()),
        pa.array([row.entry_id for row in rows], pa.string()),
        pa.array([row.content_hash.hex() for row in rows], pa.string()),
        *(pa.array([row.values.get(name) for row in rows], _ARROW[column]) for name, column in kind.columns.items()),
    ]
    names = [*KEY_COLUMNS, *kind.columns]
    if dimension:
        arrays.append(_vectors([row.vector for row in rows], dimension))
        names.append("vector")
    return pa.RecordBatch.from_arrays(arrays, names=names)


def uri_of(directory: Path, mode: DescriptorMode) -> str:
    """Return the URI to connect to.

    Under mode ``reopen`` no index descriptor is ever pinned. ``pinned`` is the plain path.

    Unquoted, ``%``, ``#`` and ``?`` in a URI would open another folder.
    """
    name = os.fsencode(directory)  # in UTF-8, also if the locale has another encoding
    return "file-object-store://" + quote(name) if mode == "reopen" else name.decode("utf-8")


def text_literal(text: str) -> str:
    """Return a SQL string literal."""
    return "'" + text.replace("'", "''") + "'"


async def drop(connection: AsyncConnection, kind: str) -> None:
    """Drop a kind's table."""
    await connection.drop_table(kind)


async def commit(
    table: AsyncTable,
    place: Path,
    left: Version | None,
    batches: Sequence[pa.RecordBatch],
    deletes: Sequence[Sequence[tuple[str, str]]],
) -> Version:
    """Upsert batches, then delete keys, each as a commit of the table at ``place``. Returns its version then.

    Raises Unrecognised before the first commit if the table does not hold the rows of the version ``left``, and after
    one if another program's came between. None as ``left`` skips this check, which reads one small file before and one
    after each commit.
    """
    at = left
    if left is not None and (at := versions.follow(place, left)) is None:
        raise Unrecognised(_UNRECOGNISED)
    number = 0
    for write, chunk in (*((_merge, batch) for batch in batches), *((_delete, keys) for keys in deletes)):
        number = await write(table, chunk)
        if at is not None and (at := versions.advance(place, at, own=number)) is None:
            raise Unrecognised(_UNRECOGNISED)
    return at or versions.read(place, number) or Version(number, b"")


_UNRECOGNISED = "the table has a version that is not the engine's own: its rows are compared with the ledger first"


class Unrecognised(Transient):
    """A table is not as we left it: it is gone, was replaced, or another program committed to it.

    No change is to blame.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message, counts_as_retry=False)


class TableDamaged(Transient):
    """A table is proven damaged, and may not be made again yet.

    The other tables are sound, and no change is to blame.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message, counts_as_retry=False)


async def _merge(table: AsyncTable, batch: pa.RecordBatch) -> int:
    """Upsert rows by their key. Returns the table's new version.

    LanceDB refuses a null vector unless it may replace bad ones by null. None is bad, because `batch_of` checked each.
    """
    upsert = table.merge_insert(["md_path", "entry_id"]).when_matched_update_all().when_not_matched_insert_all()
    result = await upsert.execute(batch, on_bad_vectors="null")
    return int(result.version)


async def _delete(table: AsyncTable, keys: Sequence[tuple[str, str]]) -> int:
    """Delete rows by their (md_path, entry_id). Returns the table's new version."""
    paths = ", ".join(text_literal(path) for path in dict.fromkeys(path for path, _ in keys))
    wanted = ", ".join(text_literal(f"{path}\n{entry_id}") for path, entry_id in keys)
    result = await table.delete(f"md_path IN ({paths}) AND concat(md_path, '\n', entry_id) IN ({wanted})")
    return int(result.version)


async def probe(directory: Path, kind: TableKind, words: str) -> None:
    """Read every column of a kind's table, and search each of its indexes for ``words``, on a separate connection.

    Raises anything that the library raises, and Unexpected if the table has no version.
    """
    async with looking(directory) as connection:
        opened = await open_table(connection, kind)
        if opened is None:
            raise Unexpected("the table has no version")
        try:
            async for _ in await opened.table.query().to_batches():
                pass
            for column in kind.fts_columns:
                for text in dict.fromkeys((PROBE_WORD, words)):
                    await opened.table.query().nearest_to_text(MatchQuery(text, column)).limit(1).to_arrow()
        finally:
            opened.table.close()


async def optimize(table: AsyncTable, kind: TableKind, keep_seconds: float, *, nobody_else: bool) -> int:
    """Compact and index a table, and remove its old versions. Returns how many rows its full-text indexes cover then.

    Lance keeps files of no version for a week, since a writer may be about to commit them. With ``nobody_else`` writing
    they go.
    """
    await table.optimize(cleanup_older_than=timedelta(seconds=keep_seconds), delete_unverified=nobody_else)
    return (await covered(table, kind))[0]


async def erase(table: AsyncTable, kind: TableKind) -> None:
    """Write every row and every full-text index again. No row changes.

    A deleted row stays in its fragment until that is rewritten, and its words in the index. Optimizing does neither by
    itself.
    """
    await table.update(updates_sql={"entry_id": "entry_id"})
    for column in kind.fts_columns:
        await table.create_index(column, config=_words(), replace=True)


async def visit(table: AsyncTable, names: Sequence[str], take: Callable[[list[dict[str, object]]], None]) -> None:
    """Give ``take`` every row, with only these columns, a batch at a time.

    A whole table may not fit into memory.
    """
    async for batch in await table.query().select(list(names)).to_batches():
        take(batch.to_pylist())


async def covered(table: AsyncTable, kind: TableKind) -> tuple[int, int]:
    """Return the rows in the full-text indexes, and the rows in none yet.

    An index has the name that Lance gives it by default.
    """
    found = await table.index_stats(f"{kind.fts_columns[0]}_idx")
    return (0, 0) if found is None else (int(found.num_indexed_rows), int(found.num_unindexed_rows))


async def keys(table: AsyncTable) -> tuple[dict[tuple[str, str], bytes], set[tuple[str, str]]]:
    """Return (md_path, entry_id) -> content hash of every row, and the keys found more than once.

    The hash of a foreign row is empty.
    """
    found: dict[tuple[str, str], bytes] = {}
    twice: set[tuple[str, str]] = set()
    async for batch in await table.query().select(list(KEY_COLUMNS)).to_batches():
        for path, entry, text in zip(*(batch.column(name).to_pylist() for name in KEY_COLUMNS), strict=True):
            key = (path, entry)
            if key in found:
                twice.add(key)
            found[key] = bytes.fromhex(text) if _HASH.fullmatch(text) else b""
    return found, twice


async def rows(table: AsyncTable, where: str) -> list[dict[str, object]]:
    """Return every row that a SQL condition, or none, lets through."""
    query = table.query().where(where) if where else table.query()
    return list((await query.to_arrow()).to_pylist())


async def search_text(table: AsyncTable, kind: TableKind, text: str, where: str, limit: int) -> list[Hit]:
    """Return the best rows by BM25 over the kind's text columns."""
    columns = list(kind.fts_columns)
    query = MatchQuery(text, columns[0]) if len(columns) == 1 else MultiMatchQuery(text, columns)
    search = table.query().nearest_to_text(query).select([*KEY_COLUMNS, *kind.columns, "_score"]).limit(limit)
    if where:
        search = search.where(where)
    return _hits(kind, (await search.to_arrow()).to_pylist(), lambda row: float(row["_score"]))


async def search_vector(
    table: AsyncTable, kind: TableKind, vector: NDArray[np.float32], where: str, limit: int
) -> list[Hit]:
    """Return the nearest rows by cosine."""
    search = table.query().nearest_to(vector).distance_type("cosine")
    search = search.select([*KEY_COLUMNS, *kind.columns, "_distance"]).limit(limit)
    if where:
        search = search.where(where)
    return _hits(kind, (await search.to_arrow()).to_pylist(), lambda row: 1.0 - float(row["_distance"]))


_SURROUNDINGS = tuple(
    f"(os error {number})"
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOMEM, errno.ESTALE)
)
"""Errors of the system that say nothing about the table. All changes share them, and they cost no attempt."""
_RACES = ("commit conflict", "concurrent writer", "was preempted by", "incompatible transaction")
"""What Lance says if another commit came first."""
_CONTROL_FLOW = (
    KeyboardInterrupt,
    SystemExit,
    GeneratorExit,
    trio.Cancelled,
    asyncio.CancelledError,
    BaseExceptionGroup,
)


class sorted_troubles:  # noqa: N801 - a context manager, named as one reads it
    """Translate everything that LanceDB and Arrow raise into our families.

    LanceDB reports most troubles as bare RuntimeErrors, whose text decides. An unknown one becomes Unexpected, and so
    does a Rust panic, which is a BaseException. Our own errors, and what ends a task, pass through.
    """

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, (EngineError, *_CONTROL_FLOW)):
            return
        raise translated(error) from error


def translated(error: BaseException) -> Transient:
    """Return the error of our families that stands for ``error``, which a library raised."""
    text = str(error).strip()
    first_line = _PLACE.sub("", text.split("\n", 1)[0])[:400]
    name = "" if type(error) in {RuntimeError, OSError} and first_line else f"{type(error).__name__}: "
    message = f"LanceDB: {name}{first_line}"
    if exhausted(error):
        return Exhausted(message)
    if any(words in text for words in _SURROUNDINGS):
        return Transient(message, counts_as_retry=False)
    if any(words in text.lower() for words in _RACES):
        return Transient(message)
    return Unexpected(message)


def _words() -> FTS:
    return FTS(base_tokenizer="icu", with_position=False, remove_stop_words=False)


def _vectors(vectors: Sequence[NDArray[np.float32] | None], dimension: int) -> pa.Array:
    """Return ``vectors`` as an Arrow array of lists of ``dimension`` floats, null for a row without a vector.

    Raises Unexpected for one that is not finite, or of another width. LanceDB would silently make a null of it.
    """
    flat = np.zeros((len(vectors), dimension), dtype=np.float32)
    for at, vector in enumerate(vectors):
        if vector is None:
            continue
        if vector.shape != (dimension,) or not np.isfinite(vector).all():
            raise Unexpected(
                f"a vector of shape {vector.shape} is refused: the table's are {dimension} wide, and finite"
            )
        flat[at] = vector
    mask = pa.array([vector is None for vector in vectors], pa.bool_())
    return pa.FixedSizeListArray.from_arrays(pa.array(flat.ravel()), dimension, mask=mask)


def _hits(kind: TableKind, rows: Iterable[dict[str, Any]], score: Callable[[dict[str, Any]], float]) -> list[Hit]:
    hits = []
    for row in rows:
        value = score(row)
        if math.isfinite(value):
            hits.append(
                Hit(kind.name, row["md_path"], row["entry_id"], value, {name: row[name] for name in kind.columns})
            )
    return hits


def _drift(kind: str, found: pa.Schema, expected: pa.Schema) -> str:
    missing = [name for name in expected.names if name not in found.names]
    extra = [name for name in found.names if name not in expected.names]
    return (
        f"LanceDB table {kind!r} schema drift: missing={missing}, extra={extra}. It was not made by this engine. The index is "
        "rebuildable from markdown: remove `<root>/.index/lancedb` and start again."
    )
