"""The ledger: which entries the index holds, by content hash, so that an edit touches only what it changed.

Before a commit to the index the touched keys are noted as *unknown* (an empty hash). A crash between the two commits
then leaves keys that the next diff writes or deletes again: no row is ever orphaned.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, cast

from everos_engine.stores.database import Transaction, Value
from everos_engine.stores.versions import Version

SCHEMA = """
CREATE TABLE IF NOT EXISTS ledger (
    md_path TEXT NOT NULL, entry_id TEXT NOT NULL, kind TEXT NOT NULL, content_hash BLOB NOT NULL, line INTEGER NOT NULL,
    refused INTEGER NOT NULL DEFAULT 0 CHECK (refused IN (0, 1)),
    PRIMARY KEY (md_path, entry_id)
) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS ledger_kind ON ledger (kind);
CREATE TABLE IF NOT EXISTS warning (
    md_path TEXT PRIMARY KEY, count INTEGER NOT NULL, first TEXT NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS incarnation (
    kind TEXT PRIMARY KEY, incarnation TEXT NOT NULL, version INTEGER NOT NULL, model TEXT NOT NULL,
    digest BLOB NOT NULL DEFAULT x''
) STRICT, WITHOUT ROWID;
"""
UPGRADE_TO_3 = """
ALTER TABLE incarnation ADD COLUMN digest BLOB NOT NULL DEFAULT x'';
ALTER TABLE ledger ADD COLUMN refused INTEGER NOT NULL DEFAULT 0 CHECK (refused IN (0, 1));
"""
"""What version 3 changes in the tables of version 2. New tables and indexes come with SCHEMA."""
UNKNOWN = b""

INTEND = """
INSERT INTO ledger (md_path, entry_id, kind, content_hash, line) VALUES (?, ?, ?, x'', ?)
ON CONFLICT (md_path, entry_id) DO UPDATE SET content_hash = x'', kind = excluded.kind
"""
APPLY = """
INSERT INTO ledger (md_path, entry_id, kind, content_hash, line, refused) VALUES (?, ?, ?, ?, ?, ?)
ON CONFLICT (md_path, entry_id) DO UPDATE SET content_hash = excluded.content_hash, line = excluded.line, kind = excluded.kind,
    refused = excluded.refused
"""


def known(tx: Transaction, paths: Sequence[str]) -> dict[str, dict[str, bytes]]:
    """Return path -> entry id -> content hash, of what the index holds for ``paths``. ``b""`` means unknown."""
    found: dict[str, dict[str, bytes]] = {path: {} for path in paths}
    sql = "SELECT md_path, entry_id, content_hash FROM ledger WHERE md_path IN (SELECT value FROM json_each(?))"
    for path, entry_id, content_hash in tx.execute(sql, (json.dumps(list(paths)),)):
        found[cast("str", path)][cast("str", entry_id)] = cast("bytes", content_hash)
    return found


def to_write_again(tx: Transaction, paths: Sequence[str]) -> dict[str, dict[str, bytes]]:
    """Return the same as ``known``, but with unknown for each entry whose text the embedder refused.

    Such an entry is asked again when its file is looked at.
    """
    found = known(tx, paths)
    sql = "SELECT md_path, entry_id FROM ledger WHERE refused = 1 AND md_path IN (SELECT value FROM json_each(?))"
    for path, entry_id in tx.execute(sql, (json.dumps(list(paths)),)):
        found[cast("str", path)][cast("str", entry_id)] = UNKNOWN
    return found


def intend(tx: Transaction, md_path: str, kind: str, entry_ids: Iterable[str]) -> None:
    """Record that the index is about to change at these keys."""
    _many(tx, INTEND, [(md_path, entry_id, kind, 0) for entry_id in entry_ids])


def apply(
    tx: Transaction,
    md_path: str,
    kind: str,
    *,
    written: Iterable[tuple[str, bytes, int, bool]],
    lines: Iterable[tuple[str, int]],
    deleted: Iterable[str],
) -> None:
    """Record what a commit did.

    ``written`` has (entry id, content hash, line, whether its text was refused), ``lines`` those that moved,
    ``deleted`` the ids.
    """
    _many(
        tx,
        APPLY,
        [
            (md_path, entry_id, kind, content_hash, line, int(refused))
            for entry_id, content_hash, line, refused in written
        ],
    )
    _many(
        tx,
        "UPDATE ledger SET line = ? WHERE md_path = ? AND entry_id = ? AND line <> ?",
        [(line, md_path, entry_id, line) for entry_id, line in lines],
    )
    _many(tx, "DELETE FROM ledger WHERE md_path = ? AND entry_id = ?", [(md_path, entry_id) for entry_id in deleted])


def warn(tx: Transaction, md_path: str, messages: Sequence[str]) -> None:
    """Record what a person should know of a file that is indexed all the same. Without warnings, clear it."""
    _many(tx, "DELETE FROM warning WHERE md_path = ?", [(md_path,)])
    if messages:
        _many(tx, "INSERT INTO warning VALUES (?, ?, ?)", [(md_path, len(messages), messages[0])])


def doubt(tx: Transaction, keys: Iterable[tuple[str, str, str]]) -> None:
    """Mark (md_path, entry_id, kind) keys as unknown, because the index disagrees about them."""
    _many(tx, INTEND, [(path, entry_id, kind, 0) for path, entry_id, kind in keys])


def void(tx: Transaction, kind: str) -> None:
    """Forget a kind, because its table is a new incarnation."""
    _many(tx, "DELETE FROM ledger WHERE kind = ?", [(kind,)])


def hashes(tx: Transaction, kind: str) -> dict[tuple[str, str], bytes]:
    """Return (md_path, entry_id) -> content hash of a whole kind."""
    sql = "SELECT md_path, entry_id, content_hash FROM ledger WHERE kind = ?"
    return {
        (cast("str", path), cast("str", entry_id)): cast("bytes", content_hash)
        for path, entry_id, content_hash in tx.execute(sql, (kind,))
    }


def lines(tx: Transaction, keys: Iterable[tuple[str, str]]) -> dict[tuple[str, str], int]:
    """Return (md_path, entry_id) -> 1-based line, for those known."""
    found: dict[tuple[str, str], int] = {}
    for key in keys:
        for (line,) in tx.execute("SELECT line FROM ledger WHERE md_path = ? AND entry_id = ?", key):
            found[key] = cast("int", line)
    return found


def rows_per_kind(tx: Transaction) -> dict[str, int]:
    """Return how many rows the index holds of each kind."""
    return {
        cast("str", kind): cast("int", count)
        for kind, count in tx.execute("SELECT kind, count(*) FROM ledger WHERE content_hash <> x'' GROUP BY kind")
    }


def unknown_per_kind(tx: Transaction) -> dict[str, int]:
    """Return how many keys of each kind may or may not be in the index.

    Either a commit of them was begun, or they are to be written again.
    """
    return {
        cast("str", kind): cast("int", count)
        for kind, count in tx.execute("SELECT kind, count(*) FROM ledger WHERE content_hash = x'' GROUP BY kind")
    }


class Remembered(NamedTuple):
    """What we know of a kind's table.

    It is the table's identity, its version after our last commit, its model, and that version's digest.
    """

    incarnation: str
    number: int
    model: str
    digest: bytes

    @property
    def version(self) -> Version:
        """Return the version that we left."""
        return Version(self.number, self.digest)


def incarnations(tx: Transaction) -> Mapping[str, Remembered]:
    """Return kind -> its table as we last wrote it."""
    return {
        cast("str", kind): Remembered(
            cast("str", incarnation), cast("int", version), cast("str", model), cast("bytes", digest)
        )
        for kind, incarnation, version, model, digest in tx.execute(
            "SELECT kind, incarnation, version, model, digest FROM incarnation"
        )
    }


def has_rows(tx: Transaction, kind: str) -> bool:
    """Return whether the ledger has any row of a kind."""
    return any(True for _ in tx.execute("SELECT 1 FROM ledger WHERE kind = ? LIMIT 1", (kind,)))


def remember(tx: Transaction, kind: str, incarnation: str, *, version: Version, model: str) -> None:
    """Record a table's identity and newest version."""
    sql = "INSERT OR REPLACE INTO incarnation (kind, incarnation, version, model, digest) VALUES (?, ?, ?, ?, ?)"
    _many(tx, sql, [(kind, incarnation, version.number, model, version.digest)])


def moved_on(tx: Transaction, kind: str, incarnation: str, *, version: Version) -> None:
    """Record a newer version of a table, if it is still the same incarnation."""
    sql = "UPDATE incarnation SET version = ?, digest = ? WHERE kind = ? AND incarnation = ? AND version <= ?"
    _many(tx, sql, [(version.number, version.digest, kind, incarnation, version.number)])


def forget(tx: Transaction, kind: str) -> None:
    """Forget a table's identity, because there is no table any more."""
    _many(tx, "DELETE FROM incarnation WHERE kind = ?", [(kind,)])


def _many(tx: Transaction, sql: str, rows: Sequence[Sequence[Value]]) -> None:
    for _ in tx.executemany(sql, rows):
        pass
