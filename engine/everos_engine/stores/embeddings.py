"""The embedding cache: vectors by model and text, so that no text is embedded twice."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, cast

import numpy as np

from everos_engine.stores.database import Transaction

if TYPE_CHECKING:
    from numpy.typing import NDArray

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
"""SQLite's own page cache: keys are hashes, so a page read is hardly ever asked for again soon, and the system caches files too."""
USED_GRAIN_MILLISECONDS = 86_400_000
ROW_OVERHEAD_BYTES = 64


def text_hash(text: str) -> bytes:
    """16 bytes that stand for a text."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def models(tx: Transaction) -> list[tuple[int, str, NDArray[np.float32]]]:
    """(id, name, probe vector) of each model ever used here."""
    return [
        (cast("int", number), cast("str", name), np.frombuffer(cast("bytes", probe), dtype="<f4"))
        for number, name, probe in tx.execute("SELECT id, name, probe FROM model")
    ]


def add_model(tx: Transaction, name: str, probe: NDArray[np.float32]) -> int:
    """Remember a model by the vector it gives the probe sentence; its new id."""
    blob = np.asarray(probe, dtype="<f4").tobytes()
    ((number,),) = tx.execute(
        "INSERT INTO model (name, dimension, probe) VALUES (?, ?, ?) RETURNING id", (name, probe.shape[0], blob)
    )
    return cast("int", number)


def get(tx: Transaction, model: int, texts: Sequence[str], *, now_milliseconds: int) -> dict[str, NDArray[np.float32]]:
    """Text -> vector, float32, for those in the cache; each hit counts as a use of today.

    One that is not finite, or not as wide as its model's, was damaged on disk: it counts as missing, and is made again.
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
    """Keep vectors; each shape (dimension,)."""
    today = now_milliseconds - now_milliseconds % USED_GRAIN_MILLISECONDS
    rows = [
        (model, text_hash(text), np.asarray(vector, dtype="<f4").tobytes(), today) for text, vector in vectors.items()
    ]
    _all(tx.executemany("INSERT OR REPLACE INTO embedding VALUES (?, ?, ?, ?)", rows))


def distrust(tx: Transaction, model: int, *, since_milliseconds: int) -> None:
    """Forget the vectors kept or used under ``model`` since the day of a moment: another model may have made them."""
    day = since_milliseconds - since_milliseconds % USED_GRAIN_MILLISECONDS
    _all(tx.execute("DELETE FROM embedding WHERE model = ? AND used >= ?", (model, day)))


def prune(tx: Transaction, *, max_bytes: int) -> int:
    """Drop the least recently used until the vectors fit into ``max_bytes``; how many went."""
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


def _all(rows: Iterable[object]) -> None:
    for _ in rows:
        pass
