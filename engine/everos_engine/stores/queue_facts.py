"""Look at the queue and the ledger for `status`, `explain` and `doctor`.

It only reads, and reads older databases too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

from everos_engine.stores import held as held_store
from everos_engine.stores.database import Transaction
from everos_engine.stores.queue import Fingerprint4, Status, WaitsFor

CHANGE = """
SELECT kind, lsn, status, owner, not_before, mtime_ns, size, ino, ctime_ns, racy, retry_count, retryable, error, source,
    first_seen, updated, {waits_for}, {failed_for},
    (SELECT count(*) FROM md_change_state AS o WHERE o.status = 'pending' AND o.not_before = 0 AND o.pos < c.pos)
FROM md_change_state AS c WHERE md_path = ?
"""


@dataclass(frozen=True, slots=True)
class Change:
    """All that the queue knows of one path. ``ahead`` is how many ready changes stand before it in the line."""

    kind: str
    lsn: int
    status: Status
    owner: str | None
    not_before: int
    fingerprint: Fingerprint4 | None
    racy: bool
    retry_count: int
    retryable: bool | None
    error: str | None
    source: str
    first_seen: int
    updated: int
    waits_for: WaitsFor | None
    failed_for: frozenset[str]
    ahead: int


@dataclass(frozen=True, slots=True)
class Held:
    """One deletion that the deletion guard holds. ``since`` is in milliseconds."""

    md_path: str
    kind: str
    reason: held_store.Reason
    since: int


def change(tx: Transaction, md_path: str) -> Change | None:
    """Return the queue's row of one path, or None."""
    for row in tx.execute(_waiting(tx, CHANGE), (md_path,)):
        kind, lsn, status, owner, not_before, *four, racy, retries, retryable, error, source, first, updated = row[:16]
        waits_for, failed_for, ahead = row[16:]
        return Change(
            kind=cast("str", kind),
            lsn=cast("int", lsn),
            status=cast("Status", status),
            owner=cast("str | None", owner),
            not_before=cast("int", not_before),
            fingerprint=None if four[0] is None else cast("Fingerprint4", tuple(four)),
            racy=bool(racy),
            retry_count=cast("int", retries),
            retryable=None if retryable is None else bool(retryable),
            error=cast("str | None", error),
            source=cast("str", source),
            first_seen=cast("int", first),
            updated=cast("int", updated),
            waits_for=cast("WaitsFor | None", waits_for),
            failed_for=frozenset(json.loads(cast("str | None", failed_for) or "{}")),
            ahead=cast("int", ahead),
        )
    return None


HELD = "SELECT md_path, kind, reason, since FROM held WHERE ?1 IS NULL OR md_path = ?1 ORDER BY md_path"


def held(tx: Transaction, md_path: str | None = None) -> list[Held]:
    """Return the deletions that the deletion guard holds, all or of one path."""
    if not _has_table(tx, "held"):
        return []
    return [
        Held(*row) for row in cast("Iterable[tuple[str, str, held_store.Reason, int]]", tx.execute(HELD, (md_path,)))
    ]


def held_counts(tx: Transaction) -> list[held_store.Held]:
    """Return how many deletions the deletion guard holds, by reason."""
    return held_store.counts(tx) if _has_table(tx, "held") else []


@dataclass(frozen=True, slots=True)
class Delayed:
    """Changes that wait for another attempt after a failure.

    It has how many there are, when the first is due, and one of their errors.
    """

    count: int
    due: int
    error: str


DELAYED = """
SELECT count(*), min(not_before), max(error) FROM md_change_state
WHERE status = 'pending' AND not_before > 0 AND error IS NOT NULL AND coalesce({waits_for}, '') NOT IN ('settle', 'file')
"""


def delayed(tx: Transaction) -> Delayed | None:
    """Return what waits because an attempt failed, or None. A file that only settles is not part of it."""
    ((count, due, error),) = tx.execute(_waiting(tx, DELAYED))
    return Delayed(cast("int", count), cast("int", due), cast("str", error)) if count else None


UNANSWERED = """
SELECT md_path, error FROM md_change_state
WHERE status = 'pending' AND not_before > 0 AND {waits_for} IS 'file' ORDER BY md_path
"""


def unanswered(tx: Transaction) -> list[tuple[str, str]]:
    """Return the changes that wait because their file does not answer, with the message."""
    return [(str(path), str(error)) for path, error in tx.execute(_waiting(tx, UNANSWERED))]


def warnings(tx: Transaction) -> tuple[int, str, str] | None:
    """Return how many files are indexed with a warning, the first of them, and what it says, or None."""
    if not _has_table(tx, "warning"):
        return None
    rows = list(tx.execute("SELECT count(*) OVER (), md_path, first FROM warning ORDER BY md_path LIMIT 1"))
    return (cast("int", rows[0][0]), str(rows[0][1]), str(rows[0][2])) if rows else None


def paths(tx: Transaction) -> list[str]:
    """Return every path the queue knows."""
    return [cast("str", row[0]) for row in tx.execute("SELECT md_path FROM md_change_state ORDER BY md_path")]


STATISTICS = """
SELECT c.md_path, c.kind, c.status, c.retryable, c.retry_count, c.lsn, c.size, c.mtime_ns, c.not_before, c.racy, c.source,
    c.first_seen, c.updated, {waits_for}, (SELECT count(*) FROM ledger AS l WHERE l.md_path = c.md_path)
FROM md_change_state AS c ORDER BY c.lsn
"""
STATISTIC_NAMES = (
    *("path", "kind", "status", "retryable", "retries", "lsn", "size", "mtime_ns", "not_before", "racy", "source"),
    *("first_seen", "updated", "waits_for", "rows"),
)


def statistics(tx: Transaction) -> list[dict[str, object]]:
    """Return one mapping per change, with numbers and states next to its path and without error texts."""
    return [dict(zip(STATISTIC_NAMES, row, strict=True)) for row in tx.execute(_waiting(tx, STATISTICS))]


def quick_check(tx: Transaction) -> list[str]:
    """Return what SQLite finds wrong with the file, or nothing if it is sound."""
    return [str(row[0]) for row in tx.execute("PRAGMA quick_check(10)") if row[0] != "ok"]


def _waiting(tx: Transaction, sql: str) -> str:
    """Put the columns of the typed reasons into a statement, or NULL for a database that is older than they are."""
    columns = {row[1] for row in tx.execute("PRAGMA table_info(md_change_state)")}
    return sql.format_map({name: name if name in columns else "NULL" for name in ("waits_for", "failed_for")})


def _has_table(tx: Transaction, name: str) -> bool:
    return bool(list(tx.execute("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?", (name,))))
