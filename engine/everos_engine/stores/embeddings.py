"""The embedding cache: vectors by model and text, so that no text is embedded twice.

The engine works without the cache. A damaged file is set aside, and one that cannot be used now is left out.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

import numpy as np
from loguru import logger
from numpy.typing import NDArray

from everos_engine.errors import Damaged, EngineError, Transient
from everos_engine.stores.database import Database, Transaction, open_or_replace, set_aside

if TYPE_CHECKING:
    import trio

T = TypeVar("T")

SCHEMA = """
CREATE TABLE IF NOT EXISTS model (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL, dimension INTEGER NOT NULL, probe BLOB NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS embedding (
    model INTEGER NOT NULL, text_hash BLOB NOT NULL, vector BLOB NOT NULL, used INTEGER NOT NULL,
    PRIMARY KEY (model, text_hash)
) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS embedding_used ON embedding (used);
"""
PAGES_KIBIBYTES = 256
"""SQLite's own page cache. Keys are hashes, so the same page is seldom read again soon, and the system caches files
too."""
USED_GRAIN_MILLISECONDS = 86_400_000
ROW_OVERHEAD_BYTES = 64


REST_SECONDS = 30.0
"""A cache that could not be used is left out for this long, because each try may wait for a lock."""


class Cache:
    """The cache's file. Each call is one transaction, off the event loop, one at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._database: Database | None = None
        self._limiter: trio.CapacityLimiter | None = None
        self._rests_until = float("-inf")

    async def use(self, work: Callable[[Transaction], T], *, otherwise: T) -> T:
        """Run ``work`` in one transaction. Returns ``otherwise`` if the cache cannot be used now, or was damaged."""
        return await self._in_thread(lambda: self._use(work, otherwise))

    async def drop(self) -> None:
        """Set the cache aside, because its content cannot be trusted any more. Raises Transient if that fails."""
        await self._in_thread(self._drop)

    async def vacuum(self) -> None:
        """Write the file again without its free pages, if it can be used now."""
        await self.use(lambda _: None, otherwise=None)  # opens it, and sets a damaged one aside
        await self._in_thread(lambda: None if self._database is None else self._database.vacuum())

    def close(self) -> None:
        """Close the file. Safe to call twice."""
        if self._database is not None:
            self._database.close()
            self._database = None

    async def _in_thread(self, work: Callable[[], T]) -> T:
        import trio

        if self._limiter is None:
            self._limiter = trio.CapacityLimiter(1)
        return await trio.to_thread.run_sync(work, limiter=self._limiter)

    def _use(self, work: Callable[[Transaction], T], otherwise: T) -> T:
        if time.monotonic() < self._rests_until:
            return otherwise
        try:
            try:
                found = self._opened().write(work)
            except Damaged:
                self.close()
                found = self._opened(suspected=True).write(work)
        except (EngineError, OSError) as error:
            if isinstance(error, Damaged):
                self.close()
            if self._rests_until < 0:
                logger.warning("embedding_cache_left_out error={!r}", str(error))
            self._rests_until = time.monotonic() + REST_SECONDS
            return otherwise
        if self._rests_until > 0:
            logger.info("embedding_cache_back")
        self._rests_until = float("-inf")
        return found

    def _opened(self, *, suspected: bool = False) -> Database:
        """Return the open file.

        A damaged one is set aside first, but never one that another process made in its place.
        """
        if self._database is None:
            opened = partial(Database, self.path, schema=SCHEMA, cache_kibibytes=PAGES_KIBIBYTES)
            self._database = open_or_replace(self.path, opened, suspected=suspected)
        return self._database

    def _drop(self) -> None:
        self.close()
        try:
            set_aside(self.path)
        except OSError as error:
            raise Transient(f"{self.path} cannot be set aside: {error}", counts_as_retry=False) from error


def text_hash(text: str) -> bytes:
    """Return 16 bytes that stand for a text."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def models(tx: Transaction) -> dict[int, tuple[str, NDArray[np.float32]]]:
    """Return number -> (name, probe vector) of each model that was ever used here."""
    return {
        cast("int", number): (cast("str", name), np.frombuffer(cast("bytes", probe), dtype="<f4"))
        for number, name, probe in tx.execute("SELECT id, name, probe FROM model")
    }


def know_model(
    tx: Transaction,
    number: int,
    name: str,
    probe: NDArray[np.float32],
    *,
    same: Callable[[NDArray[np.float32], NDArray[np.float32]], bool],
) -> None:
    """Remember a model by the vector it gives the probe sentence.

    What another model left under this number is forgotten.

    Call it in each transaction that uses the model's vectors, because the file may have been replaced. ``same`` says
    whether two probe vectors are of one model.
    """
    blob = np.asarray(probe, dtype="<f4").tobytes()
    for its_name, seen in tx.execute("SELECT name, probe FROM model WHERE id = ?", (number,)):
        if its_name == name and (seen == blob or same(np.frombuffer(cast("bytes", seen), dtype="<f4"), probe)):
            return
    _all(tx.execute("DELETE FROM embedding WHERE model = ?", (number,)))
    _all(tx.execute("INSERT OR REPLACE INTO model VALUES (?, ?, ?, ?)", (number, name, probe.shape[0], blob)))


def get(tx: Transaction, model: int, texts: Sequence[str], *, now_milliseconds: int) -> dict[str, NDArray[np.float32]]:
    """Return text -> vector, float32, for those in the cache. Each hit counts as a use of today.

    A vector that is not finite, or not as wide as its model's, was damaged on disk. It counts as missing, and is made
    again.
    """
    found: dict[str, NDArray[np.float32]] = {}
    width = next(iter(tx.execute("SELECT dimension FROM model WHERE id = ?", (model,))), (0,))[0]
    today = now_milliseconds - now_milliseconds % USED_GRAIN_MILLISECONDS
    for text in texts:
        key = text_hash(text)
        for vector, used in tx.execute(
            "SELECT vector, used FROM embedding WHERE model = ? AND text_hash = ?", (model, key)
        ):
            blob = cast("bytes", vector)
            if len(blob) != 4 * cast("int", width) or not np.isfinite(kept := np.frombuffer(blob, dtype="<f4")).all():
                continue
            found[text] = kept
            if cast("int", used) < today:
                _all(tx.execute("UPDATE embedding SET used = ? WHERE model = ? AND text_hash = ?", (today, model, key)))
    return found


def put(tx: Transaction, model: int, vectors: Mapping[str, NDArray[np.float32]], *, now_milliseconds: int) -> None:
    """Keep vectors, each of shape (dimension,)."""
    today = now_milliseconds - now_milliseconds % USED_GRAIN_MILLISECONDS
    rows = [
        (model, text_hash(text), np.asarray(vector, dtype="<f4").tobytes(), today) for text, vector in vectors.items()
    ]
    _all(tx.executemany("INSERT OR REPLACE INTO embedding VALUES (?, ?, ?, ?)", rows))


def distrust(tx: Transaction, model: int, *, since_milliseconds: int) -> None:
    """Forget the vectors kept or used under ``model`` since the day of a moment. Another model may have made them."""
    day = since_milliseconds - since_milliseconds % USED_GRAIN_MILLISECONDS
    _all(tx.execute("DELETE FROM embedding WHERE model = ? AND used >= ?", (model, day)))


def prune(tx: Transaction, *, max_bytes: int, now_milliseconds: int) -> int:
    """Drop the least recently used vectors until the rest fit into ``max_bytes``. Returns how many were dropped.

    A use in the future comes from a clock that was set back since. It counts as one of today.
    """
    today = now_milliseconds - now_milliseconds % USED_GRAIN_MILLISECONDS
    _all(tx.execute("UPDATE embedding SET used = ?1 WHERE used > ?1", (today,)))
    ((count, size),) = tx.execute("SELECT count(*), coalesce(sum(length(vector)), 0) FROM embedding")
    total = cast("int", size) + ROW_OVERHEAD_BYTES * cast("int", count)
    if total <= max_bytes:
        return 0
    share = (total - max_bytes) / total
    doomed = min(cast("int", count), int(share * cast("int", count)) + 1)
    sql = """DELETE FROM embedding WHERE (model, text_hash) IN
        (SELECT model, text_hash FROM embedding ORDER BY used LIMIT ?)"""
    _all(tx.execute(sql, (doomed,)))
    return doomed


def keep_only(tx: Transaction, live: Iterable[bytes], *, unused_since_milliseconds: int | None) -> int:
    """Drop every vector whose text's hash is not in ``live``.

    Returns how many. With a moment, drop only those not used since the day before it.
    """
    _all(tx.execute("CREATE TEMP TABLE live (text_hash BLOB PRIMARY KEY) WITHOUT ROWID"))
    _all(tx.executemany("INSERT OR IGNORE INTO live VALUES (?)", ((one,) for one in live)))
    day = None if unused_since_milliseconds is None else unused_since_milliseconds - USED_GRAIN_MILLISECONDS
    where = "text_hash NOT IN (SELECT text_hash FROM live) AND (?1 IS NULL OR used <= ?1)"
    ((count,),) = tx.execute(f"SELECT count(*) FROM embedding WHERE {where}", (day,))
    _all(tx.execute(f"DELETE FROM embedding WHERE {where}", (day,)))
    _all(tx.execute("DROP TABLE temp.live"))
    return cast("int", count)


def _all(rows: Iterable[object]) -> None:
    for _ in rows:
        pass
